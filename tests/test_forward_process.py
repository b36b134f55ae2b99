"""RAM, AWM and DiffusionNFT against closed forms: their gradients, their minima, and what rounds of them lead to.

Data x ~ N(0, 1) in one dimension unless a test says otherwise, states z = (1 - sigma) x + sigma e, u = e - x.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from flowrl_trainers import ACFlowConfig, DiffusionNFTConfig
from flowrl_trainers.flow import root_mean_square, shape_rewards, shift_sigmas, uniform_sigmas
from flowrl_trainers.trainers.lagged_weights import LaggedWeights
from flowrl_trainers.trainers.renoising_trainer import Returns

from .ac_flow import Velocities, ac_flow
from .forward_process import (
    CONDITIONING,
    ac_batch,
    diffusion_nft,
    loss_and_gradient,
    nft_batch,
    online,
    posterior,
)
from .helpers import make_trainer
from .runs import assert_same

COUNT, SHAPE = 6, (4, 4, 4)  # D = 64


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def drawn():
    """Velocities of 64 dimensions that belong to no model: every identity of gradients holds for any."""
    u = numbers(0, COUNT, *SHAPE)
    v_old = u + 0.7 * numbers(1, COUNT, *SHAPE)
    return {
        "u": u, "v_old": v_old, "v": v_old + 0.3 * numbers(2, COUNT, *SHAPE),
        "v_base": v_old + 0.2 * numbers(3, COUNT, *SHAPE), "A": 1.5 * numbers(4, COUNT),
        "sigma": torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64),
    }  # fmt: skip


def exactly(a, b, tolerance=1e-12):
    """Equal relative to the largest of them."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def fixed(folder, network=None, **changes):
    """The fixed target without clipping: eta A (u - v_old) from the base."""
    defaults = dict(target="fixed", normalize_weights=None, wasserstein_coefficient=None, timestep_bins=8)
    return ac_flow(folder, network, **(defaults | changes))


def of(t, batch, u, A, v_old, v_base):
    """The record that a trainer makes where base and old policy say v_base and v_old (B, ...); A (B,)."""
    record = t._record(
        batch.record.states, batch.record.sigmas, u[:, None], A[:, None], v_base[:, None], v_old[:, None]
    )
    return replace(batch, record=record)


# ---- 1 to 6: gradients, without a model -----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 100.0])
def test_the_fixed_target_has_the_gradient_of_signed_weights_and_their_lag(tmp_path, drawn, eta):
    """1, 2: with alpha = 1 / eta, and 2 / D A (v_old - v) apart where the policies differ."""
    u, v, v_old, v_base, A, sigma = (drawn[n] for n in ("u", "v", "v_old", "v_base", "A", "sigma"))
    t = fixed(tmp_path, reward_multiplier=eta)
    signed = ac_flow(tmp_path, weighting="linear", wasserstein_coefficient=1 / eta)
    for lag in (v, v_old):
        _, found = loss_and_gradient(t, of(t, ac_batch(sigma, u, A), u, A, lag, v_base), v)
        _, weighted = loss_and_gradient(signed, ac_batch(sigma, u, A, v_base), v)
        expected = 2 / 64 * A[:, None, None, None] * (lag - v)
        exactly(found, weighted + expected)
    assert expected.abs().max() > 1e-3


def test_the_velocity_form_of_nft_is_a_fixed_target_from_the_old_policy(tmp_path, drawn):
    """3: r |v+ - u|^2 + (1 - r) |v- - u|^2 = beta^2 |v - [v_old + (2 r - 1) / beta (u - v_old)]|^2 + what v is not in,
    (1 - (2 r - 1)^2) |u - v_old|^2.
    """
    u, v, v_old, v_base, A, sigma = (drawn[n] for n in ("u", "v", "v_old", "v_base", "A", "sigma"))
    beta, c = 0.3, 5.0
    signed = A.clamp(-c, c) / c  # 2 r - 1
    nft = diffusion_nft(tmp_path, branch_beta=beta, advantage_clip=c)
    t = fixed(tmp_path, target_anchor="old", reward_multiplier=1 / (c * beta))
    value, gradient = loss_and_gradient(nft, nft_batch(sigma, u, signed / 2 + 0.5, v_old), v)
    value, gradient = value * beta / c, gradient * beta / c  # without the factor c / beta
    batch = of(t, ac_batch(sigma, u, A), u, c * signed, v_old, v_base)
    other_value, other_gradient = loss_and_gradient(t, batch, v)
    factor = beta**2 / (c * beta)  # beta^2 eta, as the loss is divided by eta
    exactly(gradient, factor * other_gradient)
    square = (u - v_old).flatten(1).square().mean(dim=1)
    exactly(value, factor * other_value + (1 - signed**2) * square)


