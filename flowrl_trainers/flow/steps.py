"""One step of a sampler down from `sigma` to `sigma_next`, without noise and with it, and how likely the latter is."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .conversions import clean_estimate, expand_like, noise_estimate

LogProbForm = Literal["coefficients_preserving", "gaussian"]


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One Euler step of the ODE `dx/dsigma = velocity`: `x + (sigma_next - sigma) velocity`.

    Args:
        x: (B, ...) float32.
        velocity: Of the shape of x.
        sigma: (B,) or (), in [0, 1].
        sigma_next: Of the shape of sigma.
    """
    return x + expand_like(sigma_next - sigma, x) * velocity


def euler_steps(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The Euler ODE from the first to the last level: state, velocity and next state of every step, (B, ...) each.

    Args:
        velocity: Maps `(x (B, ...), sigma (B,))` to (B, ...).
        x: The initial state (B, ...).
        sigmas: (N + 1,), decreasing, at least two.
    """
    for sigma, sigma_next in pairwise(sigmas):
        v = velocity(x, sigma.expand(len(x)))
        x_next = euler_step(x, v, sigma, sigma_next)
        yield x, v, x_next
        x = x_next


def renoise(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation (B, 1, ...) of one coefficients-preserving step (arXiv 2509.05952, in our
    time).

        data = x - sigma velocity,   noise = x + (1 - sigma) velocity
        mean = (1 - sigma') data + sigma' cos(pi eta / 2) noise,   std = sigma' sin(pi eta / 2)

    Args:
        x: (B, ...) float32.
        velocity: Of the shape of x.
        sigma: (B,) in [0, 1].
        sigma_next: (B,), below sigma.
        eta: In [0, 1]: 0 is the Euler step of the ODE, 1 draws all noise afresh; the noise level is sigma' for every
            eta.
    """
    data, noise = clean_estimate(x, velocity, sigma), noise_estimate(x, velocity, sigma)
    level, angle = expand_like(sigma_next, x), math.pi * eta / 2
    return (1 - level) * data + level * math.cos(angle) * noise, level * math.sin(angle)


def precise_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation (B, 1, ...) of one step of PRECISE (arXiv 2605.23522), in our time.

        data = x - sigma velocity,   noise = x + (1 - sigma) velocity
        rho  = ( sigma' (1 - sigma) / (sigma (1 - sigma')) )^(eta^2 / 2)
        mean = (1 - sigma') data + sigma' rho noise,   std = sigma' sqrt(1 - rho^2)

    The share of the noise that is drawn afresh shrinks with the step, where `renoise` draws the same share in steps of
    any size, which takes variance from the data. Two steps from one pair of data and noise keep the rho of the step
    that spans both. At sigma = 1 rho is 0, and all noise is drawn afresh.

    Args:
        x: (B, ...) float32.
        velocity: Of the shape of x.
        sigma: (B,), above 0 and at most 1.
        sigma_next: (B,), below sigma.
        eta: Above 0, without a bound; near 0 it is the Euler step of the ODE, but for the step from sigma = 1.
    """
    data, noise = clean_estimate(x, velocity, sigma), noise_estimate(x, velocity, sigma)
    level = expand_like(sigma_next, x)
    odds = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    log_rho = expand_like(eta**2 / 2 * odds.log(), x)  # minus infinity at sigma = 1
    return (1 - level) * data + level * log_rho.exp() * noise, level * (-torch.expm1(2 * log_rho)).sqrt()


def flow_grpo_step(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and standard deviation (B, 1, ...) of one Euler-Maruyama step of Flow-GRPO (arXiv 2505.05470, in
    our time).

        g    = eta sqrt(sigma / (1 - sigma)),    with sigma' in place of the second sigma where sigma = 1
        dt   = sigma' - sigma
        mean = (1 + g^2 dt / (2 sigma)) x + (1 + g^2 (1 - sigma) / (2 sigma)) dt velocity
        std  = g sqrt(-dt)

    With few steps the noise of the next state exceeds sigma'.

    Args:
        x: (B, ...) float32.
        velocity: Of the shape of x.
        sigma: (B,), above 0 and at most 1.
        sigma_next: (B,), below sigma.
        eta: The noise level a of the paper, 0.7 there; 0 is the Euler step.
    """
    level, step = expand_like(sigma, x), expand_like(sigma_next - sigma, x)
    room = 1 - expand_like(torch.where(sigma == 1, sigma_next, sigma), x)
    g = eta * (level / room).sqrt()
    mean = (1 + g**2 * step / (2 * level)) * x + (1 + g**2 * (1 - level) / (2 * level)) * step * velocity
    return mean, g * (-step).sqrt()


def log_probability(
    x_next: Tensor, mean: Tensor, std: Tensor, form: LogProbForm = "coefficients_preserving"
) -> Tensor:
    """The log-probability of a Gaussian step, as a mean over latent dimensions: (B,).

        gaussian:                  mean_d [ -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 ]
        coefficients_preserving:   mean_d [ -(x' - mean)^2 ]

    The second is the first times `2 std^2`, without the terms that do not depend on the mean (the form of the code of
    arXiv 2509.05952). The weight changes how much each step counts, so clip ranges do not carry over from one form to
    the other.

    Args:
        x_next: The state that was drawn, (B, ...).
        mean: Of the shape of x_next.
        std: (B, 1, ...); above 0 for "gaussian".
        form: Which of the two.

    Raises:
        ValueError: For another form.
    """
    square = (x_next - mean) ** 2
    match form:
        case "coefficients_preserving":
            terms = -square
        case "gaussian":
            terms = -square / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
        case _:
            raise ValueError(f"`form` is {form!r}: choose 'coefficients_preserving' or 'gaussian'.")
    return terms.flatten(1).mean(dim=1)
