"""Memoryless adjoint matching (arXiv 2409.08861) on a Gaussian: its discrete fixed point by scalar algebra, and what
that tends to.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.flow import MemorylessDynamics, uniform_sigmas

from .gaussian import NUMBERED, STD, GaussianFlow, StepControl, base_coefficients, closeness, settings
from .helpers import first_examples, first_rollout

MEAN, SCALE, TARGET = 0.5, 2.0, 1.0
TILTED_VARIANCE = 1 / (1 / STD**2 + SCALE)
TILTED_MEAN = TILTED_VARIANCE * (MEAN / STD**2 + SCALE * TARGET)


def affine_step(sigma: float, sigma_next: float, slope: float, offset: float) -> tuple[float, float, float]:
    """The step of the package with velocity `slope x + offset`: factor and constant of its mean, and its variance."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    levels = (torch.full((2,), level, dtype=torch.float64) for level in (sigma, sigma_next))
    mean, std = MemorylessDynamics().step(x, slope * x + offset, *levels)
    assert std is not None
    at_zero, at_one = mean.flatten().tolist()
    return at_one - at_zero, at_zero, float(std[0]) ** 2


def fixed_point(steps: int) -> list[tuple[float, float]]:
    """Slope and offset of the velocity at every step for which v = v_base - s^2 / 2 E[g_{k+1} | x_k] under its own
    process.

    All is affine: E[x_N | x_k] = p x_k + q, and g_{k+1} is `carry` times g_N = -lambda (x_N - target), as base
    Jacobians are constants. The end x_N is the noiseless Euler step of the base velocity from x_{N-1}.
    """
    sigmas = uniform_sigmas(steps).double().tolist()
    h = 1 / steps
    slope, offset = base_coefficients(sigmas[-2], STD, MEAN)
    p, q, carry = 1 - h * slope, -h * offset, 1.0
    gain = -SCALE * (2 * h)  # s^2 / 2 in the last step is (sigma + h) / 1 with sigma = h
    velocities = [(slope - gain * p, offset - gain * (q - TARGET))]
    carry *= 1 - h * slope
    for sigma, sigma_next in reversed(list(itertools.pairwise(sigmas[:-1]))):
        slope, offset = base_coefficients(sigma, STD, MEAN)
        gain = -SCALE * carry * (sigma + h) / (1 - sigma_next)
        # With u = gain (y - target), y = E[x_N | x] = p (x (1 - h / (1 - sigma')) - 2 h (v_base - u)) + q,
        # which is linear in y.
        divisor = 1 - 2 * h * p * gain
        y_slope = p * (1 - h / (1 - sigma_next) - 2 * h * slope) / divisor
        y_offset = (q - 2 * h * p * (offset + gain * TARGET)) / divisor
        velocities.append((slope - gain * y_slope, offset - gain * (y_offset - TARGET)))
        p, q = y_slope, y_offset
        carry *= 1 - h * (2 * slope + 1 / (1 - sigma_next))
    return velocities[::-1]