def test_the_official_gradient_of_nft(tmp_path, drawn):
    """5: dL/dv = 2 c sigma^2 / D [ r (beta d - e) / W+ + (1 - r) (beta d + e) / W- ], d = v - v_old, e = u - v_old."""
    u, v, v_old, v_base, A, sigma = (drawn[n] for n in ("u", "v", "v_old", "v_base", "A", "sigma"))
    c, kl, r = 5.0, 1e-4, A.clamp(-5, 5) / 10 + 0.5
    s, R = sigma.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
    for beta in (1.0, 0.1, 0.02):
        t = diffusion_nft(tmp_path, branch_beta=beta, adaptive_weighting=True, reference_coefficient=kl)
        _, found = loss_and_gradient(t, nft_batch(sigma, u, r, v_old, v_base), v)
        d, e = v - v_old, u - v_old
        w_plus, w_minus = (s * x.abs().mean(dim=(1, 2, 3), keepdim=True) for x in (beta * d - e, beta * d + e))
        expected = 2 * c * s**2 / 64 * (R * (beta * d - e) / w_plus + (1 - R) * (beta * d + e) / w_minus)
        exactly(found, expected + 2 * kl / 64 * (v - v_base))
        # Where v = v_old it is free of beta, and the value says nothing of r.
        values, found = loss_and_gradient(t, nft_batch(sigma, u, r, v_old), v_old)
        exactly(found, -2 * s / 64 / e.abs().mean(dim=(1, 2, 3), keepdim=True) * A.clamp(-c, c).view(-1, 1, 1, 1) * e)
        undecided, nothing = loss_and_gradient(t, nft_batch(sigma, u, torch.full_like(r, 0.5), v_old), v_old)
        exactly(values, undecided)
        assert nothing.abs().max() < 1e-15


def test_w_belongs_to_each_branch_and_is_not_differentiated(tmp_path, drawn):
    """Off policy the gradient of 5 differs by more than a thousandth from that of one W, or of one with a gradient."""
    u, v, v_old, A, sigma = (drawn[n] for n in ("u", "v", "v_old", "A", "sigma"))
    t = diffusion_nft(tmp_path, branch_beta=1.0, adaptive_weighting=True)
    r, s = A.clamp(-5, 5) / 10 + 0.5, sigma
    _, found = loss_and_gradient(t, nft_batch(sigma, u, r, v_old), v)

    def broken(shared: bool) -> torch.Tensor:
        w = v.detach().requires_grad_()
        plus, minus = (w - u).flatten(1), (2 * v_old - w - u).flatten(1)
        W_plus, W_minus = s * plus.abs().mean(dim=1), s * minus.abs().mean(dim=1)
        if shared:
            W_plus, W_minus = W_plus.detach(), W_plus.detach()
        L = r * s**2 * plus.square().mean(dim=1) / W_plus + (1 - r) * s**2 * minus.square().mean(dim=1) / W_minus
        return torch.autograd.grad(5 * L.sum(), w)[0]

    assert all((found - broken(shared)).norm() > 1e-3 * found.norm() for shared in (True, False))


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_the_likelihood_ratio_of_awm_has_the_gradient_of_level_weights(tmp_path, drawn, power):
    """6: a ratio exp(log p - sg log p) at 1, log p = -sigma ((m + 1e-10)^q - 1e-10^q) / q."""
    u, v, v_old, v_base, A, sigma = (drawn[n] for n in ("u", "v", "v_old", "v_base", "A", "sigma"))
    t = ac_flow(
        tmp_path, weighting="linear", temperature=5.0, wasserstein_coefficient=1e-3, old_policy_coefficient=1.0,
        old_policy_decay=0.3, loss_weighting="huber", huber_power=power,
    )  # fmt: skip
    w = v.detach().requires_grad_()
    mse = (w - u).square().mean(dim=(1, 2, 3))
    log_p = -sigma * ((mse + 1e-10) ** power - 1e-10**power) / power
    ratio, a = torch.exp(log_p - log_p.detach()), A.clamp(-5, 5) / 5
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(0, 2))
    ties = (w - v_base).square().mean(dim=(1, 2, 3)) * 1e-3 + (w - v_old).square().mean(dim=(1, 2, 3))
    (expected,) = torch.autograd.grad((policy + ties).sum(), w)
    _, found = loss_and_gradient(t, ac_batch(sigma, u, a, v_base, v_old), v)
    exactly(found, expected)


