"""The adjoint of a sampler: how a gradient at the end of a trajectory reads at its earlier states."""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def carry_adjoint(product: Product, states: Tensor, sigmas: Tensor, terminal: Tensor) -> tuple[Tensor, Tensor]:
    """Carry the reward adjoint `g_N` back over K Euler steps, `x_{k+1} = x_k - h_k v(x_k, sigma_k)`.

        g_k = g_{k+1} - h_k product(x_k, sigma_k, sigma_{k+1}, g_{k+1}),    h_k = sigma_k - sigma_{k+1} > 0

    Args:
        product: Maps `(x (B, ...), sigma (B,), sigma_next (B,), g (B, ...))` to a (B, ...) tensor, such as J_v(x,
            sigma)^T g, and the velocity (B, ...) that it met on the way. It is taken at the left end of each step, so
            nothing is evaluated at sigma = 0, and not at the first state, whose adjoint nobody needs: K - 1 times.
        states: (K, B, ...), those before each of the K steps.
        sigmas: (K + 1,), decreasing.
        terminal: (B, ...), `g_N`, the gradient of the scaled reward with respect to the final state.

    Returns:
        The adjoints (K, B, ...), whose entry k is g_{k+1}, the one that belongs to the control at `states[k]`; in this
        pairing the regression is exact for the Euler system, with g_k it would be off by O(h). And the velocities (K -
        1, B, ...) at all states but the first.
    """
    adjoints, velocities = torch.empty_like(states), torch.empty_like(states[1:])
    adjoint = terminal
    for k in reversed(range(len(states))):
        adjoints[k] = adjoint
        if k > 0:
            sigma, sigma_next = sigmas[k].expand(states.shape[1]), sigmas[k + 1].expand(states.shape[1])
            carried, velocities[k - 1] = product(states[k].detach(), sigma, sigma_next, adjoint)
            adjoint = adjoint - (sigmas[k] - sigmas[k + 1]) * carried
    return adjoints, velocities


def vector_jacobian_product(velocity: Velocity, x: Tensor, sigma: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """`J_v(x, sigma)^T vector` and `v(x, sigma)`, (B, ...) each: one forward and one backward pass to the input.

    Args:
        velocity: Maps `(x, sigma)` to a tensor like x.
        x: (B, ...).
        sigma: (B,).
        vector: Of the shape of x.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, sigma)
        return torch.autograd.grad(v, x, grad_outputs=vector)[0], v.detach()
