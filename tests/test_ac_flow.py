"""The AC-Flow trainer on Gaussian flows: critic and actor against their closed forms, and the facts that were derived
of them.

Data x ~ N(0, 1) in one dimension, reward r = x, states z = (1 - sigma) x + sigma e. So E[x | z] = b z with b = (1 -
sigma) / m and Var(x | z) = sigma^2 / m, where m = (1 - sigma)^2 + sigma^2.
"""

import io
import json
import math
from unittest.mock import patch

import pytest
import torch
from torch import nn

from flowrl_trainers import ACFlowConfig
from flowrl_trainers.flow import (
    advantage_weights,
    compare_within_groups,
    explained_variance,
    interpolate,
    shape_rewards,
    shift_sigmas,
    uniform_sigmas,
)
from flowrl_trainers.networks import ConvCritic, MLPCritic, critic
from flowrl_trainers.run_folder.gallery import to_pillow
from flowrl_trainers.sampling.buffer import MicroBatch
from flowrl_trainers.sampling.draws import ImageKey
from flowrl_trainers.trainers.ac_flow_trainer import ACFlowRecord
from flowrl_trainers.trainers.estimate_fit import EstimateFit
from flowrl_trainers.trainers.renoising_trainer import Returns

from .ac_flow import Velocities, ac_flow, drawn_images, exact_images
from .gaussian import NUMBERED
from .helpers import first_rollout, make_trainer, update_rows

# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_rewards_are_centred_in_their_group_and_divided_by_the_spread_of_all():
    rewards = torch.tensor([1.0, 3.0, 10.0, 12.0, math.nan, 11.0])
    groups = torch.tensor([7, 7, 2, 2, 7, 2])
    spread = math.sqrt((1 + 1 + 1 + 1 + 0) / 5)
    expected = torch.tensor([-1, 1, -1, 1, 0, 0]) / (spread + 1e-4)
    torch.testing.assert_close(shape_rewards(rewards, groups, 5.0), expected)
    torch.testing.assert_close(shape_rewards(rewards, groups, 0.5), expected.clamp(-0.5, 0.5))


@pytest.mark.parametrize("value", [0.1, 0.7, 21.37, -85.3, 1234.567])
@pytest.mark.parametrize("size", [8, 12, 24])
def test_equal_rewards_teach_exactly_nothing(value, size):
    """In float32 the mean of equal numbers is another number, which a spread near zero would blow up."""
    rewards, groups = torch.tensor([value, 3 * value]).repeat_interleave(size), torch.arange(2).repeat_interleave(size)
    assert (shape_rewards(rewards, groups, math.inf) == 0).all()
    assert (shape_rewards(rewards, groups, math.inf, "raw") == 0).all()
    for scale in ("batch", "group", "none"):
        assert (compare_within_groups(rewards[:, None], groups, scale) == 0).all()


def test_a_group_whose_images_are_alike_is_not_blown_up():
    rewards = torch.tensor([1.0, 1.0 + 1e-6, 0.0, 4.0])
    shaped = shape_rewards(rewards, torch.tensor([0, 0, 1, 1]), 5.0)
    assert shaped[:2].abs().max() < 1e-5
    assert shape_rewards(torch.ones(4), torch.tensor([0, 0, 1, 1]), 5.0).abs().max() == 0


def test_the_weightings():
    a = torch.tensor([-1.0, 0.0, 2.0])
    torch.testing.assert_close(advantage_weights(a, "exponential", 2.0), torch.exp(a / 2))
    torch.testing.assert_close(advantage_weights(a, "softplus", 2.0), torch.log(1 + torch.exp(a / 2)))
    assert advantage_weights(a, "positive", 2.0).tolist() == [0, 0, 2]
    assert advantage_weights(a, "indicator", 2.0).tolist() == [0, 0, 1]
    assert advantage_weights(a, "linear", 2.0).tolist() == [-0.5, 0, 1]


def test_explained_variance_is_that_of_a_regression():
    values = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 4.0]])
    predictions = torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.5, 4.0]])
    torch.testing.assert_close(explained_variance(values, predictions), torch.tensor([0.75, 1.0]))
    assert explained_variance(torch.ones(3, 1), torch.rand(3, 1)).isnan().all()


