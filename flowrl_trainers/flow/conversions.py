"""Data, noise, state and velocity: any two of them at a known sigma give the other two."""

from torch import Tensor


def expand_like(values: Tensor, x: Tensor) -> Tensor:
    """`values` with trailing dimensions of size 1, so that they broadcast with `x`.

    values: of the leading shape of `x`: () for one value, (B,) for one per latent of (B, ...), (B, K) for one per
    state of (B, K, ...).
    """
    return values.reshape(*values.shape, *[1] * (x.dim() - values.dim()))


def interpolate(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The state `x = (1 - sigma) data + sigma noise`.

    Args:
        data: (B, ...), or (B, K, ...).
        noise: Of the shape of `data`.
        sigma: (B,), or (B, K), in [0, 1].
    """
    sigma = expand_like(sigma, data)
    return (1 - sigma) * data + sigma * noise


def velocity_between(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity `dx/dsigma = noise - data` of the straight path between two points of the same shape."""
    return noise - data


def clean_estimate(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The data that a velocity points to, `x - sigma velocity`: exact if the path from `x` is straight.

    Args:
        x: States (B, ...), or (B, K, ...).
        velocity: Of the shape of `x`.
        sigma: (B,), or (B, K), in [0, 1].
    """
    return x - expand_like(sigma, x) * velocity


def noise_estimate(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a velocity comes from, `x + (1 - sigma) velocity`. Arguments as in `clean_estimate`."""
    return x + (1 - expand_like(sigma, x)) * velocity
