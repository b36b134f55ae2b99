"""Resuming is forgiving and exact: what is not whole is passed over with its reason, and nothing half looks whole."""

import ctypes
import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from flowrl_trainers.cli.card import card
from flowrl_trainers.run_folder import checkpoints
from flowrl_trainers.run_folder.checkpoints import (
    MANIFEST,
    READ_ON_RESUMING,
    WEIGHTS,
    checkpoint_to_resume,
    fault,
    write_manifest,
)
from flowrl_trainers.run_folder.earlier_run import ADAPTER
from flowrl_trainers.trainers import checkpointed_trainer

from . import forked
from .helpers import adjoint_matching
from .hub_server import run_against, serve
from .tiny import tiny_sd3


def train(folder: Path, updates: int, resume: str | bool | None = None, **settings) -> TrainerState:
    t = adjoint_matching(folder, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=updates, **settings)
    t.train(resume_from_checkpoint=resume)
    return t.state


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two updates with a checkpoint after each, made once; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 2)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def assert_went_on_exactly(run: Path, trained: Path) -> None:
    """The second update of a run is again that of the undisturbed one, and its checkpoint is whole."""
    assert fault(run / "checkpoint-2") is None
    found, expected = (load_file(folder / "checkpoint-2" / WEIGHTS) for folder in (run, trained))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- every file, damaged in every way -------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), r"has \d+ bytes instead of \d+"),
    "emptied": (lambda path: os.truncate(path, 0), r"has 0 bytes instead of \d+"),
    "one bit flipped": (flip_a_bit, "has other bytes than those that were saved"),
    "removed": (Path.unlink, "is missing"),
    "replaced by a folder": (replace_by_a_folder, "is no file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_to_any_file_is_found_and_named(run, damage):
    newest, older = run / "checkpoint-2", run / "checkpoint-1"
    names = [path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()]
    assert {MANIFEST, "README.md", "training_state_0.pt", "rng_state.pth", *READ_ON_RESUMING} <= set(names)
    spoil, what = DAMAGES[damage]
    for name in names:
        whole = shutil.copytree(newest, run / "whole")
        spoil(newest / name)
        folder, faults = checkpoint_to_resume(run, True)
        assert folder == older
        assert list(faults) == [newest]
        if name == MANIFEST:  # a digit of a hash that changed looks like another file that did
            flipped = damage == "one bit flipped" and "has other bytes than those" in faults[newest]
            assert MANIFEST in faults[newest] or flipped
        else:
            assert faults[newest].startswith(f"damaged: {name!r} ")
            assert re.search(what, faults[newest])
        shutil.rmtree(newest)
        whole.rename(newest)
    assert checkpoint_to_resume(run, True) == (newest, {})


def test_every_bit_of_a_manifest_counts(run):
    """Spoil the lowest bit of every byte: in a name, a size, a digest or the marks of JSON between them."""
    manifest = run / "checkpoint-2" / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        manifest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert fault(manifest.parent) is not None, content[place - 20 : place + 20]


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        ("truncated", "README.md"),
        ("emptied", "trainer_state.json"),
        ("one bit flipped", WEIGHTS),
        ("removed", MANIFEST),
        ("replaced by a folder", "optimizer.pt"),
        ("replaced by a folder", MANIFEST),
    ],
)
def test_a_run_goes_on_from_the_older_checkpoint_exactly(run, trained, caplog, damage, name):
    spoil, _ = DAMAGES[damage]
    spoil(run / "checkpoint-2" / name)
    assert train(run, 2, resume="auto" if name == MANIFEST else True).global_step == 2
    passed_over = [record.getMessage() for record in caplog.records if "Passed over" in record.getMessage()]
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"Passed over {run / 'checkpoint-2'}, which is ")
    assert name in passed_over[0]
    assert_went_on_exactly(run, trained)