# ---- 4, 11: minima, by quadrature -----------------------------------------------------------------------------------


def test_the_minimum_of_nft_is_the_old_velocity_plus_the_reinforcement(tmp_path):
    """4: v_old + (2 / beta) Cov(r, u | z), three forms, for two Gaussians, r = sigmoid(2 x + 0.3)."""
    z, sigma, beta = 0.4, 0.6, 0.7
    x = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    u = (z - (1 - sigma) * x) / sigma - x
    prior = 0.3 * torch.exp(-((x + 1.5) ** 2) / 0.5) + 0.7 * torch.exp(-((x - 1) ** 2) / 1.2)
    p = prior * torch.exp(-(((z - (1 - sigma) * x) / sigma) ** 2) / 2)
    p, r = p / p.sum(), torch.sigmoid(2 * x + 0.3)
    v_old, level = (p * u).sum(), torch.full_like(x, sigma)
    t = diffusion_nft(tmp_path, branch_beta=beta)
    batch = nft_batch(level, u[:, None], r, v_old.expand(len(x), 1))

    def slope(v: float) -> torch.Tensor:
        return (p[:, None] * loss_and_gradient(t, batch, torch.full((len(x), 1), v, dtype=torch.float64))[1]).sum()

    found = -slope(0.0) / (slope(1.0) - slope(0.0))
    mean_r = (p * r).sum()
    covariance = (p * (r - mean_r) * (u - v_old)).sum()
    v_good, v_bad = (p * r * u).sum() / mean_r, (p * (1 - r) * u).sum() / (1 - mean_r)
    for reinforcement in (covariance, mean_r * (v_good - v_old), (1 - mean_r) * (v_old - v_bad)):
        assert float(found) == pytest.approx(float(v_old + 2 / beta * reinforcement), abs=1e-9)
    assert abs(float(covariance)) > 0.05


@pytest.mark.parametrize("with_critic", [True, False])
def test_a_critic_frees_the_fixed_target_of_the_bias_of_a_wrong_old_velocity(tmp_path, with_critic):
    """11: v_old off by 0.7 from the mean of u. v_ref + eta Cov(A, u | z) with the exact critic; without one
    eta E[A | z] (mean u - v_old) is added.
    """
    z, sigma, eta = 0.8, 0.5, 0.6
    x, p = posterior(z, sigma)
    u = (z - (1 - sigma) * x) / sigma - x
    reward = torch.sin(1.3 * x) + 0.2 * x**2
    value = (p * reward).sum()
    A = reward - value if with_critic else reward
    mean_u, v_base = (p * u).sum(), torch.tensor(0.25, dtype=torch.float64)
    v_old = mean_u + 0.7
    t = fixed(tmp_path, reward_multiplier=eta)
    batch = of(t, ac_batch(torch.full_like(x, sigma), u[:, None], A), u[:, None], A, v_old.expand(len(x), 1),
               v_base.expand(len(x), 1))  # fmt: skip

    def slope(v: float) -> torch.Tensor:
        return (p[:, None] * loss_and_gradient(t, batch, torch.full((len(x), 1), v, dtype=torch.float64))[1]).sum()

    found = -slope(0.0) / (slope(1.0) - slope(0.0))
    covariance = (p * (reward - value) * (u - mean_u)).sum()
    bias = eta * (p * A).sum() * (mean_u - v_old)
    assert float(found) == pytest.approx(float(v_base + eta * covariance + bias), abs=1e-9)
    assert (abs(float(bias)) < 1e-9) if with_critic else (abs(float(bias)) > 0.1)


