"""`python -m flowrl_trainers.cli`: the launcher starts this in every process."""

import sys

from . import main

sys.exit(main())
