"""The mathematics against closed forms."""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowrl_trainers import FlowPipeline
from flowrl_trainers.flow import (
    MemorylessDynamics,
    OdeDynamics,
    best_control,
    carry_adjoint,
    clean_estimate,
    control_cost,
    control_cost_gradient,
    euler_step,
    expand_like,
    interpolate,
    log_probability,
    noise_estimate,
    precise_step,
    renoise,
    shift_sigmas,
    uniform_sigmas,
    vector_jacobian_product,
    velocity_between,
)

from .tiny import tiny_sd3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_state_and_its_velocity_give_back_data_and_noise():
    data, noise, sigma = random(5, 3, 2), random(5, 3, 2, seed=1), torch.linspace(0, 1, 5, dtype=torch.float64)
    x, v = interpolate(data, noise, sigma), velocity_between(data, noise)
    torch.testing.assert_close(clean_estimate(x, v, sigma), data)
    torch.testing.assert_close(noise_estimate(x, v, sigma), noise)


@pytest.mark.parametrize("leading", [(), (4,), (4, 2)], ids=["one value", "one per latent", "one per state"])
def test_values_meet_the_leading_dimensions_of_latents(leading):
    """Every latent of (B, K, C, h, w) is multiplied by the value of its own index, or by the only one."""
    x, values = random(4, 2, 3, 5, 6), random(*leading, seed=1)
    expanded = expand_like(values, x)
    assert expanded.shape == (*leading, *[1] * (5 - len(leading)))
    product = expanded * x
    assert product.shape == x.shape
    for b, k in itertools.product(range(4), range(2)):
        assert torch.equal(product[b, k], float(values[(b, k)[: len(leading)]]) * x[b, k])


def test_uniform_grid_runs_from_noise_to_data():
    torch.testing.assert_close(uniform_sigmas(4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift_is_that_of_the_scheduler_of_diffusers_and_has_an_inverse(shift):
    sigmas = uniform_sigmas(7)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    torch.testing.assert_close(shift_sigmas(sigmas, shift), scheduler.sigmas)
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigmas, shift), 1 / shift), sigmas)


@pytest.mark.parametrize("shift", [math.sqrt(3), 1.18, 2.07, 1.32])
def test_a_grid_starts_at_exactly_1_for_any_shift(shift):
    """diffusers rounds the first level of these down or up."""
    assert shift_sigmas(uniform_sigmas(10), shift)[0] == 1
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[0] != 1
    pipeline = tiny_sd3()
    pipeline.scheduler = scheduler
    assert FlowPipeline.from_pipeline(pipeline).sigmas(10)[0] == 1


def test_shift_by_exp_mu_is_the_dynamic_shift_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=uniform_sigmas(5)[:-1].tolist(), mu=0.8)
    torch.testing.assert_close(shift_sigmas(uniform_sigmas(5), math.exp(0.8)), scheduler.sigmas)


def test_euler_step_is_exact_on_a_straight_path():
    data, noise = random(3, 4), random(3, 4, seed=1)
    sigma, sigma_next = torch.full((3,), 0.7).double(), torch.full((3,), 0.2).double()
    x = interpolate(data, noise, sigma)
    torch.testing.assert_close(euler_step(x, noise - data, sigma, sigma_next), interpolate(data, noise, sigma_next))


