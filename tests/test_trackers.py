"""TensorBoard, trackio and wandb get numbers and picture grids; what they stored, offline, is read back."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import WandbCallback

from . import forked
from .helpers import CAPTIONS, adjoint_matching, make_trainer
from .tiny import tiny_sd3

TRACKERS = ["tensorboard", "trackio", "wandb"]


def train_and_evaluate(folder: Path) -> None:
    """In a process of its own: trackers read their folders when they are imported, and stay as long as the process."""
    t = make_trainer(
        "TAFSGRPOTrainer", folder / "run", eval_dataset=Dataset.from_dict({"prompt": CAPTIONS}), report_to=TRACKERS,
        project="red", log_images=3,
    )  # fmt: skip
    t.train()
    t.evaluate()  # in the same run of every tracker, though training has ended
    import trackio
    import wandb

    trackio.finish()  # as they do where a process ends by itself, and no fork does
    wandb.finish()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    offline = {
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(folder / "board"), "HOME": str(folder),
    }  # fmt: skip
    done = forked.call(train_and_evaluate, folder, environment=dict(os.environ) | offline)
    assert done.returncode == 0, done.stderr
    return folder


def sheet(folder: Path) -> np.ndarray:
    """The grid of the evaluation as it lies in `samples/`."""
    return np.asarray(Image.open(folder / "run" / "samples" / "step-000002.png"))


def test_tensorboard(folder):
    events = EventAccumulator(str(folder / "board"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples/train", "samples/held_out"}
    (held_out,) = events.Images("samples/held_out")
    assert held_out.step == 2
    (folder / "board.png").write_bytes(held_out.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(folder / "board.png")), sheet(folder))
    assert [event.step for event in events.Scalars("train/reward/redness")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/base_reward/redness")] == [2]


def test_an_evaluation_before_training_writes_into_the_folder_of_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    t = make_trainer("AdjointMatchingTrainer", tmp_path / "run", report_to="tensorboard", max_steps=1, log_images=0)
    t.evaluate(CAPTIONS[:1])
    t.train()
    assert list((tmp_path / "run" / "runs").rglob("events.out*"))
    assert not (tmp_path / "runs").exists()
    again = make_trainer(
        "AdjointMatchingTrainer", tmp_path / "run", report_to="tensorboard", max_steps=1, log_images=0,
        overwrite_output_dir=True,
    )  # fmt: skip
    again.evaluate(CAPTIONS[:1])
    again.train()
    assert list((tmp_path / "run" / "runs").rglob("events.out*"))


def test_wandb_gets_no_files_of_transformers_making(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(ValueError, match=r"^WANDB_LOG_MODEL \('end'\) would send the base model to wandb, and a file"):
        make_trainer("AdjointMatchingTrainer", tmp_path, report_to="wandb")
    with pytest.raises(ValueError, match=r"^WANDB_LOG_MODEL"):
        adjoint_matching(tmp_path, tiny_sd3(), callbacks=[WandbCallback()])
    make_trainer("AdjointMatchingTrainer", tmp_path, report_to="none")


def trackio_rows() -> None:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("red")
    print(json.dumps(SQLiteStorage.get_logs("red", run), default=str))


def test_trackio(folder):
    done = forked.call(trackio_rows, environment=dict(os.environ) | {"TRACKIO_DIR": str(folder / "trackio")})
    assert done.returncode == 0, done.stderr  # one run alone
    rows = json.loads(done.stdout.splitlines()[-1])
    check_rows(rows)
    for name, step in (("samples/train", 0), ("samples/held_out", 2)):
        (row,) = (row for row in rows if name in row)
        check_caption(name, row[name]["caption"])
        assert row["train/global_step"] == step
        stored = np.asarray(Image.open(folder / "trackio" / "media" / row[name]["file_path"]).convert("RGB"))
        if name == "samples/held_out":
            assert np.array_equal(stored, sheet(folder))


def records(stored: bytes) -> Iterator[bytes]:
    """The records of wandb's file, a log of LevelDB: after seven bytes, in blocks of 32 KiB, parts of records.

    A part begins with four bytes of checksum, its length, and its kind: 1 whole, 2 first, 3 middle, 4 last.
    """
    place, found = 7, b""
    while place < len(stored):
        if 2**15 - place % 2**15 < 7:  # no room for a part
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", stored[place + 4 : place + 7])
        found += stored[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield found
            found = b""


def test_wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for record in map(Record.FromString, records(file.read_bytes())):
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                name, *part = item.nested_key
                value = json.loads(item.value_json)
                rows[-1][name] = rows[-1].get(name, {}) | {part[0]: value} if part else value
    check_rows(rows)
    for name, step in (("samples/train", 0), ("samples/held_out", 2)):
        (row,) = (row for row in rows if name in row)
        check_caption(name, row[name]["caption"])
        assert row["train/global_step"] == step
        stored = np.asarray(Image.open(file.parent / "files" / row[name]["path"]).convert("RGB"))
        if name == "samples/held_out":
            assert np.array_equal(stored, sheet(folder))


def check_rows(rows: list[dict]) -> None:
    assert [row["train/global_step"] for row in rows if "train/reward/redness" in row] == [1, 2]
    assert [row["train/global_step"] for row in rows if "eval/base_reward/redness" in row] == [2]


def check_caption(name: str, caption: str) -> None:
    if name == "samples/held_out":
        assert caption == "After 2 updates. Base above tuned."
    else:
        lines = caption.removeprefix("After 0 updates. ").splitlines()
        assert len(lines) == 3
        assert {line.split(": ")[1] for line in lines} <= set(CAPTIONS)
        assert all(-1 <= float(line.split(": ")[0].removeprefix("redness ")) <= 1 for line in lines)
