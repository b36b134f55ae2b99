"""Deterministic control of a Gaussian against Riccati equations: what the trainers learn is the optimum."""

import itertools

import numpy as np
import pytest
import torch

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer, VGGFlowConfig, VGGFlowTrainer
from flowrl_trainers.flow import uniform_sigmas

from .gaussian import (
    BETA,
    NUMBERED,
    STD,
    GaussianFlow,
    RadialStepControl,
    SmoothControl,
    StepControl,
    base_coefficients,
    closeness,
    continuous_gains,
    relative_error,
    settings,
)

# ---- the optimum ----------------------------------------------------------------------------------------------------


def discrete_gains(
    sigmas: np.ndarray, std: float, mean: float, scale: float, target: float
) -> list[tuple[float, float]]:
    """The optimal control of the Euler system is `slope x + offset` at every step: dynamic programming from the end.

    The value after step k is p x^2 / 2 + q x, its gradient at x' = f x + e + h u is what the control pays against: u =
    -(p x' + q).
    """
    p, q, gains = scale, -scale * target, []
    for sigma, sigma_next in reversed(list(itertools.pairwise(sigmas))):
        h = sigma - sigma_next
        slope, offset = base_coefficients(sigma, std, mean)
        f, e = 1 - h * slope, -h * offset
        gains.append((-p * f / (1 + h * p), -(p * e + q) / (1 + h * p)))
        p, q = f**2 * p / (1 + h * p), f * (p * e + q) / (1 + h * p)
    return gains[::-1]


def optimal_paths(gains: list[tuple[float, float]], sigmas: torch.Tensor, std: float, mean: float, x: torch.Tensor):
    """The states and controls of the Euler system under affine controls."""
    states, controls = [], []
    for (slope, offset), (sigma, sigma_next) in zip(gains, itertools.pairwise(sigmas.tolist()), strict=True):
        a, b = base_coefficients(sigma, std, mean)
        states.append(x)
        controls.append(slope * x + offset)
        x = x - (sigma - sigma_next) * (a * x + b - controls[-1])
    return states, controls


def learned(network, states: list[torch.Tensor], sigmas: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [network.control(x, sigma.expand(len(x))) for x, sigma in zip(states, sigmas, strict=False)]


START = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))


# ---- adjoint matching -----------------------------------------------------------------------------------------------


class WrongPairing(AdjointMatchingTrainer):
    """Pairs the control at step k with g_k."""

    def _adjoints(self, rollout, terminals, kind):
        h = self.window_sigmas[:-1] - self.window_sigmas[1:]
        slope, _ = base_coefficients(self.window_sigmas[:-1], 0.5, 0.5)
        found = super()._adjoints(rollout, terminals, kind)
        return [(adjoints * (1 - h * slope)[None, :, None], base) for adjoints, base in found]


def train_adjoint_matching(
    folder,
    network,
    dim: int,
    steps: int,
    trainer=AdjointMatchingTrainer,
    target: float = 1.0,
    start: float = 0.0,
    **changes,
):
    """start: the offsets of the control to start from; the reference is the network without any."""
    t = trainer(
        GaussianFlow(network, dim), closeness(target),
        AdjointMatchingConfig(**settings(
            folder, num_inference_steps=steps, adjoint_steps=steps, reward_scale=2.0,
            **({"max_steps": 500, "learning_rate": 0.05} | changes)
        )), NUMBERED,
    )  # fmt: skip
    network.offsets.data.fill_(start)
    t.train()


