"""Which checkpoints can be trusted: a manifest with sizes and SHA-256, written last."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

MANIFEST = "manifest.json"
WEIGHTS = "trained_parameters.safetensors"
PART_OF_OPTIMIZER = "optimizer_{}.pt"  # of one process, where the network is sharded; else there is one optimizer.pt
READ_ON_RESUMING = ("trainer_state.json", "optimizer.pt", "scheduler.pt", WEIGHTS, "metrics.json")
"""The files that a resumed run reads, besides those of each process (`_needed`)."""


# ---- writing --------------------------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> None:
    """List every file of a checkpoint with its size and SHA-256; a checkpoint without a manifest is incomplete.

    All that the manifest lists is on the disk before the manifest is, so that no power cut leaves it without them.
    """
    manifest, unfinished = folder / MANIFEST, folder / f"{MANIFEST}.part"
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in (manifest, unfinished):
            _sync(path)
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _digest(path)}
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    # No line ending, without which it would be as good: so that every lost byte shows.
    unfinished.write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")
    _sync(unfinished)
    _sync(folder)
    unfinished.replace(manifest)
    _sync(folder)
    _sync(folder.parent)


def write_error(output_dir: Path, folder: Path, error: Exception) -> str:
    """The sentence about a checkpoint that could not be written.

    Args:
        output_dir: The folder of the run.
        folder: The checkpoint.
        error: What writing raised. torch says nothing of a full disk, so the free space is named.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
    place = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free / 1e6
    return (
        f"{folder} could not be written ({reason}; {free:.1f} MB are free there): make room, lower "
        f"`save_total_limit` or choose another `output_dir`; {_advice(output_dir)}"
    )


def _sync(path: Path) -> None:
    """Wait until the disk holds the bytes of a file, or the entries of a folder."""
    if os.name == "nt":  # Windows opens no folder, and syncs no file that is open for reading alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that cannot sync
            raise
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- checking -------------------------------------------------------------------------------------------------------


def fault(folder: Path) -> str | None:
    """Why a run cannot be resumed from a checkpoint, "incomplete: ..." or "damaged: ..."; None for a whole one.

    A whole checkpoint has a valid manifest, every byte that the manifest lists, and lists what a resumed run reads.
    Other files may lie beside those.
    """
    try:
        files = _read_manifest(folder)
    except ValueError as error:
        return f"incomplete: {error}"
    for name, (size, digest) in files.items():
        difference = _difference(folder / name, size, digest)
        if difference is not None:
            return f"damaged: {name!r} {difference}"
    if "loop_state_0.pt" in files:  # of an earlier version, which loading refuses in a sentence that says so
        return None
    missing = next((name for name in _needed(files) if name not in files), None)
    if missing is None:
        return None
    model_only = "optimizer.pt" not in files and "training_state_0.pt" not in files
    return f"incomplete: its {MANIFEST} lists no {missing!r}" + (
        ", as it was saved with `save_only_model`" if model_only else ""
    )


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file that a manifest lists; raises `ValueError` with what is wrong with it."""
    try:
        if not folder.is_dir():
            raise ValueError("there is no such folder")
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"its {MANIFEST} is no file" if (folder / MANIFEST).exists() else f"it has no {MANIFEST}")
        text = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error.strerror})") from error
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} is not valid JSON ({error})") from error
    listed = content.get("files") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"its {MANIFEST} lists no files")
    files = {}
    for name, entry in listed.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"its {MANIFEST} lists {name!r}, which may lie outside of the folder")
        match entry:
            case {"size": int() as size, "sha256": str() as digest} if not isinstance(size, bool):
                files[name] = (size, digest)
            case _:
                raise ValueError(f"its {MANIFEST} lacks the size in bytes or the SHA-256 of {name!r}")
    return files


def _difference(path: Path, size: int, digest: str) -> str | None:
    """How a file differs from its entry in the manifest, if it does."""
    try:
        if not path.is_file():
            return "is no file" if path.exists() else "is missing"
        if (found := path.stat().st_size) != size:
            return f"has {found} bytes instead of {size}"
        return "has other bytes than those that were saved" if _digest(path) != digest else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _needed(names: Collection[str]) -> Iterator[str]:
    """What a manifest must list, for as many processes as it lists files of."""
    sharded = PART_OF_OPTIMIZER.format(0) in names
    yield from (name for name in READ_ON_RESUMING if not (sharded and name == "optimizer.pt"))
    found = (re.fullmatch(r"(?:training|rng)_state_([0-9]{1,9})\.pth?", name) for name in names)
    last = max((int(match[1]) for match in found if match), default=0)
    for process in range(last + 1):
        if sharded:
            yield PART_OF_OPTIMIZER.format(process)
        yield f"training_state_{process}.pt"
        yield f"rng_state_{process}.pth" if last else "rng_state.pth"


# ---- choosing -------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)


def newest_whole(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of a run, if there is one, and the faults of those passed over to reach it."""
    faults: dict[Path, str] = {}
    for folder in checkpoints(output_dir):
        reason = fault(folder)
        if reason is None:
            return folder, faults
        faults[folder] = reason
    return None, faults


def checkpoint_to_resume(output_dir: Path, wanted: str | Path | Literal[True]) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from, and the faults of those that were passed over to reach it.

    Args:
        output_dir: The folder of the run.
        wanted: A checkpoint's folder, True for the newest whole one, or "auto" for that or None, a new run.

    Raises:
        ValueError: For a named folder that is incomplete or damaged, with the newest whole one; for True where no
            checkpoint is whole.
    """
    if wanted is not True and wanted != "auto":
        reason = fault(Path(wanted))
        if reason is not None:
            raise ValueError(f"{wanted} is {reason}; {_advice(output_dir)}")
        return Path(wanted), {}
    folder, faults = newest_whole(output_dir)
    if folder is None and wanted is True:
        reasons = "; ".join(f"{bad.name} is {reason}" for bad, reason in faults.items())
        raise ValueError(
            f"{output_dir} holds no complete checkpoint to resume from{reasons and f' ({reasons})'}: resume from "
            "'auto' to begin anew there, or set `overwrite_output_dir`."
        )
    return folder, faults


def refuse_nothing_to_resume(output_dir: Path, wanted: str | Path | Literal[True]) -> None:
    """Refuse, before a model is loaded, what `checkpoint_to_resume` will refuse whatever the bytes of files are.

    Args:
        output_dir: The folder of the run.
        wanted: See `checkpoint_to_resume`.

    Raises:
        ValueError: Where no folder that is asked for has a manifest.
    """
    folders = checkpoints(output_dir) if wanted is True else [Path(wanted)]
    if wanted != "auto" and not any((folder / MANIFEST).is_file() for folder in folders):
        checkpoint_to_resume(output_dir, wanted)


def _advice(output_dir: Path) -> str:
    good, _ = newest_whole(output_dir)
    return f"resume from {good}, the newest good one." if good else "there is no good one to resume from."
