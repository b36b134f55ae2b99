"""Which checkpoints can be trusted: a manifest with sizes and SHA-256, written last."""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

MANIFEST = "manifest.json"
Condition = Literal["good", "incomplete", "damaged"]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file of a checkpoint with its size and SHA-256; what has no manifest is incomplete."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    unfinished = folder / f"{MANIFEST}.part"
    unfinished.write_text(json.dumps({"files": files}, indent=2) + "\n")
    unfinished.rename(folder / MANIFEST)


def condition(folder: Path) -> Condition:
    """Whether a checkpoint has a manifest and every byte that the manifest lists."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return "incomplete"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"] or _digest(path) != entry["sha256"]:
            return "damaged"
    return "good"


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N` of a run, newest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)


def checkpoint_to_resume(output_dir: Path, wanted: str | Path | Literal[True]) -> tuple[Path, list[Path]]:
    """The checkpoint to go on from, and the incomplete ones that were passed over to reach it.

    wanted: a folder, or True for the newest complete one. Raises `ValueError` where there is none, where the folder
    has no manifest, and where bytes differ from the manifest; then the newest good checkpoint is named.
    """
    candidates = checkpoints(output_dir) if wanted is True else [Path(wanted)]
    passed_over: list[Path] = []
    for folder in candidates:
        match condition(folder):
            case "good":
                return folder, passed_over
            case "damaged":
                raise ValueError(
                    f"{folder} is damaged: its files differ from its manifest; {_advice(output_dir, folder)}"
                )
            case "incomplete":
                passed_over.append(folder)
    if wanted is True:
        raise ValueError(
            f"{output_dir} holds no complete checkpoint to resume from: start without `resume_from_checkpoint`."
        )
    raise ValueError(
        f"{wanted} is no complete checkpoint, as it has no valid {MANIFEST}; {_advice(output_dir, Path(wanted))}"
    )


def _advice(output_dir: Path, bad: Path) -> str:
    good = next((p for p in checkpoints(output_dir) if p != bad and condition(p) == "good"), None)
    return f"resume from {good}, the newest good one." if good else "there is no good one to resume from."