def test_every_image_gets_one_state_of_each_bin_and_its_own_noise(tmp_path):
    t = ac_flow(tmp_path, timestep_bins=5)
    batch = exact_images(t, 64)
    states, noise, sigma = t._renoised(batch, "actor")
    assert ((sigma * 5).floor() == torch.arange(5)).all()
    expected = interpolate(batch.record.final.repeat_interleave(5, 0), noise.flatten(0, 1), sigma.flatten())
    torch.testing.assert_close(states.flatten(0, 1), expected)
    part = MicroBatch(batch.examples[7:9], batch.record.map(lambda value: value[7:9]), batch.good[7:9])
    assert torch.equal(t._renoised(part, "actor")[0], states[7:9])
    assert not torch.equal(t._renoised(batch, "critic step 0")[1], noise)


def test_the_logit_normal_levels_are_those_of_stable_diffusion_3(tmp_path):
    """Their logits are standard normal: stratified draws in 50 bins have its mean and variance within 1 and 3 %."""
    t = ac_flow(tmp_path, timestep_bins=50, timestep_sampling="logit_normal")
    _, _, sigma = t._renoised(exact_images(t, 64), "actor")
    logits = torch.logit(sigma)
    assert abs(float(logits.mean())) < 0.01
    assert float(logits.var()) == pytest.approx(1.0, rel=0.03)


def test_the_levels_of_the_pipeline_lie_where_its_steps_do(tmp_path, monkeypatch):
    """As many between any two neighbouring steps of the sampler, of a scheduler with a shift of 3 here; so their mean
    is the trapezoids'.
    """
    t = ac_flow(tmp_path, timestep_bins=50, timestep_sampling="pipeline")
    monkeypatch.setattr(t.flow, "sigmas", lambda steps, spacing: shift_sigmas(uniform_sigmas(steps), 3.0))
    steps = t.args.num_inference_steps
    grid = shift_sigmas(uniform_sigmas(steps), 3.0)
    torch.testing.assert_close(t._levels(uniform_sigmas(steps)), grid, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        t._levels(torch.tensor([1 - 0.5 / steps])), (grid[:1] + grid[1:2]) / 2, atol=1e-6, rtol=0
    )
    _, _, sigma = t._renoised(exact_images(t, 64), "actor")
    assert float(sigma.mean()) == pytest.approx(float((grid[1:] + grid[:-1]).mean() / 2), rel=0.01)


# ---- the critic -----------------------------------------------------------------------------------------------------


def test_the_advantage_of_a_perfect_critic_lives_at_noisy_states(tmp_path):
    """D1: the advantage has mean 0 and variance Var(x | z) = sigma^2 / m, which falls towards the data; on the
    sampler's path it is 0.
    """
    t = ac_flow(tmp_path, given=Perfect(), timestep_bins=4)
    batch = exact_images(t, 20000)
    states, _, sigma = t._renoised(batch, "actor")
    advantages = batch.record.returns[:, None] - t._values(states, sigma, t.condition(batch.examples))
    expected = (sigma**2 / ((1 - sigma) ** 2 + sigma**2)).mean(dim=0)
    # Five standard errors: of a mean 5 / sqrt(20000), of a variance 5 sqrt(2 / 20000) of it.
    assert advantages.mean(dim=0).abs().max() < 0.036
    torch.testing.assert_close(advantages.var(dim=0), expected, rtol=0.05, atol=0)
    assert (expected[1:] > expected[:-1]).all()


