"""What an earlier run left in an `output_dir`: refused, or moved aside for a new run."""

import shutil
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from .checkpoints import checkpoints, newest_whole

ADAPTER = "pytorch_lora_weights.safetensors"
FILES = (
    "checkpoint-*", ADAPTER, "transformer", "critic", "value_network", "README.md", "card.json", "config.yaml",
    "metrics.json", "metrics.jsonl", "samples", "before_after.*", "reward_curve.png",
    "comfyui_lora.safetensors", "runs",
)  # fmt: skip
"""What runs write, as patterns; whatever else lies in the folder is the user's and stays."""


def models_of_a_run(output_dir: Path) -> list[Path]:
    """The adapter, or `transformer/` beside the `config.yaml` of its run, and the newest checkpoint in a folder."""
    trained = [output_dir / ADAPTER]
    if (output_dir / "config.yaml").exists():  # else it may be that of a base model
        trained.append(output_dir / "transformer")
    return [path for path in trained if path.exists()] + checkpoints(output_dir)[:1]


def refuse_earlier_run(output_dir: Path, found: list[Path]) -> None:
    """Refuse a new run in a folder that holds another.

    Args:
        output_dir: That of the new run.
        found: What the earlier run left there; nothing is refused where it is empty.

    Raises:
        ValueError: Naming the folder, what lies there, and the ways out.
    """
    if found:
        good, _ = newest_whole(output_dir)
        go_on = "" if good is None else f"pass `resume_from_checkpoint=True` to go on from {good.name}, "
        raise ValueError(
            f"`output_dir` ({output_dir}) holds {' and '.join(path.name for path in found)} of an earlier run, and "
            f"nobody could tell later whose file is whose: choose another `output_dir`, {go_on}or set "
            f"`overwrite_output_dir=True`, which moves the earlier files to {free_folder(output_dir)}."
        )


def free_folder(output_dir: Path) -> Path:
    """The first of `<output_dir>.before-1`, `<output_dir>.before-2`, ... that does not exist."""
    place = output_dir.resolve()
    names = (place.with_name(f"{place.name}.before-{number}") for number in count(1))
    return next(path for path in names if not path.exists())


def files_of_a_run(output_dir: Path) -> list[Path]:
    """All that a run has written into a folder."""
    return sorted(path for pattern in FILES for path in output_dir.glob(pattern))


def move_aside(output_dir: Path, paths: Iterable[Path]) -> Path:
    """Move files and folders out of an `output_dir` into a new folder beside it, which is returned.

    Args:
        output_dir: The folder that is cleared.
        paths: What is moved.

    Raises:
        ValueError: Where that folder cannot be made or filled.
    """
    aside = free_folder(output_dir)
    try:
        aside.mkdir()
        for path in paths:
            shutil.move(path, aside / path.name)
    except OSError as error:
        raise ValueError(
            f"The files of an earlier run cannot be moved from {output_dir} to {aside} ({error.strerror}): choose "
            "another `output_dir`."
        ) from error
    return aside
