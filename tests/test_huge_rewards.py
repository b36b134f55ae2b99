"""Rewards up to the largest float32 give finite updates."""

import re

import pytest
import torch
from datasets import Dataset

import flowrl_trainers
from flowrl_trainers.flow import advantages
from flowrl_trainers.rewards import differentiable

from .gaussian import GaussianFlow, Shifted
from .helpers import TRAINERS, update_rows

HUGE = [1e30, torch.finfo(torch.float32).max]


@pytest.mark.parametrize("size", HUGE)
def test_the_advantages_of_huge_rewards_are_those_of_small_ones(size):
    small = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    groups = torch.tensor([0, 0, 1, 1])
    for scale in ("batch", "group"):
        found = advantages.step_advantages(size * small[:, None].expand(4, 3), groups, "final", scale)[:, :1]
        torch.testing.assert_close(found, small[:, None], atol=2e-4, rtol=0)
    torch.testing.assert_close(advantages.shape_rewards(size * small, groups, 5.0), small, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_huge_reward_gives_a_finite_update(tmp_path, trainer, size):
    @differentiable
    def huge(images, prompts, **columns):
        return size * torch.tanh(images[:, 0] - 0.3)

    cls = getattr(flowrl_trainers, trainer)
    config = cls.config_class(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, num_inference_steps=3,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **({"num_generations": 1} | TRAINERS[trainer]),
    )  # fmt: skip
    t = cls(GaussianFlow(Shifted(), 2), huge, config, Dataset.from_dict({"prompt": list("abcdefgh")}))
    try:
        t.train()
    except (RuntimeError, ValueError) as error:
        known = "is not finite in float32|Nothing that the first rollout computed is finite.*rewards"
        assert re.search(known, str(error))  # noqa: PT017
        return
    for row in update_rows(t):
        assert all(torch.isfinite(torch.tensor(v)) for k, v in row.items() if not k.startswith("reward")), row
    assert any(float(p.abs()) > 0 for p in t.trained_parameters() if p.dim() == 0)