def test_euler_sampler_converges_with_order_one_to_the_flow_of_a_gaussian():
    """Data N(0, s^2): v = x (sigma - (1 - sigma) s^2) / m with m = (1 - sigma)^2 s^2 + sigma^2; the flow takes x to x
    sqrt(m(0) / m(1)) = s x.
    """
    s = 0.4

    def error(steps: int) -> float:
        x = torch.ones(1, 1, dtype=torch.float64)
        sigmas = uniform_sigmas(steps).double()
        for sigma, sigma_next in itertools.pairwise(sigmas):
            m = (1 - sigma) ** 2 * s**2 + sigma**2
            x = euler_step(x, x * (sigma - (1 - sigma) * s**2) / m, sigma, sigma_next)
        return abs(float(x) - s)

    assert math.log2(error(200) / error(400)) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_leaves_the_noise_level_of_a_point_mass(eta):
    """All data is m, so v = noise - m exactly and the next state is N((1 - sigma') m, sigma'^2)."""
    m, noise = 0.7, torch.tensor([[-1.0], [1.0]])  # mean 0, variance 1, nothing drawn
    mean, std = renoise(0.2 * m + 0.8 * noise, noise - m, torch.full((2,), 0.8), torch.full((2,), 0.3), eta)
    torch.testing.assert_close(mean.mean(), torch.tensor(0.7 * m))
    torch.testing.assert_close(mean.var(correction=0) + std[0, 0] ** 2, torch.tensor(0.3**2))


def test_renoise_with_eta_zero_is_the_euler_step_and_with_one_forgets_the_noise():
    x, v, sigma, sigma_next = random(3, 2, 2), random(3, 2, 2, seed=1), random(3).sigmoid(), 0.5 * random(3).sigmoid()
    mean, std = renoise(x, v, sigma, sigma_next, 0.0)
    torch.testing.assert_close(mean, euler_step(x, v, sigma, sigma_next))
    assert torch.equal(std, torch.zeros(3, 1, 1, dtype=torch.float64))
    mean, std = renoise(x, v, sigma, sigma_next, 1.0)
    torch.testing.assert_close(mean, (1 - sigma_next)[:, None, None] * clean_estimate(x, v, sigma))
    torch.testing.assert_close(std.flatten(), sigma_next)


@pytest.mark.parametrize("eta", [0.5, 1.0, 1.7])
def test_two_precise_steps_of_a_point_mass_are_one(eta):
    """All data is m, so that data and noise are known exactly: the next noise is rho noise + sqrt(1 - rho^2) w, and
    the shares rho of two steps multiply to that of the step that spans both; each leaves the noise level.
    """
    m, noise = 0.7, torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # mean 0, variance 1, nothing drawn

    def step(noise, now, then):
        now, then = (torch.full((2,), level, dtype=torch.float64) for level in (now, then))
        mean, std = precise_step((1 - now[:, None]) * m + now[:, None] * noise, noise - m, now, then, eta)
        return mean, std, (mean - (1 - then[:, None]) * m) / then[:, None]  # the last: what is left of the noise

    _, _, kept = step(noise, 0.9, 0.6)
    _, _, kept = step(kept, 0.6, 0.3)
    mean, std, at_once = step(noise, 0.9, 0.3)
    torch.testing.assert_close(kept, at_once)
    torch.testing.assert_close(mean.mean(), torch.tensor(0.7 * m, dtype=torch.float64))
    torch.testing.assert_close(mean.var(correction=0) + std[0, 0] ** 2, torch.tensor(0.3**2, dtype=torch.float64))
    mean, std, _ = step(noise, 1.0, 0.3)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.7 * m))  # all noise is drawn afresh
    torch.testing.assert_close(std, torch.full_like(std, 0.3))


def test_precise_steps_keep_the_variance_that_renoising_shrinks():
    """Data N(0, s^2), whose velocity is linear: a step maps variance V to a^2 V + std^2, with a its mean at x = 1, and
    the marginal at sigma is (1 - sigma)^2 s^2 + sigma^2. PRECISE ends off by O(1 / N); renoising with the same eta
    does not get nearer.
    """
    s = 1.5

    def end(kernel, steps: int) -> float:
        levels = torch.linspace(1, 0.1, steps + 1, dtype=torch.float64)
        variance = torch.ones((), dtype=torch.float64)
        for sigma, sigma_next in itertools.pairwise(levels):
            slope = (sigma - (1 - sigma) * s**2) / ((1 - sigma) ** 2 * s**2 + sigma**2)
            a, std = kernel(torch.ones(1, 1).double(), slope.view(1, 1), sigma[None], sigma_next[None], 0.7)
            variance = a.squeeze() ** 2 * variance + std.squeeze() ** 2
        return float(variance) / (0.9**2 * s**2 + 0.1**2) - 1

    precise = [end(precise_step, steps) for steps in (250, 500, 1000)]
    assert abs(precise[2]) < 3e-3
    assert [a / b for a, b in itertools.pairwise(precise)] == pytest.approx([2.0, 2.0], rel=0.05)
    assert end(renoise, 250) == pytest.approx(end(renoise, 1000), abs=0.01)
    assert end(renoise, 1000) < -0.2