@pytest.mark.parametrize("steps", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_adjoint_matching_learns_the_discrete_optimum(tmp_path, steps):
    """Quadratic cost, all steps, N(0.5, 0.25) towards 1: within 2 % of dynamic programming, and nearer to it than to
    the continuous one.
    """
    sigmas = uniform_sigmas(steps)
    network = StepControl(sigmas, 2, 0.5, 0.5)
    train_adjoint_matching(tmp_path, network, 2, steps)
    gains = [oracle(sigmas.double().numpy(), 0.5, 0.5, 2.0, 1.0) for oracle in (discrete_gains, continuous_gains)]
    states, controls = optimal_paths(gains[0], sigmas, 0.5, 0.5, START)
    gap = relative_error([slope * x + offset for x, (slope, offset) in zip(states, gains[1], strict=True)], controls)
    error = relative_error(learned(network, states, sigmas), controls)
    print(
        f"{steps} steps: discrete and continuous optimum differ by {100 * gap:.1f} %, "
        f"learned and discrete by {100 * error:.2f} %"
    )
    assert error < 0.02 < gap


def test_the_control_at_a_step_belongs_to_the_adjoint_of_the_next_state(tmp_path):
    """The same training with g_k in the place of g_{k+1} misses the bar."""
    sigmas = uniform_sigmas(8)
    network = StepControl(sigmas, 2, 0.5, 0.5)
    train_adjoint_matching(tmp_path, network, 2, 8, trainer=WrongPairing)
    states, controls = optimal_paths(
        discrete_gains(sigmas.double().numpy(), 0.5, 0.5, 2.0, 1.0), sigmas, 0.5, 0.5, START
    )
    assert relative_error(learned(network, states, sigmas), controls) > 0.05


def open_loop_optimum(
    sigmas: torch.Tensor, x: torch.Tensor, scale: float, target: float, std: float, mean: float
) -> torch.Tensor:
    """The controls (N, B, d) of given starts that minimise the sum of h d RMS(u)^4 / 4 minus the scaled reward, by
    L-BFGS in float64.
    """
    x, sigmas, dim = x.double(), sigmas.double(), x.shape[1]
    controls = torch.full((len(sigmas) - 1, *x.shape), 0.1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [controls],
        lr=1,
        max_iter=4000,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        state, cost = x, torch.zeros((), dtype=torch.float64)
        for u, (sigma, sigma_next) in zip(controls, itertools.pairwise(sigmas), strict=True):
            slope, offset = base_coefficients(sigma, std, mean)
            h = sigma - sigma_next
            cost = cost + h * dim * (u.square().mean(dim=1) ** 2).sum() / 4
            state = state - h * (slope * state + offset - u)
        total = cost + scale * (state - target).square().sum() / 2
        total.backward()
        return total

    optimizer.step(objective)
    return controls.detach()


@pytest.mark.slow
def test_order_four_learns_the_numerical_optimum_in_sixteen_dimensions(tmp_path):
    """By symmetry the optimum points along an affine function of x; its length is nearly a power of that function's,
    as it varies little.
    """
    sigmas, start, target = uniform_sigmas(8), START.reshape(-1, 16), 3.0
    network = RadialStepControl(sigmas, 16, 0.5, 0.5)
    # Where the control is zero, that of order 4 has no direction yet.
    train_adjoint_matching(
        tmp_path, network, 16, 8, target=target, start=0.5, control_cost_order=4, max_steps=600, learning_rate=0.1
    )
    controls = open_loop_optimum(sigmas, start, 2.0, target, 0.5, 0.5)
    states = [start.double()]
    for u, (sigma, sigma_next) in zip(controls, itertools.pairwise(sigmas.tolist()), strict=True):
        slope, offset = base_coefficients(sigma, 0.5, 0.5)
        states.append(states[-1] - (sigma - sigma_next) * (slope * states[-1] + offset - u))
    error = relative_error(learned(network, [x.float() for x in states[:-1]], sigmas), list(controls))
    print(f"order 4: learned and numerical optimum differ by {100 * error:.2f} %")
    assert error < 0.02


# ---- VGG-Flow -------------------------------------------------------------------------------------------------------


STEPS = 20


def train_vgg_flow(folder, **changes) -> VGGFlowTrainer:
    t = VGGFlowTrainer(
        GaussianFlow(SmoothControl(2, STD, 0.0), 2), closeness(1.0),
        VGGFlowConfig(**settings(
            folder, num_inference_steps=STEPS, reward_scale=BETA, boundary_coefficient=10.0,
            finite_difference_step=1e-2, timestep_bins=5, learning_rate=5e-3, **changes,
        )), NUMBERED,
    )  # fmt: skip
    t.train()
    return t


def vgg_flow_error(t: VGGFlowTrainer) -> float:
    """Relative L2 distance of minus the learned control to the continuous value gradient along the optimal path."""
    sigmas = uniform_sigmas(STEPS)
    gains = continuous_gains(sigmas.double().numpy(), STD, 0.0, BETA, 1.0)
    states, controls = optimal_paths(gains, sigmas, STD, 0.0, START)
    return relative_error(learned(t.flow.network, states, sigmas), controls)


def forward_looking_gains(eta, sigmas: np.ndarray) -> list[tuple[float, float]]:
    """The control at the fixed point of v = v_base - beta eta grad r(x - sigma v), which is linear in v as r is
    quadratic.
    """
    gains = []
    for sigma in sigmas[:-1]:
        (slope, offset), strength = base_coefficients(sigma, STD, 0.0), BETA * eta(1 - sigma)
        divisor = 1 + strength * sigma
        gains.append((slope - (slope + strength) / divisor, offset - (offset - strength * 1.0) / divisor))
    return gains


@pytest.mark.parametrize(
    ("name", "eta", "expected"),
    [
        ("constant", lambda t: 1.0, 0.334),
        pytest.param("linear", lambda t: t, 0.405, marks=pytest.mark.slow),
        pytest.param("quadratic", lambda t: t**2, 0.592, marks=pytest.mark.slow),
    ],
)
def test_without_a_value_network_vgg_flow_misses_the_value_gradient_by_what_its_schedule_says(
    tmp_path, name, eta, expected
):
    """Scalar algebra gives the distance of the fixed point to the continuous optimum; training must end within 5 % of
    that distance.
    """
    sigmas = uniform_sigmas(STEPS)
    best = continuous_gains(sigmas.double().numpy(), STD, 0.0, BETA, 1.0)
    states, controls = optimal_paths(best, sigmas, STD, 0.0, START)
    fixed = [
        slope * x + offset
        for x, (slope, offset) in zip(states, forward_looking_gains(eta, sigmas.double().numpy()), strict=True)
    ]
    assert relative_error(fixed, controls) == pytest.approx(expected, rel=0.02)  # the starts are 256 draws
    t = train_vgg_flow(tmp_path, eta_schedule=name, value_network="none", max_steps=250)
    error = vgg_flow_error(t)
    print(f"{name}: {error:.3f}, fixed point {relative_error(fixed, controls):.3f}")
    assert error == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_with_its_value_network_vgg_flow_learns_the_continuous_value_gradient(tmp_path):
    t = train_vgg_flow(tmp_path, eta_schedule="quadratic", max_steps=800)
    error = vgg_flow_error(t)
    print(f"with the residual: {error:.4f}")
    assert error < 0.05
