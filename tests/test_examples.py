"""What users are shown as a start works as it stands: a model of their own, and an algorithm of their own."""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from flowrl_trainers import FlowRLConfig, FlowRLTrainer
from flowrl_trainers.flow import euler_step
from flowrl_trainers.sampling.buffer import Record

from .forked import script
from .gaussian import NUMBERED, GaussianFlow, Shifted, height

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_model.py"


@pytest.mark.slow
def test_a_model_of_ones_own_is_tuned_by_all_trainers(tmp_path):
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) < 60
    done = script(EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+)  base (\S+)  tuned (\S+)", done.stdout, flags=re.M)
    assert [name for name, _, _ in rows] == ["AdjointMatching", "VGGFlow", "ACFlow", "DiffusionNFT", "TAFSGRPO"]
    assert all(float(tuned) > float(base) + 0.3 for _, base, tuned in rows)


@dataclass(frozen=True)
class Drawn(Record):
    images: torch.Tensor


@dataclass(frozen=True)
class Weighted(Record):
    images: torch.Tensor
    weights: torch.Tensor


class BestOfGroupTrainer(FlowRLTrainer[Drawn, Weighted]):
    """An algorithm in three methods: flow matching on the best image of each prompt."""

    _name = "Best of group"
    _tag_names = ["best-of-group"]  # noqa: RUF012
    _paper = {"title": "none", "id": "0000.00000"}  # noqa: RUF012
    num_trained_states = 2

    record_class = Weighted

    def rollout(self, conditioning, keys):
        latents = self.initial_latents(keys)
        for sigma, sigma_next in pairwise(self.sigmas):
            velocity = self.model(latents, sigma.expand(len(latents)), conditioning, guidance=True)
            latents = euler_step(latents, velocity, sigma, sigma_next)
        return Drawn(latents)

    def prepare(self, rollout):
        return [self._weighted(batch) for batch in rollout]

    def _weighted(self, batch):
        scores = self.scorer.score(batch.record.images, batch.examples)
        self.log_rewards(scores, [batch])
        groups = scores.sum(dim=1).unflatten(0, (-1, self.args.num_generations))
        weights = (groups == groups.amax(dim=1, keepdim=True)).float().flatten()
        return batch.with_record(Weighted(batch.record.images, weights))

    def micro_batch_losses(self, model, batch, conditioning, state):
        data = batch.record.images
        noise, sigma = torch.randn_like(data), torch.rand(len(data))
        x = (1 - sigma[:, None]) * data + sigma[:, None] * noise
        error = (model(x, sigma, conditioning, guidance=True) - (noise - data)).square().mean(dim=1)
        return batch.record.weights * error


def test_an_algorithm_of_ones_own_is_three_methods(tmp_path):
    config = FlowRLConfig(
        output_dir=str(tmp_path), max_steps=30, per_device_train_batch_size=64, num_generations=8, learning_rate=0.05,
        report_to="none", save_steps=10, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    t = BestOfGroupTrainer(GaussianFlow(Shifted(), 1), height, config, NUMBERED, eval_dataset=NUMBERED)
    t.train()
    t.evaluate()
    assert t.rows["tuned"]["reward/height"] > t.rows["base"]["reward/height"] + 0.5
    t.save_model()
    assert "Method: Best of group" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "checkpoint-30" / "manifest.json").exists()