def test_a_damaged_checkpoint_that_is_named_is_refused(run):
    (run / "checkpoint-1" / "README.md").write_text("short")
    with pytest.raises(ValueError, match=r"checkpoint-1 is damaged: 'README\.md' has 5 bytes instead of \d+; resume "
                       r"from .*checkpoint-2, the newest good one\.$"):  # fmt: skip
        train(run, 3, resume=str(run / "checkpoint-1"))
    with pytest.raises(ValueError, match="checkpoint-7 is incomplete: there is no such folder; resume from"):
        train(run, 3, resume=str(run / "checkpoint-7"))


def test_where_none_is_whole_auto_starts_anew_and_true_refuses(run, caplog):
    (run / "checkpoint-1" / "scheduler.pt").unlink()
    (run / "checkpoint-2" / MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match=r"holds no complete checkpoint to resume from \(checkpoint-2 is incomplete: "
                       r"its manifest\.json lists no files; checkpoint-1 is damaged: 'scheduler\.pt' is missing\): "
                       "resume from 'auto' to begin anew there"):  # fmt: skip
        train(run, 1, resume=True)
    caplog.clear()
    assert train(run, 1, resume="auto").global_step == 1
    warnings = [record.getMessage() for record in caplog.records if record.name == checkpointed_trainer.__name__]
    assert warnings == [
        f"Passed over {run / 'checkpoint-2'}, which is incomplete: its manifest.json lists no files.",
        f"Passed over {run / 'checkpoint-1'}, which is damaged: 'scheduler.pt' is missing.",
        f"No checkpoint in {run} is complete: the run starts anew.",
        f"What an earlier run left in {run} is now in {run}.before-1.",
    ]


def test_a_card_written_again_leaves_a_checkpoint_whole_and_mends_no_damaged_one(run):
    flip_a_bit(run / "checkpoint-1" / WEIGHTS)
    for number in (1, 2):
        card([str(run / f"checkpoint-{number}"), "--license", "mit"])
        assert "\nlicense: mit\n" in (run / f"checkpoint-{number}" / "README.md").read_text()
    assert [fault(run / f"checkpoint-{number}") is None for number in (1, 2)] == [False, True]


def test_a_file_beside_those_listed_is_fine(run):
    (run / "checkpoint-2" / "notes.txt").write_text("mine")
    assert fault(run / "checkpoint-2") is None


# ---- odd manifests --------------------------------------------------------------------------------------------------

ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe{", r"incomplete: its manifest\.json is not valid JSON \('utf-8' codec"),
        (b"", r"incomplete: its manifest\.json is not valid JSON \(Expecting value"),
        (b"{", r"incomplete: its manifest\.json is not valid JSON"),
        (b"[" * 100_000, r"incomplete: its manifest\.json is not valid JSON \(maximum recursion"),
        (b"1" * 5000, r"incomplete: its manifest\.json is not valid JSON \(Exceeds the limit"),
        *((odd, r"incomplete: its manifest\.json lists no files") for odd in (b"[]", b"null", b"3", b'"files"')),
        *(({"files": odd}, "lists no files") for odd in (None, [], {}, 3, "README.md", ["README.md"])),
        ({}, "lists no files"),
        *(({"files": {"a": odd}}, "lacks the size in bytes or the SHA-256 of 'a'") for odd in (None, [], "x", 3, {})),
        *(
            ({"files": {"a": ENTRY | odd}}, "lacks the size in bytes or the SHA-256 of 'a'")
            for odd in (*({"size": size} for size in ("1", float("nan"), True, None)), {"sha256": None}, {"sha256": 3})
        ),
        ({"files": {"a": {"size": 1}}}, "lacks the size in bytes or the SHA-256 of 'a'"),
        *(
            ({"files": {odd: ENTRY}}, "which may lie outside of the folder")
            for odd in ("../checkpoint-1/README.md", "a/../../b", "..", "/etc/hostname")
        ),
        ({"files": {"": ENTRY}}, "damaged: '' is no file"),
        ({"files": {"a" * 300: ENTRY}}, r"damaged: 'a+' cannot be read \(File name too long\)"),
        ({"files": {"\0": ENTRY}}, r"damaged: '\\x00' is missing"),
        ({"files": {"\ud800": ENTRY}}, r"damaged: '\\ud800' is missing"),
        ({"files": {"README.md": ENTRY | {"size": -1}}}, "damaged: 'README.md' has .* bytes instead of -1"),
    ],
)  # fmt: skip
def test_an_odd_manifest_has_a_reason(trained, tmp_path, content, reason):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "README.md").write_text("some bytes")
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=reason):
        checkpoint_to_resume(tmp_path, folder)
    assert checkpoint_to_resume(tmp_path, "auto")[0] is None


