"""A killed run goes on bit for bit, for every trainer; `test_damaged_checkpoints.py` has what cannot be trusted."""

import signal
from pathlib import Path

import pytest
import torch

from flowrl_trainers.run_folder.checkpoints import (
    MANIFEST,
    READ_ON_RESUMING,
    checkpoint_to_resume,
    fault,
    write_manifest,
)

from .helpers import FORMS
from .runs import WINDOW, assert_same, run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The result of each trainer's run that nobody disturbed, made once."""
    results = {}

    def result(trainer: str, updates: int):
        if (trainer, updates) not in results:
            folder = tmp_path_factory.mktemp(trainer)
            done = run(folder, trainer, WINDOW | {"max_steps": updates, "save_strategy": "no"})
            assert done.returncode == 0, done.stderr
            results[trainer, updates] = torch.load(folder / "result.pt")
        return results[trainer, updates]

    return result


@pytest.mark.parametrize("trainer", FORMS)
@pytest.mark.parametrize(
    ("kill_at", "updates"),
    [
        pytest.param(3, 8, id="middle of a window"),
        pytest.param(4, 12, id="between windows", marks=pytest.mark.slow),
        pytest.param(10, 12, id="middle of a window of the second epoch", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted, trainer, kill_at, updates):
    settings = WINDOW | {"max_steps": updates, "save_steps": kill_at}
    killed = run(tmp_path, trainer, settings, kill_at=kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "result.pt").exists()
    assert fault(tmp_path / f"checkpoint-{kill_at}") is None
    resumed = run(tmp_path, trainer, settings, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    result, expected = torch.load(tmp_path / "result.pt"), uninterrupted(trainer, updates)
    assert_same(result["weights"], expected["weights"])
    assert_same(result["optimizer"], expected["optimizer"])
    assert_same(result["state"], expected["state"])  # the moving average; reward scale, or critic and its optimizer
    rewards = [
        [(row["step"], row["reward/redness"]) for row in r["history"] if "reward/redness" in row]
        for r in (result, expected)
    ]
    assert len(rewards[1]) == updates // 4  # updates 1, 5 and 9 make rollouts
    assert rewards[0] == rewards[1]
    losses = [[(row["step"], row["loss"]) for row in r["history"] if "loss" in row] for r in (result, expected)]
    assert len(losses[1]) == updates
    assert losses[0] == losses[1]


def test_an_incomplete_checkpoint_is_passed_over_and_a_damaged_one_that_is_named_refused(tmp_path):
    name = "AdjointMatchingTrainer"
    config = WINDOW | {"max_steps": 4, "save_steps": 2}
    assert run(tmp_path, name, config).returncode == 0
    (tmp_path / "checkpoint-4" / MANIFEST).unlink()
    resumed = run(tmp_path, name, config | {"max_steps": 3}, resume=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "Passed over" in resumed.stderr
    assert "checkpoint-4, which is incomplete" in resumed.stderr

    weights = tmp_path / "checkpoint-2" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    refused = run(tmp_path, name, config, resume=str(tmp_path / "checkpoint-2"))
    assert refused.returncode != 0
    assert "checkpoint-2 is damaged: 'optimizer.pt' has other bytes than those that were saved;" in refused.stderr
    assert "checkpoint-3, the newest good one" in refused.stderr


def test_a_resumed_run_must_deal_its_images_as_before(tmp_path):
    name = "AdjointMatchingTrainer"
    assert run(tmp_path, name, WINDOW | {"max_steps": 2}).returncode == 0
    for changes, sentence in (
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
            "was saved with per_device_train_batch_size 2, but this run has 4",
        ),
        ({"reward_weights": [2.0]}, "was saved with reward_weights [1.0], but this run has [2.0]"),
        ({"guidance_scale": 4.0}, "was saved with guidance_scale 1.0, but this run has 4.0"),
    ):
        refused = run(tmp_path, name, WINDOW | changes, resume=True)
        assert refused.returncode != 0
        assert sentence in refused.stderr


# ---- the manifest ---------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir()
    for name in ("weights", "training_state_0.pt", "rng_state.pth", *READ_ON_RESUMING):
        (folder / name).write_bytes(b"some bytes")
    write_manifest(folder)
    return folder


def test_the_fault_of_a_checkpoint(tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    assert fault(folder) is None
    (folder / "weights").write_bytes(b"same bytes")
    assert fault(folder) == "damaged: 'weights' has other bytes than those that were saved"
    (folder / "weights").unlink()
    assert fault(folder) == "damaged: 'weights' is missing"
    (folder / MANIFEST).unlink()
    assert fault(folder) == "incomplete: it has no manifest.json"


def test_the_newest_complete_checkpoint_is_taken_by_number(tmp_path):
    for number in (2, 10, 9):
        make_checkpoint(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-11").mkdir()
    faults = {tmp_path / "checkpoint-11": "incomplete: it has no manifest.json"}
    assert checkpoint_to_resume(tmp_path, True) == (tmp_path / "checkpoint-10", faults)


def test_nothing_to_resume_from_is_said(tmp_path):
    with pytest.raises(
        ValueError, match="holds no complete checkpoint to resume from: resume from 'auto' to begin anew there"
    ):
        checkpoint_to_resume(tmp_path, True)
    with pytest.raises(ValueError, match=r"checkpoint-7 is incomplete: there is no such folder; there is no good one"):
        checkpoint_to_resume(tmp_path, tmp_path / "checkpoint-7")
