"""One step of a sampler from `sigma` down to `sigma_next`, without and with noise, and the probability of the latter."""

import math
from typing import Literal

import torch

from .conversions import clean_estimate, expand_like, noise_estimate


def euler_step(x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """One Euler step of the ODE `dx/dsigma = velocity`: `x + (sigma_next - sigma) velocity`.

    x, velocity: (B, ...) float32. sigma, sigma_next: (B,) or () in [0, 1].
    """
    return x + expand_like(sigma_next - sigma, x) * velocity


def renoise(
    x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of one coefficients-preserving step (arXiv 2509.05952, in our time direction).

        data = x - sigma velocity,   noise = x + (1 - sigma) velocity
        mean = (1 - sigma') data + sigma' cos(pi eta / 2) noise,   std = sigma' sin(pi eta / 2)

    eta in [0, 1]: 0 is the Euler step of the ODE, 1 draws all noise afresh; the noise level is sigma' for every eta.
    x, velocity: (B, ...) float32. sigma, sigma_next: (B,) in [0, 1]. Returns the mean (B, ...) and the standard deviation
    (B, 1, ...), in units of the latent.
    """
    data, noise = clean_estimate(x, velocity, sigma), noise_estimate(x, velocity, sigma)
    level, angle = expand_like(sigma_next, x), math.pi * eta / 2
    return (1 - level) * data + level * math.cos(angle) * noise, level * math.sin(angle)


def flow_grpo_step(
    x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of one Euler-Maruyama step of Flow-GRPO (arXiv 2505.05470, in our time direction).

        g = eta sqrt(sigma / (1 - sigma)),   with sigma' in place of the second sigma where sigma = 1,   dt = sigma' - sigma
        mean = (1 + g^2 dt / (2 sigma)) x + (1 + g^2 (1 - sigma) / (2 sigma)) dt velocity,    std = g sqrt(-dt)

    eta: the noise level a of the paper, 0.7 there; 0 is the Euler step. With few steps the noise of the next state exceeds sigma'. Shapes,
    units and return values as in `renoise`; sigma above 0.
    """
    level, step = expand_like(sigma, x), expand_like(sigma_next - sigma, x)
    room = 1 - expand_like(torch.where(sigma == 1, sigma_next, sigma), x)
    g = eta * (level / room).sqrt()
    mean = (1 + g**2 * step / (2 * level)) * x + (1 + g**2 * (1 - level) / (2 * level)) * step * velocity
    return mean, g * (-step).sqrt()


def log_probability(
    x_next: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    form: Literal["coefficients_preserving", "gaussian"] = "coefficients_preserving",
) -> torch.Tensor:
    """The log-probability of a Gaussian step, as a mean over latent dimensions: (B,).

        gaussian:                  mean_d [ -(x' - mean)^2 / (2 std^2) - log std - log(2 pi) / 2 ]
        coefficients_preserving:   mean_d [ -(x' - mean)^2 ]

    The second is the first times `2 std^2`, without the terms that do not depend on the mean (the form of the code of arXiv
    2509.05952); the weight changes how much each step counts, so clip ranges do not carry over from one form to the other.
    Raises `ValueError` for another form. Gaussian: std > 0.
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