def test_a_manifest_that_is_no_file_or_cannot_be_read_has_a_reason(run, monkeypatch):
    folder = run / "checkpoint-2"

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert fault(folder) == "incomplete: its manifest.json cannot be read (Permission denied)"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_digest", refuse)
        assert fault(folder) == "damaged: 'README.md' cannot be read (Permission denied)"
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)  # reading it would wait for ever
    assert fault(folder) == "incomplete: its manifest.json is no file"


# ---- what the manifest must list ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*READ_ON_RESUMING, "training_state_0.pt", "rng_state.pth"])
def test_a_manifest_must_list_what_a_resumed_run_reads(run, name):
    """A file that lies there unlisted is not enough, as its bytes are unknown."""
    manifest = run / "checkpoint-2" / MANIFEST
    content = json.loads(manifest.read_text())
    del content["files"][name]
    manifest.write_text(json.dumps(content))
    assert fault(run / "checkpoint-2") == f"incomplete: its manifest.json lists no {name!r}"


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["training_state_0.pt", "training_state_1.pt", "rng_state_0.pth", "rng_state_1.pth"], None),
        (["training_state_0.pt", "rng_state_0.pth", "rng_state_1.pth"], "training_state_1.pt"),
        (["training_state_0.pt", "training_state_1.pt", "rng_state_0.pth"], "rng_state_1.pth"),
        (["training_state_0.pt", "training_state_1.pt", "rng_state.pth"], "rng_state_0.pth"),
    ],
)
def test_the_state_of_every_process_must_be_listed(tmp_path, names, missing):
    for name in (*READ_ON_RESUMING, *names):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    assert fault(tmp_path) == (missing and f"incomplete: its manifest.json lists no {missing!r}")


def test_a_checkpoint_of_the_model_alone_says_so(tmp_path, caplog):
    train(tmp_path, 1, save_only_model=True)
    reason = "incomplete: its manifest.json lists no 'optimizer.pt', as it was saved with `save_only_model`"
    with pytest.raises(ValueError, match=f"checkpoint-1 is {reason}; there is no good one to resume from"):
        train(tmp_path, 2, resume=str(tmp_path / "checkpoint-1"))
    assert checkpoint_to_resume(tmp_path, "auto") == (None, {tmp_path / "checkpoint-1": reason})


# ---- a save that fails ----------------------------------------------------------------------------------------------


