"""Data, noise, state and velocity: any two of them at a known sigma give the other two."""

import torch


def expand_like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values `(B,)`, or one value `()`, with as many trailing dimensions of size 1 as `x` `(B, ...)` needs to broadcast."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def interpolate(data: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The state `x = (1 - sigma) data + sigma noise`.

    data, noise: (B, ...). sigma: (B,) in [0, 1].
    """
    sigma = expand_like(sigma, data)
    return (1 - sigma) * data + sigma * noise


def velocity_between(data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The velocity `dx/dsigma = noise - data` of the straight path between two points of the same shape."""
    return noise - data


def clean_estimate(x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The data that a velocity points to: `x - sigma velocity`.

    x, velocity: (B, ...). sigma: (B,) in [0, 1]. Exact if the path from `x` is straight.
    """
    return x - expand_like(sigma, x) * velocity


def noise_estimate(x: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The noise that a velocity comes from: `x + (1 - sigma) velocity`. Shapes as in `clean_estimate`."""
    return x + (1 - expand_like(sigma, x)) * velocity
