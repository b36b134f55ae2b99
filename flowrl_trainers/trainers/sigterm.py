"""SIGTERM, by which preempted machines announce their end, becomes a checkpoint after the update at hand."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

EXIT_STATUS = 128 + signal.SIGTERM  # 143, as shells report a process that SIGTERM ended


class SigtermCallback(TrainerCallback):
    """Asks Trainer for a checkpoint after the update, or its evaluation, during which SIGTERM reached any process.

    Args:
        on_any_process: Whether its argument is true on at least one process; called by all after every update and
            evaluation.

    Attributes:
        leaving: Whether all processes have agreed to save and to leave.
    """

    def __init__(self, on_any_process: Callable[[bool], bool]) -> None:
        self.on_any_process = on_any_process
        self.arrived = self.leaving = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which SIGTERM is noted, unless somebody else handles it or this is not the main thread."""
        self.arrived = self.leaving = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, *_: Any) -> None:
        self.arrived = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.leaving = self.on_any_process(self.arrived)
        control.should_save |= self.leaving

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.leaving:  # since the evaluation of `eval_on_start`, before which nothing was learned
            logger.warning("SIGTERM ended training before its first update.")
            raise SystemExit(EXIT_STATUS)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)  # Trainer saves after the evaluation that follows an update
