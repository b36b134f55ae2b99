"""Grids of noise levels, from 1 (noise) down to 0 (data)."""

import torch


def uniform_sigmas(num_inference_steps: int) -> torch.Tensor:
    """`num_inference_steps + 1` equally spaced levels from 1 to 0, float32."""
    return torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float32)


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Levels moved towards noise: `shift sigma / (1 + (shift - 1) sigma)` (arXiv 2403.03206, equation 23).

    `shift` > 0; 1 leaves the grid as it is. 0 and 1 stay fixed, and the shift by 1 / shift is the inverse. The dynamic
    shift of FLUX with exponent mu is the shift by exp(mu).
    """
    return sigmas / (sigmas + (1 - sigmas) / shift)  # in this form 1 stays 1 for any shift
