"""The memoryless stochastic sampler of arXiv 2409.08861, in our time direction.

For x = (1 - sigma) data + sigma noise and the step h = sigma - sigma' > 0, the paper's process (t = 1 - sigma, v_paper = -v) reads

    x' = x - h (2 v(x, sigma) + x / (1 - sigma')) + sqrt(h) s eps,    s^2 = 2 (sigma + h) / (1 - sigma')

Both offsets by h are the paper's (appendix G): the one below keeps s finite at pure noise, the one above lets late steps learn. It forgets
where it started, which is what makes the optimum of the control problem the tilted distribution p_base exp(lambda r) (theorem 1).
"""

import torch

from .conversions import expand_like


def memoryless_variance(sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """s^2, the noise per unit of time of a step from sigma to sigma_next < sigma; infinite only for sigma_next = 1."""
    return 2 * (2 * sigma - sigma_next) / (1 - sigma_next)


def memoryless_step(
    x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of one step. x, velocity: (B, ...). sigma, sigma_next: (B,) or (). Returns (B, ...) and (B, 1, ...)."""
    h, level = expand_like(sigma - sigma_next, x), expand_like(1 - sigma_next, x)
    return x - h * (2 * velocity + x / level), (h * expand_like(memoryless_variance(sigma, sigma_next), x)).sqrt()
