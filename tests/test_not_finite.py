"""A reward, a velocity or a gradient that is not finite costs its sample or its update, is counted, and ends a run of
too many.
"""

import math

import pytest
import torch
from transformers import TrainerCallback

from flowrl_trainers.rewards import differentiable
from flowrl_trainers.sampling.buffer import MicroBatch, Record
from flowrl_trainers.sampling.draws import ImageKey
from flowrl_trainers.sampling.metric_log import MetricLog
from flowrl_trainers.sampling.prompt_groups import Example
from flowrl_trainers.trainers.loop_callback import LoopCallback

from .helpers import adjoint_matching, constant, first_rollout, redness, update_rows
from .tiny import tiny_sd3


def flaky(bad_calls: set[int]):
    """Redness, but not a number for the first image of the calls listed; the probe is call 0."""
    calls = iter(range(1000))

    def reward(images, prompts, **columns):
        scores = redness(images=images, prompts=prompts)
        if next(calls) in bad_calls:
            scores = torch.cat([scores[:1] * math.nan, scores[1:]])
        return scores

    return differentiable(reward)


def test_a_sample_that_is_not_finite_is_left_out_and_counted(tmp_path):
    """Two images, the first of which is lost: the update is that of the other alone, at half weight."""
    settings = {
        "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_bad_sample_share": 0.5,
        "reward_gradient_clip_quantile": None, "adjoint_clip_quantile": None,  # which look at all images
    }  # fmt: skip
    t = adjoint_matching(tmp_path / "alone", tiny_sd3(), **settings)
    losses = t.micro_batch_losses
    t.micro_batch_losses = lambda *arguments: losses(*arguments) * torch.tensor([0.0, 1.0])
    t.train()
    alone = [p.detach().clone() for p in t.trained_parameters()]
    t = adjoint_matching(tmp_path / "flaky", tiny_sd3(), reward=flaky({1}), **settings)
    t.train()
    (row,) = update_rows(t)
    assert row["bad_samples/reward_gradient"] == 0.5
    assert row["skipped_updates"] == 0
    assert math.isfinite(row["reward/reward"])
    moved = max(float(p.detach().abs().max()) for n, p in t.model.named_parameters() if "lora_B" in n)
    assert moved > 0
    for parameter, expected in zip(t.trained_parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-3 * moved, rtol=1e-5)


def test_an_image_whose_velocity_is_not_finite_is_left_out_and_does_not_spoil_the_scale(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, reward_scale=None, max_bad_sample_share=0.5)
    velocity = t.flow.velocity

    def poisoned(transformer, latents, sigma, conditioning, *, guidance):
        v = velocity(transformer, latents, sigma, conditioning, guidance=guidance)
        if torch.is_grad_enabled() and t.sampler is not None and not transformer.training:  # the adjoint's calls
            v = torch.cat([v[:1] * math.nan, v[1:]])
        return v

    t.flow.velocity = poisoned
    _, (batch,) = first_rollout(t)
    assert batch.good.tolist() == [False, True]
    assert all(value.isfinite().all() for value in batch.record.tensors())
    assert 0 < t.reward_scale < 1e6


def test_too_many_bad_samples_end_the_run(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, reward=flaky({2}), max_bad_sample_share=0.4)
    with pytest.raises(
        RuntimeError,
        match=r"The reward_gradient is not finite in float32 for 50 % of the samples, more than `max_bad_sample_share` \(0.4\)",
    ):
        t.train()
    assert t.state.global_step == 1


def test_an_update_whose_gradient_is_not_finite_is_skipped(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, max_steps=3, save_strategy="no")
    losses, calls = t.micro_batch_losses, iter(range(100))

    def poisoned(*args):
        value = losses(*args)
        return value + torch.sqrt(value * 0) if next(calls) in (3, 4, 5) else value  # finite, but its gradient is not

    t.micro_batch_losses = poisoned
    before = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            before.append([p.detach().clone() for p in t.trained_parameters()])

    t.add_callback(Watch())
    t.train()
    assert [r["skipped_updates"] for r in update_rows(t)] == [0, 1, 0]
    assert all(torch.equal(a, b) for a, b in zip(before[0], before[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before[1], before[2], strict=True))


def images(count: int) -> MicroBatch:
    examples = [Example(ImageKey(row, 0, 0), "a cat", {}) for row in range(count)]
    return MicroBatch(examples, Record(), torch.ones(count, dtype=torch.bool))


def test_what_has_no_score_has_no_part_in_the_reward(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline)
    t.log_rewards(torch.tensor([[-2.0], [math.nan], [-4.0], [math.inf]]), [images(4)])
    assert t.rollout_reward == -3.0
    assert t.metrics.noted["reward/redness"] == [-3.0]
    t.log_rewards(torch.tensor([[math.nan], [math.nan]]), [images(2)])
    assert t.rollout_reward is None  # not 0, which may be more than any reward is
    assert t.metrics.noted["reward"] == [-3.0]


def test_constant_rewards_are_named(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline, reward=differentiable(constant), reward_scale=None)
    with pytest.raises(ValueError, match="gradient is zero on the whole first rollout"):
        t.train()


@pytest.mark.parametrize(("value", "skipped"), [(3e38, 0.0), (math.inf, 1.0), (-math.inf, 1.0), (math.nan, 1.0)])
def test_one_number_of_one_gradient_decides(value, skipped):
    """A gradient of 3e38 is finite, though its square is not."""
    network, metrics = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)), MetricLog()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    network[1].weight.grad[1, 2] = value
    callback = LoopCallback(None, network, metrics, None, lambda: None, bool)
    callback.on_pre_optimizer_step(None, None, None)
    assert metrics.noted == {"skipped_updates": [skipped]}
    assert all((parameter.grad is None) == bool(skipped) for parameter in network.parameters())


def test_notes_are_copies_and_nan_may_say_that_there_is_no_number():
    """Tensors are read when they are logged: of any type, and as they were when they were noted."""
    metrics, value = MetricLog(), torch.tensor([0.1])
    metrics.note("a", value)
    value.zero_()
    metrics.note("a", 2)
    metrics.note("a", torch.tensor(3))
    metrics.note("b", torch.tensor(math.nan), unless_nan=True)
    metrics.note("c", torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    assert metrics.noted == metrics.state_dict() == {"a": [float(torch.tensor(0.1)), 2.0, 3.0], "c": [0.1]}
    metrics.note("b", torch.tensor(5.0), unless_nan=True)
    assert metrics.means()["b"] == 5
