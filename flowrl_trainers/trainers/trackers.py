"""Pictures in the trackers of `report_to`, beside the numbers that transformers sends there."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL.Image import Image
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import default_logdir

STEP = "train/global_step"  # the axis that transformers gives to the numbers


def show_picture(callbacks: Iterable[TrainerCallback], name: str, picture: Image, text: str, step: int) -> None:
    """Show a picture in those of TensorBoard, trackio and wandb that a run reports to.

    Args:
        callbacks: Of the run.
        name: Under which the pictures of all updates stand together.
        picture: The sheet.
        text: Its caption; TensorBoard shows none.
        step: The number of updates made so far.
    """
    caption = f"After {step} updates. {text}"
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log({name: wandb.Image(picture, caption=caption), STEP: step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({name: trackio.Image(picture, caption=caption), STEP: step})


def check_trackers(args: TrainingArguments, callbacks: Iterable[TrainerCallback | type[TrainerCallback]]) -> None:
    """Raises `ValueError` where transformers would hand a tracker files of its own making.

    Args:
        args: Of the run.
        callbacks: Those that the user gave.
    """
    kind = os.environ.get("WANDB_LOG_MODEL")
    given = any(isinstance(callback, WandbCallback) or callback is WandbCallback for callback in callbacks)
    if (given or "wandb" in (args.report_to or [])) and kind in ("end", "checkpoint"):
        raise ValueError(
            f"WANDB_LOG_MODEL ({kind!r}) would send the base model to wandb, and a file that holds your Hub token: "
            "unset it, and log the adapter in `output_dir` as an artifact."
        )


def settle_tensorboard(callbacks: Iterable[TrainerCallback], output_dir: Path) -> None:
    """Let TensorBoard write into `output_dir/runs` from the first number on: transformers says so as training begins,
    and what is logged before would open another folder, for good.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output_dir / default_logdir())


def close_tensorboard(callbacks: Iterable[TrainerCallback]) -> None:
    """Close what an evaluation before training opened, whose folder is about to be moved; training opens another."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.close()
            callback.tb_writer = None


def name_trackio_run(args: TrainingArguments) -> None:
    """Keep the name that trackio gave to a run without one: an evaluation after training then goes on in that run."""
    if "trackio" in (args.report_to or []) and args.run_name is None:
        import trackio

        run = trackio.context_vars.current_run.get()
        args.run_name = None if run is None else run.name
