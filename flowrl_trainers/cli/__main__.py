"""`python -m flowrl_trainers.cli`: what the launcher starts in every process."""

import sys

from . import main

sys.exit(main())