def fail_at(monkeypatch, module, function: str, name: str, error: Exception) -> None:
    """Let a function write half of the file of this name in checkpoint-2 and raise, as on a full disk."""
    write = getattr(module, function)

    def full(*args, **kwargs):
        result = write(*args, **kwargs)
        path = next((Path(a) for a in args if isinstance(a, (str, Path)) and Path(a).name == name), None)
        if path is not None and path.parent.name == "checkpoint-2":
            os.truncate(path, path.stat().st_size // 2)
            raise error
        return result

    monkeypatch.setattr(module, function, full)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nframe #0: ...")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "function", "name", "error", "reason"),
    [
        (Path, "write_text", "README.md", FULL, "No space left on device"),
        (torch, "save", "optimizer.pt", TORCH, r"\[enforce fail .*:672\] . unexpected pos 576 vs 534"),
        (torch, "save", "training_state_0.pt", TORCH, r"\[enforce fail .*\] . unexpected pos 576 vs 534"),
        (checkpointed_trainer, "save_file", WEIGHTS, RUST, r"Error while serializing: .*\(os error 28\)"),
        (Path, "write_text", f"{MANIFEST}.part", FULL, "No space left on device"),
        (checkpoints, "_sync", "trainer_state.json", OSError(errno.EIO, os.strerror(errno.EIO)), "Input/output error"),
    ],
    ids=["the card", "the optimizer", "the state", "the weights", "the manifest", "the disk"],
)  # fmt: skip
def test_a_save_that_fails_says_why_and_leaves_older_checkpoints(
    tmp_path, monkeypatch, caplog, module, function, name, error, reason
):
    with monkeypatch.context() as patch:
        fail_at(patch, module, function, name, error)
        with pytest.raises(RuntimeError, match=rf"checkpoint-2 could not be written \({reason}; [\d.]+ MB are free "
                           r"there\): make room, .*; resume from .*checkpoint-1, the newest good one\.$"):  # fmt: skip
            train(tmp_path, 3, save_total_limit=1)
    assert f"Training broke off after 2 updates: what it has learned is in {tmp_path}" in caplog.text
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert fault(tmp_path / "checkpoint-1") is None
    assert train(tmp_path, 2, resume=True).global_step == 2


class Limit(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:  # no file may grow beyond it from here on, as if the disk were full
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(args.run_name), resource.RLIM_INFINITY))


