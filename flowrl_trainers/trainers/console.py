"""What a run says while it goes: one line that one reads, a table per evaluation, and all numbers in a file."""

import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import is_in_notebook

from ..rewards import CheckerReward
from ..run_folder import RunFolder
from ..run_folder.text_files import json_line
from ..sampling.progress import WIDTH, messages_above_bars

logger = logging.getLogger(__name__)

Rows = dict[str, dict[str, float]]

DEFAULTS = (PrinterCallback, ProgressCallback)  # one of which Trainer adds
LONGEST_NAME = 60
BAR = "{n_fmt}/{total_fmt} {bar:5} {desc}"


def is_live(args: TrainingArguments) -> bool:
    """Whether bars are shown: on a terminal and in a notebook, unless `disable_tqdm` is set."""
    return not args.disable_tqdm and (sys.stderr.isatty() or is_in_notebook())


def take_place_of_default(trainer: Trainer, console: TrainerCallback, given: list[TrainerCallback]) -> None:
    """Put a callback in the place of the one that Trainer shows progress by, unless the user gave such a one.

    Args:
        trainer: Has added its own as the last one.
        console: Ours.
        given: The user's callbacks.
    """
    handler = trainer.callback_handler
    handler.remove_callback([callback for callback in handler.callbacks if isinstance(callback, DEFAULTS)][-1])
    if given:
        from trl import RichProgressCallback  # takes seconds, and a user who gives one has imported it

        others = (*DEFAULTS, RichProgressCallback)
        if any(isinstance(callback, others) or callback in others for callback in given):
            return
    handler.add_callback(console)


