"""How the images of an update are dealt to micro-steps changes nothing. For every trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch

import flowrl_trainers
from flowrl_trainers.flow import dynamics, vector_jacobian_product
from flowrl_trainers.trainers import vgg_flow_trainer

from .helpers import TRAINERS, make_trainer, update_rows


def trained(
    folder: Path, name: str, size: int, accumulation: int, **settings
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """By how much an update of eight images changes what is trained, heads too; or two where the first is a critic's
    warm-up.
    """
    t = make_trainer(
        name, folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, num_generations=2,
        optim="sgd", learning_rate=1.0, max_steps=2 if name == "ACFlowTrainer" else 1, height=16, width=16,
        **settings,
    )  # fmt: skip
    if name == "ACFlowTrainer" and t.critic is not None:
        # The rewards of a rollout add up to 0, so that the gradient of the critic's last bias is rounding at first. An
        # epsilon of the size of gradients keeps Adam from making a whole step of it.
        t.critic_optimizer.param_groups[0]["eps"] = 1e-2
    before = {n: p.detach().clone() for n, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    after = dict(t.model.named_parameters())
    return {n: after[n].detach() - start for n, start in before.items()}, update_rows(t)


@pytest.mark.parametrize("name", TRAINERS)
def test_eight_images_at_once_and_one_by_one_make_the_same_update(tmp_path, name):
    """Equal but for the order of sums in float32: `SGD` hands the gradient on as it is."""
    assert_same_but_for_rounding(trained(tmp_path, name, 8, 1), trained(tmp_path, name, 1, 8))


def assert_same_but_for_rounding(one: tuple[dict, list], other: tuple[dict, list]) -> None:
    """Changes within a thousandth of the largest, which is what is left of a sum of products in float32."""
    (whole, rows), (parts, others) = one, other
    assert whole.keys() == parts.keys()
    moved = max(float(change.abs().max()) for name, change in whole.items() if "lora_" in name)
    assert moved > 0
    for parameter, change in whole.items():
        torch.testing.assert_close(change, parts[parameter], atol=1e-3 * moved, rtol=1e-3)
    for row, other in zip(rows, others, strict=True):
        for key in ("grad_norm", "reward", "reward/redness"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-7), key
        # The terms of a policy's loss, which are of the order of 1, cancel: what is left is their rounding.
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", TRAINERS)
def test_larger_batches_without_gradients_change_nothing_but_rounding(tmp_path, monkeypatch, name):
    """Eight images in micro-batches of two are drawn six and two at a time; TAFS-GRPO draws as its loss replays.

    Its guard stops a run whose replay differs from the rollout by more than 1e-6; its base model sees six at a time.
    Without a critic, whose Adam would amplify the rounding of rewards.
    """
    settings = {"critic": "none"} if name == "ACFlowTrainer" else {}
    drawn, asked = [], []
    trainer = getattr(flowrl_trainers, name)
    rollout, condition = trainer.rollout, trainer.condition

    def watched_rollout(self, conditioning, keys):
        drawn.append(len(keys))
        return rollout(self, conditioning, keys)

    def watched_condition(self, examples):
        asked.append(len(examples))
        return condition(self, examples)

    monkeypatch.setattr(trainer, "rollout", watched_rollout)
    monkeypatch.setattr(trainer, "condition", watched_condition)
    small = trained(tmp_path, name, 2, 4, **settings)
    assert set(drawn) == {2}
    drawn.clear()
    asked.clear()
    large = trained(tmp_path, name, 2, 4, rollout_batch_size=6, **settings)
    assert set(drawn) == ({2} if name == "TAFSGRPOTrainer" else {6, 2})
    assert 6 in asked
    assert_same_but_for_rounding(small, large)


def test_a_rollout_batch_holds_whole_micro_batches(tmp_path):
    sentence = r"`rollout_batch_size` \(6\) must be a multiple of `per_device_train_batch_size` \(4\)"
    with pytest.raises(ValueError, match=sentence):
        make_trainer("ACFlowTrainer", tmp_path, rollout_batch_size=6)


@pytest.mark.parametrize(("product_batch_size", "sizes"), [(None, {6, 2}), (4, {4}), (2, {2})])
@pytest.mark.parametrize("name", ["AdjointMatchingTrainer", "VGGFlowTrainer"])
def test_products_are_taken_so_many_at_a_time(tmp_path, monkeypatch, name, product_batch_size, sizes):
    """As many as are drawn unless a setting says otherwise; all else is the same but for rounding."""
    taken = []

    def watched(velocity, x, sigma, vector):
        taken.append(len(x))
        return vector_jacobian_product(velocity, x, sigma, vector)

    for module in (dynamics, vgg_flow_trainer):
        monkeypatch.setattr(module, "vector_jacobian_product", watched)
    small = trained(tmp_path, name, 2, 4)
    assert set(taken) == {2}
    taken.clear()
    large = trained(tmp_path, name, 2, 4, rollout_batch_size=6, product_batch_size=product_batch_size)
    assert set(taken) == sizes
    assert_same_but_for_rounding(small, large)


def test_products_are_of_whole_micro_batches_and_of_a_value_network(tmp_path):
    sentence = r"`product_batch_size` \(6\) must be a multiple of `per_device_train_batch_size` \(4\)"
    with pytest.raises(ValueError, match=sentence):
        make_trainer("AdjointMatchingTrainer", tmp_path, product_batch_size=6)
    sentence = r"`product_batch_size` \(4\) has no effect without a value network"
    with pytest.raises(ValueError, match=sentence):
        make_trainer("VGGFlowTrainer", tmp_path, product_batch_size=4, value_network="none")