# ---- 7 to 10: rounds ------------------------------------------------------------------------------------------------


def ram(folder, eta: float = 0.5, **changes):
    defaults = dict(reward_multiplier=eta, rollout_policy="old", old_policy_decay=0.5)
    return fixed(folder, Velocities(11), **(defaults | changes))


def curvature(images, prompts, **columns):
    """r = -x^2 / 2."""
    return (-(images[:, 0] ** 2) / 2).tolist()


def test_ram_reaches_its_tilt_and_stays_there_while_its_old_policy_lags(tmp_path):
    """7: r = x, eta 0.5: mean 0.5, variance 1, after every round."""
    for mean, variance in online(ram(tmp_path), 4):
        assert mean == pytest.approx(0.5, abs=0.03)
        assert variance == pytest.approx(1.0, abs=0.04)


def test_one_round_of_ram_is_not_the_tilt(tmp_path):
    """8: r = -x^2 / 2, eta 0.5: variance e^-0.5 = 0.607; that of the tilt is 1 / 1.5 = 0.667."""
    ((_, variance),) = online(ram(tmp_path, reward=curvature), 1)
    assert variance == pytest.approx(math.exp(-0.5), rel=0.03)


class CurvatureCritic(nn.Module):
    """The exact value of -x^2 / 2 where x ~ N(0, variance)."""

    def __init__(self) -> None:
        super().__init__()
        self.variance = nn.Parameter(torch.ones(()))

    def forward(self, latents, sigma, prompt_features, prompt_mask):
        m = (1 - sigma) ** 2 * self.variance + sigma**2
        a = (1 - sigma) * self.variance / m * latents[:, 0]
        return -(a**2 + self.variance * sigma**2 / m) / 2


def test_rounds_of_ram_with_an_exact_critic_end_where_s2_is_exp_of_minus_k_s2(tmp_path):
    """9: k = eta = 0.5: s2 = e^(-s2 / 2) = 0.703."""
    t = ram(tmp_path, reward=curvature, given=CurvatureCritic(), old_policy_decay=0.0, rollout_policy="current")
    t._critic_step = lambda *args: None
    rows = []
    for _ in range(4):
        rows += online(t, 1)
        with torch.no_grad():
            t.critic.variance.fill_(rows[-1][1])
    assert rows[-1][1] == pytest.approx(0.703, rel=0.03)
    assert rows[0][1] < 0.63  # e^-0.5, so that the critic of the new policy was needed


def test_nft_moves_by_a_fifth_of_a_standard_deviation_per_round(tmp_path):
    """10: the clip is 5 and beta 1: the mean grows by 1 / (5 beta), without end."""
    for number, (mean, variance) in enumerate(online(diffusion_nft(tmp_path), 3)):
        assert mean == pytest.approx(0.2 * (number + 1), abs=0.03)
        assert variance == pytest.approx(1.0, abs=0.04)


def test_nft_does_not_accumulate_where_the_old_policy_never_follows(tmp_path):
    """Must fail: 0.2 again in round 2, where it is 0.4."""
    t = diffusion_nft(tmp_path, old_policy_decay=0.5)
    (_, second) = online(t, 2, follows=False)
    assert second[0] == pytest.approx(0.2, abs=0.03)