class LogFile(TrainerCallback):
    """Every log of the run, whole, as a line of `metrics.jsonl`; after a resumption without those that it repeats.

    What this process logged before stands first: evaluations, and other calls of `train`.

    Args:
        folder: Of the run.
        step_of_weights: Says which update made the weights, which an evaluation is of.
    """

    def __init__(self, folder: Path, step_of_weights: Callable[[], int]) -> None:
        self.path, self.step_of_weights = folder / "metrics.jsonl", step_of_weights
        self.is_training = False
        self.rows: list[dict[str, Any]] = []  # of this process
        self.before: list[dict[str, Any]] = []  # those that do not belong to the training at hand
        self.outside: list[dict[str, Any]] = []  # those of evaluations since the last training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.before = self.rows if state.global_step == 0 else [*self.before, *self.outside]
            self.rows = [*self.before, *state.log_history]
            self._write("w", self.rows)
        self.is_training, self.outside = True, []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_training = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs is not None:
            row = {"step": state.global_step if "train_runtime" in logs else self.step_of_weights()} | logs
            self._write("a", [row])
            self.rows.append(row)
            if not self.is_training:
                self.outside.append(row)

    def _write(self, mode: str, rows: list[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open(mode, encoding="utf-8") as file:
                file.writelines(map(json_line, rows))
        except OSError as error:  # a full disk ends a run where a checkpoint is due, and not before
            logger.warning("%s lacks a log, as it cannot be written: %s.", self.path, error.strerror)


class Console(TrainerCallback):
    """One line on the state of the run, live on a terminal and else printed with each log; a table per evaluation.

    `log_level` "debug" prints every log whole, "error" and "critical" print nothing.

    Args:
        run_folder: Knows the rows of the last evaluation.
        images_per_update: Over all processes.
        step_of_weights: Says which update made the weights.
    """

    def __init__(self, run_folder: RunFolder, images_per_update: int, step_of_weights: Callable[[], int]) -> None:
        self.run_folder, self.images_per_update = run_folder, images_per_update
        self.step_of_weights = step_of_weights
        self.bar: tqdm | None = None
        self.open = ExitStack()
        self.began = self.update_began = perf_counter()
        self.first = self.updates = 0
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.first, self.updates, self.seconds = perf_counter(), state.global_step, 0, 0.0
        if not _speaks(args, state):
            return
        self.open.enter_context(messages_above_bars())
        if is_live(args):
            self.bar = self.open.enter_context(
                tqdm(
                    total=state.max_steps,
                    initial=state.global_step,
                    desc="the first rollout",
                    bar_format=BAR,
                    dynamic_ncols=True,
                    leave=False,
                )
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.update_began = perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds += perf_counter() - self.update_began
        self.updates += 1
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not _speaks(args, state) or logs is None:
            return
        if "loss" in logs and self.bar is not None:
            self.bar.set_description_str(self.line(state, logs, WIDTH - len(f"{self.bar} ") + len(self.bar.desc)))
        elif "loss" in logs:
            done = f"{state.global_step}/{state.max_steps} "
            print(done + self.line(state, logs, WIDTH - len(done)), flush=True)
        elif "train_runtime" in logs:
            tqdm.write(f"{_updates(self.updates)} in {tqdm.format_interval(logs['train_runtime'])}.")
        if args.get_process_log_level() <= logging.DEBUG:
            tqdm.write(str({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in logs.items()}))

    def line(self, state: TrainerState, logs: dict[str, Any], width: int) -> str:
        """Time left, rewards, images per second, and seconds by phase, the longest first; what a width has room for.

        Args:
            state: Of the run.
            logs: Of an update.
            width: The most characters.
        """
        left = (perf_counter() - self.began) * (state.max_steps - state.global_step) / max(1, self.updates)
        parts = [f"{tqdm.format_interval(left)} left"]
        held_out = self.run_folder.rows.get("tuned", {})
        rewards = [name for name in logs | held_out if name.startswith("reward/")]
        for name in rewards:
            values = [f"{logs[name]:.4g}"] if name in logs else []
            values += [f"held-out {held_out[name]:.4g}"] if name in held_out else []
            parts.append(f"{name.removeprefix('reward/')[:LONGEST_NAME]} {', '.join(values)}")
        parts.append(f"{self.images_per_update * self.updates / max(self.seconds, 1e-9):.3g} images/s")
        phases = {name.removeprefix("seconds/"): logs[name] for name in logs if name.startswith("seconds/")}
        parts += [f"{name} {phases[name]:.2g} s" for name in sorted(phases, key=lambda name: -phases[name])]
        text = ""
        for part in parts:
            longer = f"{text} · {part}" if text else part
            if len(longer) > width:
                break
            text = longer
        return text

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _speaks(args, state):
            tqdm.write(table(self.run_folder.rows, self.step_of_weights()))
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the terminal and the handlers of messages as they were before training, however that ended."""
        self.open.close()
        self.bar = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()


def table(rows: Rows, updates: int) -> str:
    """Base, tuned and change of every metric, a line each.

    Args:
        rows: Of an evaluation, by label: `base`, `tuned`, and those of further samplers, `base_ode` and `tuned_ode`.
        updates: Those that made the weights.
    """
    lines = [(f"Held-out prompts after {_updates(updates)}", "base", "tuned", "change")]
    for label, tuned in rows.items():
        if label.startswith("tuned"):
            sampler = label.removeprefix("tuned").removeprefix("_")
            base = rows[label.replace("tuned", "base")]
            for name, value in tuned.items():
                if name == f"reward/{CheckerReward.name}" and "checker_accuracy" in tuned:  # the same number
                    continue
                before = base.get(name)
                numbers = ("", _number(value), "") if before is None else (
                    _number(before), _number(value), _number(value - before, "+")
                )  # fmt: skip
                lines.append((f"{sampler} {name}".strip()[:LONGEST_NAME], *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in lines
    )


def _updates(count: int) -> str:
    return f"{count} update{'s' if count != 1 else ''}"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1e4 else f"{value:{sign}.4g}"


def _speaks(args: TrainingArguments, state: TrainerState) -> bool:
    return state.is_world_process_zero and args.log_level not in ("error", "critical")