def test_gaussian_log_probability_is_that_of_torch_and_the_other_form_its_quadratic_part():
    x, mean, std = random(4, 3, 2), random(4, 3, 2, seed=1), (0.1 + random(4, seed=2).abs())[:, None, None]
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean(dim=(1, 2))
    torch.testing.assert_close(log_probability(x, mean, std, "gaussian"), expected)
    constant = -(std.log() + math.log(2 * math.pi) / 2).flatten()
    torch.testing.assert_close(log_probability(x, mean, std), 2 * std.flatten() ** 2 * (expected - constant))


def test_log_probability_refuses_an_unknown_form():
    with pytest.raises(ValueError, match="'sum': choose 'coefficients_preserving' or 'gaussian'"):
        log_probability(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "sum")


# ---- the adjoint ----------------------------------------------------------------------------------------------------


def nonlinear_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    w = random(3, 3, seed=7)
    return torch.tanh(x @ w) * (1 + sigma[:, None]) + 0.3 * x


def trajectory(x: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    states = [x]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        states.append(euler_step(states[-1], nonlinear_velocity(states[-1], sigma.expand(len(x))), sigma, sigma_next))
    return states


def test_adjoint_is_the_gradient_of_the_end_with_respect_to_every_later_state():
    """In double precision and on a shifted grid, so that a wrong sign, step size or index cannot pass."""
    sigmas = shift_sigmas(uniform_sigmas(4), 3.0).double()
    states = trajectory(random(2, 3).requires_grad_(), sigmas)
    reward = (states[-1] ** 3).sum()
    expected = torch.autograd.grad(reward, states[1:])  # the gradients at x_1 .. x_N: adjoint k is the one at x_{k+1}
    adjoints, _ = OdeDynamics().carry(nonlinear_velocity, torch.stack(states[:-1]).detach(), sigmas, expected[-1])
    torch.testing.assert_close(adjoints, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_adjoint_of_a_linear_velocity_is_a_product():
    """v = a x: every step multiplies by 1 - h a, and so does the adjoint on its way back."""
    a, sigmas = 0.7, torch.tensor([0.9, 0.5, 0.2, 0.0])
    adjoints, _ = OdeDynamics().carry(lambda x, sigma: a * x, torch.ones(3, 1, 1), sigmas, torch.full((1, 1), 2.0))
    expected = [2 * (1 - 0.3 * a) * (1 - 0.2 * a), 2 * (1 - 0.2 * a), 2.0]
    torch.testing.assert_close(adjoints.flatten(), torch.tensor(expected))


def test_one_step_needs_no_jacobian():
    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")

    adjoints, _ = OdeDynamics().carry(velocity, torch.ones(1, 2, 3), torch.tensor([0.4, 0.0]), torch.full((2, 3), 5.0))
    assert torch.equal(adjoints, torch.full((1, 2, 3), 5.0))


@pytest.mark.parametrize("dynamics", [OdeDynamics(), MemorylessDynamics()], ids=["ode", "memoryless"])
def test_the_velocities_that_come_with_the_adjoint_are_those_at_all_states_but_the_first(dynamics):
    """Bit for bit, and without a graph: whoever asks for the adjoint need not ask the network again."""
    sigmas = shift_sigmas(uniform_sigmas(4), 3.0).double()
    states = torch.stack(trajectory(random(2, 3), sigmas)[:-1])
    _, velocities = dynamics.carry(nonlinear_velocity, states, sigmas, random(2, 3, seed=1))
    expected = [nonlinear_velocity(x, sigma.expand(2)) for x, sigma in zip(states[1:], sigmas[1:-1], strict=True)]
    assert torch.equal(velocities, torch.stack(expected))
    assert not velocities.requires_grad


def test_the_adjoint_hands_on_what_its_product_returns_as_velocity():
    """A product that differs from the Jacobian's, as in the full adjoint: each velocity stands where its state does."""
    sigmas, states = torch.tensor([0.9, 0.5, 0.2, 0.0]), random(3, 2, 4).float()

    def product(x: Tensor, sigma: Tensor, sigma_next: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(g), 10 * x + (sigma - sigma_next)[:, None]

    adjoints, velocities = carry_adjoint(product, states, sigmas, torch.ones(2, 4))
    assert torch.equal(adjoints, torch.ones(3, 2, 4))
    steps = (sigmas[1:3] - sigmas[2:])[:, None, None]
    torch.testing.assert_close(velocities, 10 * states[1:] + steps)


def test_a_vector_jacobian_product_comes_with_the_velocity():
    """v = x A: the product is g A^T, and the velocity is that of the call that was differentiated, without a graph."""
    a, x, g = random(3, 3), random(2, 3, seed=1), random(2, 3, seed=2)
    calls = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return sigma[:, None] * x @ a

    product, v = vector_jacobian_product(velocity, x, torch.tensor([0.5, 2.0]).double(), g)
    scale = torch.tensor([[0.5], [2.0]]).double()
    torch.testing.assert_close(product, scale * g @ a.T)
    torch.testing.assert_close(v, scale * x @ a)
    assert not v.requires_grad
    assert not product.requires_grad
    assert calls == [True]


def test_a_velocity_moved_against_the_adjoint_raises_the_reward():
    """The control enters as v_base - g: a first-order step along it must gain |g|^2 h."""
    sigmas = shift_sigmas(uniform_sigmas(6), 3.0).double()
    states = trajectory(random(2, 3), sigmas)
    adjoints, _ = OdeDynamics().carry(nonlinear_velocity, torch.stack(states[:-1]), sigmas, 3 * states[-1] ** 2)
    small, x = 1e-6, states[0]
    for k in range(6):
        x = euler_step(x, nonlinear_velocity(x, sigmas[k].expand(2)) - small * adjoints[k], sigmas[k], sigmas[k + 1])
    gain = float((x**3).sum() - (states[-1] ** 3).sum()) / small
    expected = float(((sigmas[:-1] - sigmas[1:])[:, None, None] * adjoints**2).sum())
    assert gain == pytest.approx(expected, rel=1e-4)


# ---- costs of the control -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["2", "4", "2+4"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_best_control_maximises_what_it_should_and_inverts_the_gradient_of_its_cost(order, weight):
    """Against a numerical maximisation of <u, g> - L(u), and grad L(grad L*(g)) = g."""
    g = random(3, 4, 2)
    best = best_control(g, order, weight)
    torch.testing.assert_close(control_cost_gradient(best, order, weight), g)
    u = torch.zeros_like(g).add_(0.1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [u], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        value = (8 * control_cost(u, order, weight) - (u * g).flatten(1).sum(dim=1)).sum()
        value.backward()
        return value

    optimizer.step(objective)
    torch.testing.assert_close(u.detach(), best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["2", "4", "2+4"])
def test_the_gradient_of_a_cost_is_that_of_autograd(order):
    u = random(3, 4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(8 * control_cost(u, order, 0.7).sum(), u)
    torch.testing.assert_close(control_cost_gradient(u, order, 0.7), gradient)


@pytest.mark.parametrize("order", ["2", "4", "2+4"])
def test_no_adjoint_asks_for_no_control(order):
    assert torch.equal(best_control(torch.zeros(2, 3), order, 1.0), torch.zeros(2, 3))