class Perfect(nn.Module):
    """V* of the reward r = x."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, latents, sigma, prompt_features, prompt_mask):
        return (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * latents[:, 0] + 0 * self.unused


@pytest.mark.parametrize(("explained", "rollouts"), [
    ([0.0, 0.0, 0.2, 0.205, 0.19, 0.2, 0.9], 5),  # waits for a beginning, then for three without a rise of 0.01
    ([0.0] * 7, 6),  # the cap
    ([math.nan] * 7, 6),  # rollouts whose rewards are all equal tell nothing
])  # fmt: skip
def test_the_warm_up_ends_where_the_explained_variance_no_longer_rises(tmp_path, monkeypatch, explained, rollouts):
    """And the transformer is left alone until then."""
    found = iter(explained)
    monkeypatch.setattr(
        "flowrl_trainers.trainers.ac_flow_trainer.explained_variance",
        lambda values, predictions: torch.tensor([next(found)]),
    )
    network, rows = Velocities(), []
    t = ac_flow(tmp_path, network, given=Perfect(), critic_warmup_max_steps=6, max_steps=7, learning_rate=0.1)
    step = t.training_step

    def watched(*args, **kwargs):
        out = step(*args, **kwargs)
        rows.append((t.warmup.running, network.coefficients.grad is not None))
        return out

    t.training_step = watched
    t.train()
    assert t.warmup.rollouts == rollouts
    assert rows == [(True, False)] * rollouts + [(False, True)] * (7 - rollouts)


def test_a_run_that_ends_in_the_warm_up_says_so(tmp_path, caplog):
    ac_flow(tmp_path, given=Perfect(), critic_warmup_max_steps=6, max_steps=2).train()
    assert "The run ended while the critic still warmed up, which takes 6 rollouts at most" in caplog.text


def test_an_image_that_is_not_finite_does_not_stop_the_critic(tmp_path):
    t = ac_flow(
        tmp_path,
        critic="convolutional",
        max_bad_sample_share=0.5,
        reward=lambda images, prompts, **columns: [1.0] * len(images),
    )
    drawn = drawn_images(t, 64)
    drawn.record.final[3] = math.nan
    (batch,) = t._shape([drawn])
    assert not batch.good[3]
    assert batch.good.sum() == 63
    before = [p.detach().clone() for p in t.critic.parameters()]
    t._critic_step([batch], "critic step 0")
    assert any(not torch.equal(p, q) for p, q in zip(before, t.critic.parameters(), strict=True))
    assert all(p.isfinite().all() for p in t.critic.parameters())


def test_images_without_a_reward_have_no_part_in_the_mean_weight(tmp_path):
    t = ac_flow(tmp_path, weighting="positive", normalize_weights=True, timestep_bins=1)
    good = torch.arange(64) % 2 == 1
    weights = t._weights(torch.where(good, 2.0, 100.0)[:, None], good)
    assert weights[1] == 1.0


# ---- the actor ------------------------------------------------------------------------------------------------------


def weighted_regression(z: float, sigma: float, weight, alpha: float) -> float:
    """(E[w | z] u_w + alpha v_base) / (E[w | z] + alpha) by quadrature over x | z ~ N(b z, sigma^2 / m); weight: of x
    and z.
    """
    m = (1 - sigma) ** 2 + sigma**2
    x = (1 - sigma) / m * z + sigma / math.sqrt(m) * torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = torch.softmax(-((x - (1 - sigma) / m * z) ** 2) * m / (2 * sigma**2), dim=0)
    u = (z - (1 - sigma) * x) / sigma - x
    w = weight(x, z, sigma) * density
    v_base = (2 * sigma - 1) / m * z
    return float(((w * u).sum() + alpha * v_base) / (w.sum() + alpha))


def value(z: float, sigma: float) -> float:
    return (1 - sigma) / ((1 - sigma) ** 2 + sigma**2) * z


CASES = {
    "orw": (dict(), lambda x, z, s: torch.exp(x / 0.7)),
    "critic": (dict(given=Perfect()), lambda x, z, s: torch.exp((x - value(z, s)) / 0.7)),
    "clipped": (
        dict(given=Perfect(), advantage_clip=0.5),
        lambda x, z, s: torch.exp((x - value(z, s)).clamp(-0.5, 0.5) / 0.7),
    ),
    "softplus": (
        dict(given=Perfect(), weighting="softplus"),
        lambda x, z, s: torch.log1p(torch.exp((x - value(z, s)) / 0.7)),
    ),
    "indicator": (dict(given=Perfect(), weighting="indicator"), lambda x, z, s: (x > value(z, s)).double()),
    "signed": (
        dict(given=Perfect(), weighting="linear", wasserstein_coefficient=0.8),
        lambda x, z, s: (x - value(z, s)) / 0.7,
    ),
}


class Table(nn.Module):
    """A velocity of its own at each of a few fixed (z, sigma)."""

    def __init__(self, points: torch.Tensor) -> None:
        super().__init__()
        self.points, self.offsets = points, nn.Parameter(torch.zeros(len(points)))

    def forward(self, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        here = (z - self.points).abs().argmin(dim=1)
        m = (1 - sigma) ** 2 + sigma**2
        return ((2 * sigma - 1) / m)[:, None] * z + self.offsets[here][:, None]


@pytest.mark.parametrize(
    ("case", "alpha"),
    [
        pytest.param(case, alpha, marks=[] if alpha or case == "critic" else [pytest.mark.slow])
        for case in CASES
        for alpha in (0.0, 0.8)
        if (case, alpha) != ("signed", 0.0)
    ],
)
def test_the_actor_s_minimum_is_the_weighted_mean_pulled_to_the_base(tmp_path, case, alpha):
    """The loss of 200,000 images whose states lie at fixed points z, minimised exactly (it is quadratic), within 3 %
    of quadrature.

    Covers D2 (without clipping, exp(A) and exp(r) have the same minimum where there is no anchor) and D3 (signed
    weights: base + Cov / alpha).
    """
    changes, weight = CASES[case]
    sigma, points = 0.5, torch.tensor([-1.0, -0.4, 0.6, 1.0])
    t = ac_flow(
        tmp_path, Table(points), temperature=0.7, timestep_bins=1, **({"wasserstein_coefficient": alpha} | changes)
    )
    count = 200_000
    z = points.repeat(count // 4)
    m = (1 - sigma) ** 2 + sigma**2
    x = (1 - sigma) / m * z + sigma / math.sqrt(m) * torch.randn(count, generator=torch.Generator().manual_seed(0))
    noise = (z - (1 - sigma) * x) / sigma
    images = exact_images(t, count).with_record(Returns(final=x[:, None], returns=x))
    t._renoised = lambda batch, purpose: (z[:, None, None], noise[:, None, None], torch.full((count, 1), sigma))
    (batch,) = t._actor_batches([images])
    alpha = t.args.wasserstein_coefficient

    def gradient(offset: float) -> torch.Tensor:
        with torch.no_grad():
            t.flow.network.offsets.fill_(offset)
        t.flow.network.zero_grad()
        t.micro_batch_losses(t.model, batch, t.condition(batch.examples), 0).mean().backward()
        return t.flow.network.offsets.grad.clone()

    at_zero, at_one = gradient(0.0), gradient(1.0)
    minimum = -at_zero / (at_one - at_zero) + (2 * sigma - 1) / m * points
    expected = torch.tensor([weighted_regression(float(p), sigma, weight, alpha) for p in points])
    print(case, alpha, minimum.tolist(), expected.tolist())
    torch.testing.assert_close(minimum, expected, rtol=0.03, atol=0.03 * float(expected.abs().mean()))


def test_d2_the_critic_cancels_in_exponential_weights_but_not_beside_an_anchor():
    """By quadrature alone: equal minima without an anchor, different ones with it; and E[w | z] is far more even with
    the critic.
    """
    orw, with_critic = CASES["orw"][1], CASES["critic"][1]
    assert weighted_regression(0.6, 0.5, orw, 0.0) == pytest.approx(
        weighted_regression(0.6, 0.5, with_critic, 0.0), rel=1e-6
    )
    assert abs(weighted_regression(1.0, 0.5, orw, 0.8) - weighted_regression(1.0, 0.5, with_critic, 0.8)) > 0.1


def test_without_critic_shaping_clipping_and_normalising_it_is_orw_cfm_w2(tmp_path):
    """The gradient of E[exp(r / tau) |v - (e - x)|^2 + alpha |v - v_ref|^2], written out here, to 1e-6."""
    t = ac_flow(
        tmp_path, temperature=0.7, wasserstein_coefficient=0.4, timestep_bins=3, per_device_train_batch_size=16
    )
    with torch.no_grad():
        t.flow.network.coefficients += 0.3
    examples, (batch,) = first_rollout(t)
    loss = sum(t.micro_batch_losses(t.model, batch, t.condition(examples), state).mean() for state in range(3)) / 3
    (mine,) = torch.autograd.grad(loss, t.flow.network.coefficients)
    again = t.initial_latents([e.key for e in examples], "initial latents")
    with torch.no_grad():
        for k in range(16):
            again = again + (t.sigmas[k + 1] - t.sigmas[k]) * t.flow.network(again, t.sigmas[k].expand(16))
    z, noise, sigma = t._renoised(batch.with_record(Returns(again, again[:, 0])), "actor")
    reference, total = Velocities(), 0.0
    for k in range(3):
        v = t.flow.network(z[:, k], sigma[:, k])
        fit = torch.exp(again[:, 0] / 0.7) * (v - (noise[:, k] - again)).square().mean(dim=1)
        total = total + (fit + 0.4 * (v - reference(z[:, k], sigma[:, k]).detach()).square().mean(dim=1)).mean() / 3
    (theirs,) = torch.autograd.grad(total, t.flow.network.coefficients)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_the_distance_to_the_base_is_relative_to_it(tmp_path):
    """As in evaluations and TAFS-GRPO: a velocity that is longer by a tenth is 0.1 away."""
    t, anchors = ac_flow(tmp_path, wasserstein_coefficient=0.5), torch.randn(8, 1, 1)
    batch = drawn_images(t, 8).with_record(
        ACFlowRecord(
            states=anchors,
            sigmas=torch.full((8, 1), 0.5),
            targets=anchors,
            weights=torch.ones(8, 1),
            base_velocities=anchors,
        )
    )
    losses = t.micro_batch_losses(lambda z, sigma, conditioning, guidance: 1.1 * anchors[:, 0], batch, {}, 0)
    torch.testing.assert_close(losses, 1.5 * (0.1 * anchors[:, 0, 0]) ** 2)
    assert t.metrics.noted["velocity_distance"] == [pytest.approx(0.1)]
    batch.good[3], anchors[3] = False, 0.0  # left out, whatever the network says there
    t.micro_batch_losses(
        lambda z, sigma, conditioning, guidance: 1.1 * anchors[:, 0] + (anchors[:, 0] == 0), batch, {}, 0
    )
    assert t.metrics.noted["velocity_distance"][1] == pytest.approx(0.1)


def test_advantages_are_taken_from_a_critic_that_does_not_learn(tmp_path):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.modes = nn.Parameter(torch.zeros(1)), []

        def forward(self, z, sigma, features, mask):
            self.modes.append(self.training)
            return self.bias.expand(len(z))

    t = ac_flow(tmp_path, given=Moody(), critic_steps=1, timestep_bins=1)
    t.critic.modes.clear()  # of its trial on two images
    t.prepare([drawn_images(t, 8)])
    assert t.critic.modes == [False, True, False]  # judged, one step, advantages


# ---- rewards, files, refusals ---------------------------------------------------------------------------------------


async def later(images, prompts, **columns):
    return [None if "green" in p else float(i.mean()) for i, p in zip(images, prompts, strict=True)]


def jpeg_size(images, prompts, **columns):
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        to_pillow(image).save(buffer, "JPEG")
        sizes.append(-len(buffer.getvalue()) / 1000)
    return sizes


@pytest.mark.parametrize(
    "reward", ["checker", jpeg_size, later, ["checker", later]], ids=["checker", "jpeg", "async", "two"]
)
def test_black_boxes_are_rewards(tmp_path, reward):
    t = make_trainer("ACFlowTrainer", tmp_path, reward=reward, critic_warmup_max_steps=1, learning_rate=1e-2)
    t.train()
    rows = update_rows(t)
    assert [row["critic/warming_up"] for row in rows] == [1, 0]
    if reward == "checker":
        assert rows[0]["reward/checker"] == 0  # of a random pipeline


def test_the_reward_of_the_estimate_is_the_best_critic_of_a_gaussian(tmp_path):
    """Data N(0, 1), reward x: the estimate of one step is E[x | z], so that V is E[r | z], whose share of the variance
    of r is s = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2), averaged over each bin. It is fitted on earlier rollouts,
    so that the first has no critic.
    """
    t = ac_flow(tmp_path, critic="reward_of_estimate", reward_shaping="standardise", reward_clip=None)
    first, second = (exact_images(t, 6400, rollout) for rollout in (0, 1))
    t._actor_batches([first])
    assert [t.metrics.noted[f"critic/explained_variance_{k}"] for k in range(4)] == [[0.0]] * 4
    assert [t.metrics.noted[f"advantage_std_{k}"] for k in range(4)] == [[pytest.approx(1, abs=1e-3)]] * 4
    t.metrics.clear()
    t._actor_batches([second])
    sigma = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    share = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
    for k, expected in enumerate(share.unflatten(0, (4, 1000)).mean(dim=1).tolist()):
        assert t.metrics.noted[f"critic/explained_variance_{k}"] == [pytest.approx(expected, abs=0.03)]
        assert t.metrics.noted[f"advantage_std_{k}"] == [pytest.approx(math.sqrt(1 - expected), abs=0.03)]


def test_the_factor_of_a_level_fits_earlier_rollouts_best():
    fit = EstimateFit(torch.device("cpu"))
    fit.observe(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), torch.tensor([3.0, -1.0]), torch.tensor([[0.31, 0.9]] * 2))
    levels = torch.tensor([[0.39, 0.95, 0.25, 1.0]])
    torch.testing.assert_close(fit.factors(levels), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    fit.observe(torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]), torch.tensor([[0.35, 1.0]]))
    torch.testing.assert_close(fit.factors(levels), torch.tensor([[(0.9 * 5 + 2) / (0.9 * 5 + 1), 2.0, 0.0, 2.0]]))


def test_evaluation_takes_the_steps_that_were_asked_for(tmp_path):
    levels = set()
    t = ac_flow(tmp_path, num_inference_steps=4, eval_num_inference_steps=5)
    t.model.transformer.register_forward_pre_hook(lambda _, given: levels.add(round(float(given[1][0]), 5)))
    t.evaluate(NUMBERED.select(range(2)))
    # `velocity_distance` is measured at the levels of training.
    assert levels == {0.2, 0.4, 0.6, 0.8, 1.0} | {0.25, 0.5, 0.75}


def test_the_critic_is_saved_and_named_in_the_card(tmp_path):
    t = make_trainer("ACFlowTrainer", tmp_path, critic_warmup_max_steps=0)
    t.train()
    t.save_model()
    saved = ConvCritic.from_pretrained(tmp_path / "critic")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), t.critic.parameters(), strict=True))
    assert json.loads((tmp_path / "critic" / "config.json").read_text())["_class_name"] == "ConvCritic"
    card = (tmp_path / "README.md").read_text()
    assert "as reconstructed from its abstract" in card
    assert "ConvCritic" in card


@pytest.mark.parametrize("shape", [(4, 4, 4), (8, 8, 8), (16, 12, 20), (16, 64, 64)])
def test_the_critic_follows_the_latent_and_starts_from_zero(shape):
    network = critic(torch.Size(shape), 12)
    values = network(
        torch.randn(2, *shape), torch.tensor([0.3, 0.9]), torch.randn(2, 3, 12), torch.ones(2, 3, dtype=torch.bool)
    )
    assert values.tolist() == [0, 0]
    assert isinstance(critic(torch.Size((3,)), 12), MLPCritic)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"num_generations": 1}, r"`num_generations` \(1\) must be at least 2: shaped rewards"),
    ({"weighting": "sigmoid"}, "`weighting` is 'sigmoid': choose 'exponential', 'softplus'"),
    ({"weighting": "linear", "wasserstein_coefficient": 0.0}, "`wasserstein_coefficient` must be above 0 with `weighting='linear'`"),
    ({"weighting": "linear"}, "`normalize_weights` must be False with `weighting='linear'`"),
    ({"temperature": 0.0}, r"`temperature` \(0.0\) must be above 0"),
    ({"advantage_clip": -1.0}, r"`advantage_clip` \(-1.0\) must be above 0"),
    ({"critic_steps": 0}, r"`critic_steps` \(0\) must be at least 1"),
    (
        {"critic_bins_in_one_call": True},
        r"`critic_bins_in_one_call` \(True\) has no effect with `critic='reward_of_estimate'`, which is no network",
    ),
    (
        {"reward_shaping": "none"},
        r"`reward_shaping` \('none'\) must be 'standardise' with `critic='reward_of_estimate'`.*: leave it out, or set",
    ),
    (
        {"critic": "unet"},
        "`critic` is 'unet': choose 'reward_of_estimate', 'backbone', 'convolutional', 'module' or 'none'",
    ),
    (
        {"save_only_model": True, "load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        "`load_best_model_at_end` needs the critic of a checkpoint, which `save_only_model` leaves out",
    ),
    ({"reward_shaping": "rank"}, "`reward_shaping` is 'rank': choose 'standardise' or 'none'"),
    ({"timestep_sampling": "beta"}, "`timestep_sampling` is 'beta': choose 'uniform', 'logit_normal'"),
])  # fmt: skip
def test_a_wrong_configuration_is_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        ACFlowConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **changes)


def test_the_critic_judges_all_bins_in_one_call(tmp_path, monkeypatch):
    """The values of four images at the bins of each, but for the order of sums."""
    t = make_trainer("ACFlowTrainer", tmp_path)
    examples = [t.train_dataset[ImageKey(row, 0, 0)] for row in range(4)]
    states = torch.stack([t.initial_latents([e.key for e in examples], str(k)) for k in range(3)], dim=1)
    sigma, conditioning = torch.rand(4, 3), t.condition(examples)
    torch.nn.init.normal_(t.critic.judge.out.weight)
    calls = []
    t.critic.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    apart = t._values(states, sigma, conditioning)
    monkeypatch.setattr(t.args, "critic_bins_in_one_call", True)
    together = t._values(states, sigma, conditioning)
    assert calls == [4, 4, 4, 12]
    assert apart.std() > 0.01
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def critic_step(folder, *, stale: bool = False, in_one_call: bool = False) -> tuple[torch.Tensor, list[str]]:
    """How one step changes the critic, and in which order it is called and differentiated."""
    t = make_trainer("ACFlowTrainer", folder, critic_bins_in_one_call=in_one_call)
    seen, order = [], []
    with patch.object(t, "_critic_step", lambda shaped, purpose: seen.append(shaped)):
        t.make_rollout([t.train_dataset[ImageKey(row, 0, 0)] for row in (0, 0, 1, 1)])
    torch.manual_seed(0)
    torch.nn.init.normal_(t.critic.judge.out.weight)
    t.critic.register_forward_hook(lambda *_: order.append("called"))
    t.critic.judge.out.register_full_backward_hook(lambda *_: order.append("differentiated"))
    for parameter in t.critic.parameters():
        parameter.grad = torch.ones_like(parameter) if stale else None
    t.critic_optimizer = torch.optim.SGD(t.critic.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in t.critic.parameters()])
    t._critic_step(seen[0], "critic step 0")
    return torch.cat([p.detach().flatten() for p in t.critic.parameters()]) - before, order


def test_bins_are_differentiated_one_by_one_and_nothing_is_left_of_a_step_that_broke_off(tmp_path):
    """So a critic of the network's size holds one graph at a time. The step is the same, but for the order of sums."""
    step, order = critic_step(tmp_path)
    assert order == ["called", "differentiated"] * 4
    assert step.norm() > 0.1
    together, order = critic_step(tmp_path, in_one_call=True)
    assert order == ["called", "differentiated"]
    torch.testing.assert_close(together, step, atol=1e-5 * float(step.norm()), rtol=0)
    assert torch.equal(critic_step(tmp_path, stale=True)[0], step)