def samples(velocities: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean and variance of the end of the process from N(0, 1)."""
    sigmas = uniform_sigmas(len(velocities)).double().tolist()
    mean, variance = 0.0, 1.0
    for (slope, offset), (sigma, sigma_next) in zip(velocities[:-1], itertools.pairwise(sigmas[:-1]), strict=True):
        factor, constant, noise = affine_step(sigma, sigma_next, slope, offset)
        mean, variance = factor * mean + constant, factor**2 * variance + noise
    slope, offset = base_coefficients(sigmas[-2], STD, MEAN)
    h = sigmas[-2]
    return mean - h * (slope * mean + offset), (1 - h * slope) ** 2 * variance


def test_the_fixed_point_tends_to_the_tilted_gaussian_with_order_one():
    errors = []
    for steps in (20, 40, 80):
        mean, variance = samples(fixed_point(steps))
        errors.append((mean - TILTED_MEAN, variance - TILTED_VARIANCE))
    for coarse, fine in itertools.pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert 1.7 < a / b < 2.2


@pytest.mark.parametrize("steps", [4, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (8, 20, 40))])
def test_the_tuned_model_draws_what_the_fixed_point_draws(tmp_path, steps):
    """Mean and variance within 2 %, computed from the learned coefficients, so that no sampling error enters."""
    network = StepControl(uniform_sigmas(steps), 1, STD, MEAN)
    t = AdjointMatchingTrainer(
        GaussianFlow(network, 1), closeness(TARGET),
        AdjointMatchingConfig(**settings(
            tmp_path, dynamics="memoryless", num_inference_steps=steps, adjoint_steps=steps, reward_scale=SCALE,
            memoryless_loss_clip=None, per_device_train_batch_size=256, max_steps=10 * steps + 160, learning_rate=0.1,
            adam_beta2=0.99,
        )), Dataset.from_dict({"prompt": [str(n) for n in range(256)]}),
    )  # fmt: skip
    t.train()
    sigmas = uniform_sigmas(steps).double().tolist()
    base = [base_coefficients(sigma, STD, MEAN) for sigma in sigmas[:-1]]
    control = zip(network.slopes.flatten().tolist(), network.offsets.flatten().tolist(), strict=True)
    learned = [(slope - k, offset - b) for (slope, offset), (k, b) in zip(base, control, strict=True)]
    expected = samples(fixed_point(steps))
    print(
        f"{steps} steps: mean and variance {samples(learned)}, fixed point {expected}, "
        f"tilted {TILTED_MEAN, TILTED_VARIANCE}"
    )
    assert samples(learned) == pytest.approx(expected, rel=0.02)


def test_the_sampler_of_the_base_keeps_its_distribution():
    """With the base velocity, the process ends in N(mean, std^2), up to its step size; 4000 steps leave 0.1 %."""
    steps = 4000
    sigmas = uniform_sigmas(steps).double().tolist()
    mean, variance = samples([base_coefficients(sigma, STD, MEAN) for sigma in sigmas[:-1]])
    assert mean == pytest.approx(MEAN, rel=2e-3)
    assert variance == pytest.approx(STD**2, rel=2e-3)


def test_a_step_is_that_of_the_paper_in_its_own_time():
    """t = 1 - sigma, v_paper = -v: x + h (2 v_paper - x / (t + h)) with the variance 2 h (1 - t + h) / (t + h)."""
    x, v = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.7, 0.4]])
    t, h = 0.4, 0.05
    mean, std = MemorylessDynamics().step(x, v, torch.tensor([1 - t]), torch.tensor([1 - t - h]))
    torch.testing.assert_close(mean, x + h * (-2 * v - x / (t + h)))
    torch.testing.assert_close(std, torch.tensor([[2 * h * (1 - t + h) / (t + h)]]).sqrt())
    variance = MemorylessDynamics().variance(torch.tensor(1 - t), torch.tensor(1 - t - h))
    torch.testing.assert_close(variance, torch.tensor(2 * (1 - t + h) / (t + h)))


def test_the_adjoint_is_the_gradient_of_the_end_through_the_means():
    """Against autograd through the chain with its noise held fixed, in double precision, for a velocity that is not
    linear.
    """
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * (1 + sigma[:, None]) + 0.3 * x.roll(1, dims=1)

    states = [torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x, v = states[-1], velocity(states[-1], sigma.expand(2))
        if sigma_next == 0:
            states.append(x - sigma * v)
        else:
            mean, std = MemorylessDynamics().step(x, v, sigma, sigma_next)
            states.append(mean + std * torch.randn(2, 3, generator=generator, dtype=torch.float64))
    expected = torch.autograd.grad((states[-1] ** 3).sum(), states[1:])
    adjoints, _ = MemorylessDynamics().carry(velocity, torch.stack(states[:-1]).detach(), sigmas, expected[-1])
    torch.testing.assert_close(adjoints, torch.stack(expected), rtol=1e-12, atol=1e-12)


def memoryless(folder, **changes) -> AdjointMatchingTrainer:
    config = AdjointMatchingConfig(**settings(
        folder, dynamics="memoryless", num_inference_steps=8, adjoint_steps=8, per_device_train_batch_size=2,
        max_steps=1, **changes
    ))  # fmt: skip
    return AdjointMatchingTrainer(
        GaussianFlow(StepControl(uniform_sigmas(8), 1, STD, MEAN), 1), closeness(TARGET), config, NUMBERED
    )


def trained_steps(t: AdjointMatchingTrainer, rollout: int) -> list[int]:
    """The steps that a rollout trains, the same for both of its images, as the levels of its record tell."""
    examples = [replace(example, key=replace(example.key, rollout=rollout)) for example in first_examples(t)]
    (batch,) = t.make_rollout(examples)
    first, second = batch.record.sigmas
    assert torch.equal(first, second)
    return [int((t.window_sigmas == sigma).nonzero()) for sigma in first]


def test_the_last_quarter_of_the_steps_and_as_many_earlier_ones_are_trained(tmp_path):
    t = memoryless(tmp_path)
    drawn = [trained_steps(t, rollout) for rollout in range(20)]
    assert all(steps[2:] == [6, 7] and len(steps) == 4 for steps in drawn)
    assert {step for steps in drawn for step in steps[:2]} == set(range(6))
    assert trained_steps(t, 3) == drawn[3]


def test_a_state_with_too_large_an_error_teaches_nothing(tmp_path):
    """The clip is in the paper's units: lambda^2 times 1.6 against |(2 / s) u - s g|^2, a sum over the latent."""
    gradients = []
    for clip in (1e9, 1e-9):
        t = memoryless(tmp_path, reward_scale=SCALE, memoryless_loss_clip=clip)
        examples, (batch,) = first_rollout(t)
        loss = sum(t.micro_batch_losses(t.model, batch, t.condition(examples), state).sum() for state in range(4))
        if clip == 1e9:
            s2, g = 2 * batch.record.gains[:, 0], batch.record.adjoints[:, 0, 0]
            first = t.micro_batch_losses(t.model, batch, t.condition(examples), 0)
            torch.testing.assert_close(first, s2 * g**2)  # the control is still zero
        loss.backward()
        gradients.append(t.flow.network.offsets.grad.abs().max())
    assert gradients[0] > 0
    assert gradients[1] == 0


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"adjoint": "full"}, r"`adjoint` \('full'\) must be 'lean' with `dynamics='memoryless'`"),
    ({"loss_type": "hamiltonian"}, "`loss_type` .* must be 'regression'"),
    ({"control_cost_order": 4}, r"`control_cost_order` \('4'\) must be '2'"),
    ({"adjoint_steps": 3}, r"`adjoint_steps` \(3\) must be 20"),
    ({"memoryless_loss_clip": 0.0}, r"`memoryless_loss_clip` \(0.0\) must be above 0"),
    ({"dynamics": "sde"}, "`dynamics` is 'sde': choose 'ode' or 'memoryless'"),
])  # fmt: skip
def test_what_has_no_memoryless_form_is_refused(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdjointMatchingConfig(**(settings(tmp_path) | {"dynamics": "memoryless", "adjoint_steps": 20} | changes))