def train_within_limits(folder: Path, *limits: str) -> None:
    torch.set_num_threads(1)
    for limit in limits:
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "run_name": limit}
        t = adjoint_matching(folder / limit, tiny_sd3(), **settings)
        t.add_callback(Limit())
        try:
            t.train()
        except RuntimeError as error:
            print("Refused:", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_files_that_cannot_grow_leave_the_older_checkpoint(tmp_path, trained):
    """The errors that torch and safetensors really raise: for the optimizer alone, and for the adapter too.

    The error is that of the checkpoint in both cases; the log says that the rest could not be kept whole either.
    """
    small, smaller = tmp_path / "20000", tmp_path / "5000"
    done = forked.call(train_within_limits, tmp_path, small.name, smaller.name)
    assert done.returncode == 0, done.stderr
    refusals = [line for line in done.stdout.splitlines() if line.startswith("Refused: ")]
    assert len(refusals) == 2
    kept = "Training broke off after 2 updates"
    said = " ".join(done.stderr.split())  # long messages go on in the next line
    for folder in (small, smaller):
        assert f"{kept}, and not all that it leaves could be written to {folder}: " in said
    assert len(load_file(small / ADAPTER)) == len(
        load_file(trained / "checkpoint-1" / ADAPTER)
    )  # the curve was larger
    assert not (smaller / ADAPTER).exists()
    for folder, refusal in zip((small, smaller), refusals, strict=True):
        assert refusal.startswith(f"Refused: {folder / 'checkpoint-2'} could not be written (")
        assert refusal.endswith(f"resume from {folder / 'checkpoint-1'}, the newest good one.")
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
        assert train(folder, 2, resume=True).global_step == 2
        assert_went_on_exactly(folder, trained)


class FillDisk(TrainerCallback):
    """After the second update, leaves some bytes of the disk free."""

    def __init__(self, left: int) -> None:
        self.left = left

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            room = os.statvfs(args.output_dir).f_bavail * os.statvfs(args.output_dir).f_frsize
            (Path(args.output_dir) / "filling").write_bytes(b"0" * (room - self.left))


def train_on_a_small_disk(folder: str, left: int) -> None:
    """Mounts a file system of 2 MB, which only this process sees, and trains there until it is full."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, private = 0x10000000, 0x00020000, 0x44000
    user = os.geteuid()
    assert libc.unshare(new_mounts | (new_user if user else 0)) == 0, os.strerror(ctypes.get_errno())
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    assert libc.mount(b"none", b"/", None, private, None) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=2m") == 0, os.strerror(ctypes.get_errno())
    t = adjoint_matching(folder, tiny_sd3(), save_strategy="steps", save_steps=1, max_steps=3)
    t.add_callback(FillDisk(left))
    try:
        t.train()
    except RuntimeError as error:
        print("Refused:", error)
    print(
        "Left:", sorted(path.name for path in Path(folder).glob("checkpoint-*")), fault(Path(folder) / "checkpoint-1")
    )


@pytest.mark.parametrize("left", [0, 8192, 40960])
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, left):
    done = forked.call(train_on_a_small_disk, str(tmp_path), left)
    assert done.returncode == 0, done.stderr
    refusal, rest = done.stdout.splitlines()[-2:]
    assert refusal.startswith(f"Refused: {tmp_path / 'checkpoint-2'} could not be written (")
    assert refusal.endswith(f"resume from {tmp_path / 'checkpoint-1'}, the newest good one.")
    assert rest == "Left: ['checkpoint-1'] None"


def test_the_disk_has_everything_before_the_manifest(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    (folder / "critic").mkdir(parents=True)
    (folder / "weights").write_bytes(b"some bytes")
    (folder / "critic" / "weights").write_bytes(b"more bytes")
    (folder / f"{MANIFEST}.part").write_text("of an attempt before")
    events = []

    def note(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    replace = Path.replace
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("replace"), replace(path, target)))
    write_manifest(folder)
    before, after = events[: events.index("replace")], events[events.index("replace") + 1 :]
    part = folder / f"{MANIFEST}.part"
    assert set(before) == {folder / "weights", folder / "critic" / "weights", folder / "critic", part, folder}
    assert before.index(folder) > before.index(part)
    assert after == [folder, tmp_path]
    assert set(json.loads((folder / MANIFEST).read_text())["files"]) == {"weights", "critic/weights"}


# ---- what the Hub has -----------------------------------------------------------------------------------------------

PUSH_AND_GO_ON = """
import sys
from pathlib import Path
import torch
from huggingface_hub import HfApi, hf_hub_download
from tests.helpers import adjoint_matching
from tests.tiny import tiny_sd3

torch.set_num_threads(1)
folder = Path(sys.argv[1])
settings = dict(save_strategy="steps", save_steps=1)
for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
    repository = f"somebody/{strategy}"
    t = adjoint_matching(
        folder / strategy, tiny_sd3(), max_steps=2, push_to_hub=True, hub_model_id=repository, hub_strategy=strategy,
        hub_token="hf_of_a_test", hub_always_push=True, save_total_limit=2, **settings
    )
    t.train()
    t._finish_current_push()
    t.push_to_hub()
    copied = folder / f"{strategy} downloaded"
    for file in HfApi().model_info(repository).siblings:
        in_cache = hf_hub_download(repository, file.rfilename)  # a link
        hf_hub_download(repository, file.rfilename, local_dir=copied)
    cached = next(path for path in Path(in_cache).parents if path.parent.name == "snapshots")
    names = sorted(path.name for path in copied.glob("*checkpoint*"))
    print(strategy, *names)
    for number, path in enumerate([cached / names[-1], copied / names[-1]] if names else [copied]):
        again = adjoint_matching(folder / f"{strategy} {number}", tiny_sd3(), max_steps=3, **settings)
        try:
            print("resumed to", again.train(resume_from_checkpoint=str(path)).global_step, again._counter.updates)
        except ValueError as error:
            print(str(error).replace(str(folder), ""))
"""


@pytest.mark.slow
def test_what_each_strategy_of_the_hub_leaves(tmp_path):
    with serve() as hub:
        done = run_against(PUSH_AND_GO_ON, hub.address, tmp_path / "home", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if " left" not in line and " in 00:0" not in line] == [
        "end",
        "/end downloaded is incomplete: it has no manifest.json; there is no good one to resume from.",
        "every_save",
        "/every_save downloaded is incomplete: it has no manifest.json; there is no good one to resume from.",
        "checkpoint last-checkpoint",
        "resumed to 3 1",
        "resumed to 3 1",
        "all_checkpoints checkpoint-1 checkpoint-2",
        "resumed to 3 1",
        "resumed to 3 1",
    ]
