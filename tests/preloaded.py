"""What the fork server of `forked.py` imports beforehand; nothing here may start a thread or compute."""

import flowrl_trainers.cli.demo
import flowrl_trainers.cli.evaluate
import flowrl_trainers.cli.run
import flowrl_trainers.trainers  # noqa: F401