def test_targets_dealt_to_other_images_teach_nothing(tmp_path):
    """Must fail: the advantage of another image leaves the mean where it was."""
    t = ram(tmp_path)
    weights = t._weights

    def shuffled(advantages, good):
        order = torch.randperm(len(advantages), generator=torch.Generator().manual_seed(9))
        return weights(advantages, good)[order]

    t._weights = shuffled
    ((mean, _),) = online(t, 1)
    assert abs(mean) < 0.03


def test_a_turned_sign_of_the_target_unlearns(tmp_path):
    """Must fail: v_old - u for u - v_old moves the mean to -0.5."""
    t = ram(tmp_path)
    weights = t._weights
    t._weights = lambda advantages, good: -weights(advantages, good)
    ((mean, _),) = online(t, 1)
    assert mean == pytest.approx(-0.5, abs=0.03)


def test_ram_without_its_base_anchor_grows_in_every_round(tmp_path):
    """Must fail for RAM: from the old policy the mean is 0.5, then 1."""
    t = ram(tmp_path, target_anchor="old", old_policy_decay=0.0, rollout_policy="current")
    first, second = online(t, 2)
    assert first[0] == pytest.approx(0.5, abs=0.03)
    assert second[0] == pytest.approx(1.0, abs=0.05)


# ---- 12: AWM and the policy gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize(("omega", "expected"), [
    (lambda s: (1 - s) / s, (1, 1)), (torch.ones_like, (math.pi / 2, math.pi / 4)),
    (lambda s: s, (math.pi / 2 - 1 / 2, math.pi / 8)),
], ids=["policy gradient", "uniform", "sigma"])  # fmt: skip
def test_awm_is_the_policy_gradient_for_one_level_weight(tmp_path, omega, expected):
    """12: ratios to the gradient of E[r] in the mean and in log std of N(0, 1), r = sin 1.3 x + 0.2 x^2.

    There dv / dmean = -sigma / m with m = (1 - sigma)^2 + sigma^2, whose integrals are those of arc tangents.
    """
    nodes, weights = (torch.tensor(a) for a in _hermite(60))
    noise, noise_weights = (torch.tensor(a) for a in _hermite(3))  # the loss is quadratic in e
    levels = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    s, x, e = (t.flatten() for t in torch.meshgrid(levels, nodes, noise, indexing="ij"))
    p = (torch.ones(400)[:, None, None] / 400 * weights[None, :, None] * noise_weights).flatten()
    reward = torch.sin(1.3 * x) + 0.2 * x**2
    t = ac_flow(tmp_path, weighting="linear", wasserstein_coefficient=1.0)
    mu, log_std = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    z, variance = (1 - s) * x + s * e, torch.exp(2 * log_std)
    v = (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2) * (z - (1 - s) * mu) - mu
    batch = ac_batch(s, (e - x)[:, None], p * reward * omega(s))
    losses = t.micro_batch_losses(lambda *args, **kwargs: v[:, None], batch, CONDITIONING, 0)
    found = torch.stack(torch.autograd.grad(losses.sum(), (mu, log_std)))
    score = torch.stack([nodes, nodes**2 - 1])  # of the mean, of log std
    policy = -(weights * (torch.sin(1.3 * nodes) + 0.2 * nodes**2) * score).sum(dim=1)
    ratio = found / policy
    print(ratio.tolist())
    torch.testing.assert_close(ratio, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def _hermite(count: int):
    import numpy as np

    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes, weights / weights.sum()


# ---- 13: levels -----------------------------------------------------------------------------------------------------


def levels(folder, monkeypatch, sampling: str, bins: int, steps: int = 20):
    t = ac_flow(folder, timestep_sampling=sampling, timestep_bins=bins, num_inference_steps=steps)
    monkeypatch.setattr(t, "sigmas", shift_sigmas(uniform_sigmas(steps), 3.0))
    x = torch.zeros(64 * 40, 1)
    batch = nft_batch(torch.zeros(len(x)), x, x[:, 0], x).with_record(Returns(final=x, returns=x[:, 0]))
    return t, t._renoised(batch, "states")[2]


def test_noisy_levels_have_their_means(tmp_path, monkeypatch):
    """13: of the density 2 sigma 2 / 3; of the sampler's 20 levels with shift 3, weighted by themselves, 0.790."""
    _, sigma = levels(tmp_path, monkeypatch, "noisy", 8)
    assert float(sigma.mean()) == pytest.approx(2 / 3, rel=0.01)
    t, sigma = levels(tmp_path, monkeypatch, "noisy_steps", 8)
    assert float(sigma.mean()) == pytest.approx(0.790, rel=0.01)
    assert set(sigma.unique().tolist()) == set(t.sigmas[:-1].tolist())


def test_steps_are_different_levels_of_the_sampler_and_each_is_left_out_as_often(tmp_path, monkeypatch):
    """9 of 10, sigma = 1 included; of 2,560 images each level is left out by a tenth, within five standard errors."""
    t, sigma = levels(tmp_path, monkeypatch, "steps", 9, steps=10)
    assert all(len(row.unique()) == 9 for row in sigma)
    counts = torch.stack([(sigma == level).any(dim=1).sum() for level in t.sigmas[:-1]])
    assert counts.sum() == sigma.numel()
    assert (2560 - counts - 256).abs().max() < 5 * math.sqrt(2560 * 0.09)


# ---- 14, 15: the old policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_old_weights_stand_in_and_leave_no_trace(bf16):
    """14: also within one region of autocast, which would go on with the copies of the weights of before."""
    network = nn.Linear(3, 3)
    old = LaggedWeights(dict(network.named_parameters()))
    with torch.no_grad():
        network.weight += 1
    before, x = [p.detach().clone() for p in network.parameters()], torch.ones(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        present = network(x)
        with old.standing_in():
            lag = network(x)
            with pytest.raises(RuntimeError, match="already stand in"), old.standing_in():
                pass
        again = network(x)
    assert all(torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))
    assert torch.equal(present, again)
    torch.testing.assert_close(present.float() - lag.float(), torch.full((2, 3), 3.0), atol=0.05, rtol=0)


def test_old_weights_follow():
    network = nn.Linear(2, 2)
    old = LaggedWeights(dict(network.named_parameters()))
    first = network.weight.detach().clone()
    with torch.no_grad():
        network.weight += 1
    old.move(0.75)
    torch.testing.assert_close(old.values["weight"], first + 0.25)
    old.move(0.0)
    assert torch.equal(old.values["weight"], network.weight)


def test_the_published_schedules(tmp_path):
    """Type 1 and type 2 of the code of DiffusionNFT, and that of RAM; the first rollout is always of a copy."""
    nft = DiffusionNFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert [nft.old_decay(n) for n in (0, 1, 100, 501)] == pytest.approx([0, 0.001, 0.1, 0.5])
    ocr = replace(nft, old_policy_decay=0.999, old_policy_ramp=0.0075, old_policy_flat=75)
    assert [ocr.old_decay(n) for n in (74, 75, 76, 1000)] == pytest.approx([0, 0, 0.0075, 0.999])
    assert replace(nft, old_policy_ramp=None).old_decay(0) == 0
    assert replace(nft, old_policy_ramp=None).old_decay(1) == 0.5
    assert DiffusionNFTConfig(output_dir=str(tmp_path), use_cpu=True, old_policy_decay=0.0).old_policy_ramp is None


@pytest.mark.parametrize(("name", "settings"), [
    ("DiffusionNFTTrainer", {"norm_guard": 0.1}),
    ("ACFlowTrainer", {
        "target": "fixed", "rollout_policy": "old", "old_policy_decay": 0.5, "critic": "none", "timestep_bins": 2,
        "old_policy_coefficient": 0.1, "norm_guard": 0.1, "critic_warmup_max_steps": 0, "temperature": 2.0,
    }),
    ("ACFlowTrainer", {
        "target": "fixed", "old_policy_decay": 0.5, "critic": "backbone", "critic_steps": 1, "timestep_bins": 2,
    }),
    ("ACFlowTrainer", {
        "target": "fixed", "old_policy_decay": 0.5, "critic": "reward_of_estimate", "timestep_bins": 2,
    }),
])  # fmt: skip
def test_a_run_resumed_after_every_update_of_a_window_is_the_uninterrupted_one(tmp_path, name, settings):
    """15: parameters, old weights and the rollout in use, bit for bit; two updates take one rollout."""
    run = settings | {
        "per_device_train_batch_size": 2, "steps_per_generation": 2, "learning_rate": 0.05, "max_steps": 5,
        "save_strategy": "steps", "save_steps": 1, "height": 16, "width": 16,
    }  # fmt: skip
    whole = make_trainer(name, tmp_path, **run)
    whole.train()
    assert any(
        not torch.equal(p, whole.old.values[n])
        for n, p in whole.model.trained_tensors().items()
        if n in whole.old.values
    )
    expected = whole.training_state()
    for step in (3, 4):  # after the old policy has moved for the first time
        resumed = make_trainer(name, tmp_path / "again", **run | {"save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        state = resumed.training_state()
        assert_same(
            {n: t.detach() for n, t in state.tensors.items()}, {n: t.detach() for n, t in expected.tensors.items()}
        )
        for part in ("algorithm", "buffer"):
            assert_same(state.values[part], expected.values[part])


# ---- the settings ---------------------------------------------------------------------------------------------------


def test_the_raw_spread_holds_what_prompts_differ():
    rewards, groups = torch.tensor([0.0, 2.0, 10.0, 12.0]), torch.tensor([0, 0, 1, 1])
    centred = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(shape_rewards(rewards, groups, math.inf), centred / (1 + 1e-4))
    torch.testing.assert_close(shape_rewards(rewards, groups, math.inf, "raw"), centred / (math.sqrt(26) + 1e-4))


@pytest.mark.parametrize(("spread_of", "spread"), [("centred", math.sqrt(10 / 4)), ("raw", math.sqrt(91 / 4))])
def test_a_trainer_shapes_with_its_spread_and_clips(tmp_path, spread_of, spread):
    rewards, rows = torch.tensor([[0.0], [4.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1])
    clip = 1.5 / spread
    for make in (ac_flow, diffusion_nft):
        t = make(tmp_path, reward_shaping="standardise", reward_std=spread_of, reward_clip=clip)
        expected = torch.tensor([-1.5, 1.5, -1.0, 1.0]) / spread
        torch.testing.assert_close(t._shaped(rewards, rows), expected, rtol=1e-4, atol=0)


def test_the_guard_costs_only_what_is_longer_than_the_base(tmp_path, drawn):
    """g relu(s - 1)^2 of v = s v_base, whose gradient is 2 g relu(s - 1) v_base / (D |v_base|^2)."""
    u, v_old, v_base, A, sigma = (drawn[n] for n in ("u", "v_old", "v_base", "A", "sigma"))
    s = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 3.0], dtype=torch.float64)
    v, over = s[:, None, None, None] * v_base, (s - 1).relu()
    lengths = root_mean_square(v_base, 1)
    slope = (2 * 0.7 * over / 64 / lengths**2)[:, None, None, None] * v_base
    plain, guarded = ({"norm_guard": g, "wasserstein_coefficient": 0.1, "weighting": "linear"} for g in (0.0, 0.7))
    ac = [ac_flow(tmp_path, **settings) for settings in (plain, guarded)]
    batches = [of(t, ac_batch(sigma, u, A), u, A, v_old, v_base) for t in ac]
    nft = [diffusion_nft(tmp_path, norm_guard=g) for g in (0.0, 0.7)]
    batch = nft_batch(sigma, u, A.sigmoid(), v_old, v_base)
    batch = replace(batch, record=replace(batch.record, base_lengths=lengths[:, None]))
    for trainers, given in ((ac, batches), (nft, [batch, batch])):
        (value, gradient), (more, steeper) = (loss_and_gradient(t, b, v) for t, b in zip(trainers, given, strict=True))
        exactly(more - value, 0.7 * over**2, 1e-9)
        exactly(steeper - gradient, slope, 1e-9)


def test_levels_weigh_by_sigma_and_the_old_policy_pulls(tmp_path, drawn):
    """sigma A |v - u|^2 + alpha |v - v_base|^2 + kappa |v - v_old|^2, from the record that the trainer makes."""
    u, v, v_old, v_base, A, sigma = (drawn[n] for n in ("u", "v", "v_old", "v_base", "A", "sigma"))
    t = ac_flow(
        tmp_path, weighting="linear", loss_weighting="sigma", wasserstein_coefficient=0.3, old_policy_coefficient=0.8,
        old_policy_decay=0.5,
    )  # fmt: skip
    value, gradient = loss_and_gradient(t, of(t, ac_batch(sigma, u, A), u, A, v_old, v_base), v)
    terms = ((sigma * A, u), (torch.full_like(A, 0.3), v_base), (torch.full_like(A, 0.8), v_old))
    exactly(value, sum(w * (v - target).flatten(1).square().mean(dim=1) for w, target in terms))
    exactly(gradient, sum(2 / 64 * w[:, None, None, None] * (v - target) for w, target in terms))


def test_a_fixed_target_alone_is_a_valid_configuration(tmp_path):
    args = ACFlowConfig(output_dir=str(tmp_path), use_cpu=True, target="fixed")
    assert (args.weighting, args.normalize_weights, args.wasserstein_coefficient) == ("linear", False, 0.0)
    plain = ACFlowConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (plain.weighting, plain.normalize_weights, plain.wasserstein_coefficient) == ("exponential", True, 0.3)


FIXED = {"target": "fixed"}


@pytest.mark.parametrize(("config", "changes", "sentence"), [
    (ACFlowConfig, FIXED | {"weighting": "positive"}, r"`weighting` \('positive'\) must be 'linear'"),
    (ACFlowConfig, FIXED | {"normalize_weights": True}, "`normalize_weights` must be False with `target='fixed'`"),
    (ACFlowConfig, FIXED | {"wasserstein_coefficient": 0.1}, r"`wasserstein_coefficient` \(0.1\) must be 0 with"),
    (ACFlowConfig, FIXED | {"loss_weighting": "sigma"}, r"`loss_weighting` \('sigma'\) must be 'none'"),
    (ACFlowConfig, {"target_anchor": "old"}, r"`target_anchor` \('old'\) has no effect with `target='weighted'`"),
    (ACFlowConfig, {"old_policy_decay": 0.5}, r"`old_policy_decay` \(0.5\) has no effect where nothing asks"),
    (ACFlowConfig, {"old_policy_flat": 5}, "`old_policy_ramp` and `old_policy_flat` have no effect"),
    (ACFlowConfig, {"loss_weighting": "huber", "num_iterations": 2}, r"`loss_weighting` \('huber'\) needs one update"),
    (
        ACFlowConfig, {"timestep_sampling": "steps", "timestep_bins": 9, "num_inference_steps": 8},
        r"`timestep_bins` \(9\) must be at most `num_inference_steps` \(8\)",
    ),
    (DiffusionNFTConfig, {"num_generations": 1}, r"`num_generations` \(1\) must be at least 2"),
])  # fmt: skip
def test_a_wrong_configuration_is_refused(tmp_path, config, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **changes)


def test_nft_says_where_guidance_is_on_or_the_model_is_distilled(tmp_path, caplog, monkeypatch):
    make_trainer("DiffusionNFTTrainer", tmp_path)
    assert "without guidance" not in caplog.text
    make_trainer("DiffusionNFTTrainer", tmp_path, guidance_scale=4.5)
    assert "DiffusionNFT is made for rollouts without guidance" in caplog.text
    from flowrl_trainers.pipelines.diffusers_pipeline import DiffusersFlowPipeline

    monkeypatch.setattr(
        DiffusersFlowPipeline, "name", property(lambda self: "stabilityai/stable-diffusion-3.5-large-turbo")
    )
    make_trainer("DiffusionNFTTrainer", tmp_path)
    assert "is distilled, which DiffusionNFT was not made for" in caplog.text
