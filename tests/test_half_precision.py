"""float16 with loss scaling: what it learns, and what an update without gradients or with an overflow does."""

import math
from unittest.mock import patch

import pytest
import torch

from flowrl_trainers.trainers.loss_scaling import LossScaler

from .helpers import TRAINERS, constant, make_trainer, update_rows


def adapter(t) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for n, p in t.model.named_parameters() if "lora_B" in n])


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_learns_in_float16_what_it_learns_in_float32(tmp_path, name):
    """The network meets float16 (patched: its output before it is made float32), weights, states and targets are
    float32. Adam moves each parameter by about the learning rate in the direction of its gradient's sign: where the
    signs agree, so do the adapters. AC-Flow's first update is its critic's warm-up, which has no gradients.
    """
    learned, met, updates = [], set(), 2 if name == "ACFlowTrainer" else 1
    plain = torch.nn.Linear.forward

    def forward(layer, x):
        y = plain(layer, x)
        met.add(y.dtype)
        return y

    for half in (False, True):
        settings = {"learning_rate": 0.01, "max_steps": updates, "height": 16, "width": 16}
        t = make_trainer(name, tmp_path / str(half), fp16=half, **settings)
        met.clear()
        with patch.object(torch.nn.Linear, "forward", forward):
            t.train()
        assert (torch.float16 in met) is half
        rows = update_rows(t)
        assert all(math.isfinite(row["loss"]) and row["skipped_updates"] == 0 for row in rows)
        assert {p.dtype for p in t.trained_parameters()} == {torch.float32}
        learned.append(adapter(t))
    assert t.accelerator.scaler.get_scale() == 2.0**16
    assert float(torch.cosine_similarity(*learned, dim=0)) > 0.9
    assert not torch.equal(*learned)


def test_the_first_ratio_is_one_in_float16(tmp_path):
    """Rollout and replay are computed in the same precision, and log-probabilities in float32 of both."""
    t = make_trainer("TAFSGRPOTrainer", tmp_path, fp16=True, max_steps=1)
    t.train()
    (row,) = update_rows(t)
    assert row["replay_ratio_error"] < 1e-4


@pytest.mark.parametrize("name", ["ACFlowTrainer", "DiffusionNFTTrainer", "TAFSGRPOTrainer"])
def test_an_update_without_signal_passes(tmp_path, name):
    """All images earn the same: nothing is learned, learning rates move on, and the scale stays."""
    quiet = {"beta": 0.0} if name == "TAFSGRPOTrainer" else {}  # its other term would go on without rewards
    t = make_trainer(name, tmp_path, reward=constant, fp16=True, lr_scheduler_type="linear", **quiet)
    t.train()
    assert not adapter(t).any()
    assert set(t.lr_scheduler.get_last_lr()) == {0.0}
    assert t.accelerator.scaler.get_scale() == 2.0**16


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_overflow_skips_the_update_and_halves_the_scale(tmp_path, max_grad_norm):
    """2^126 times the loss overflows float16; the scale falls until nothing does."""
    t = make_trainer("AdjointMatchingTrainer", tmp_path, fp16=True, max_grad_norm=max_grad_norm)
    t.accelerator.scaler = LossScaler("cpu", init_scale=2.0**126)
    t.train()
    assert [row["skipped_updates"] for row in update_rows(t)] == [1.0, 1.0]
    assert t.accelerator.scaler.get_scale() == 2.0**124
    assert not adapter(t).any()


def test_the_scale_is_resumed(tmp_path):
    """It doubles at every update, and the resumed run learns what the uninterrupted one does."""
    settings = {"fp16": True, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01}
    t = make_trainer("AdjointMatchingTrainer", tmp_path, **settings)
    t.accelerator.scaler = LossScaler("cpu", growth_interval=1)
    t.train()
    again = make_trainer("AdjointMatchingTrainer", tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.accelerator.scaler.get_scale() == t.accelerator.scaler.get_scale() == 2.0**18
    assert torch.equal(adapter(again), adapter(t))
    assert adapter(t).any()
