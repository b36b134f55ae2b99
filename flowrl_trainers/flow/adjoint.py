"""The adjoint of the Euler sampler: how a gradient at the end of a trajectory reads at its earlier states."""

from collections.abc import Callable

import torch

from .conversions import expand_like

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def carry_adjoint(product: Product, latents: torch.Tensor, sigmas: torch.Tensor, terminal: torch.Tensor) -> torch.Tensor:
    """Carry the reward adjoint `g_N` back over K Euler steps, `x_{k+1} = x_k - h_k v(x_k, sigma_k)`.

        g_k = g_{k+1} - h_k product(x_k, sigma_k, sigma_{k+1}, g_{k+1}),    h_k = sigma_k - sigma_{k+1} > 0

    product: maps `(x (B, ...), sigma (B,), sigma_next (B,), g (B, ...))` to a (B, ...) tensor, such as J_v(x, sigma)^T g. It is taken
    at the left end of each step, so nothing is evaluated at sigma = 0, and not at the first state, whose adjoint nobody needs: K - 1
    times.
    latents: (K, B, ...), the states before each of the K steps. sigmas: (K + 1,), decreasing. terminal: (B, ...), `g_N`, the
    gradient of the scaled reward with respect to the final state.
    Returns (K, B, ...): entry k is g_{k+1}, the one that belongs to the control at `latents[k]`. In this pairing the regression is exact
    for the Euler system; with g_k it would be off by O(h).
    """
    adjoints = torch.empty_like(latents)
    adjoint = terminal
    for k in reversed(range(len(latents))):
        adjoints[k] = adjoint
        if k > 0:
            sigma, sigma_next = sigmas[k].expand(latents.shape[1]), sigmas[k + 1].expand(latents.shape[1])
            adjoint = adjoint - (sigmas[k] - sigmas[k + 1]) * product(latents[k].detach(), sigma, sigma_next, adjoint)
    return adjoints


def vector_jacobian_product(velocity: Velocity, x: torch.Tensor, sigma: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """`J_v(x, sigma)^T vector`: one forward and one backward pass to the input. x, vector: (B, ...). sigma: (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(velocity(x, sigma), x, grad_outputs=vector)[0]


def lean_adjoint(velocity: Velocity, latents: torch.Tensor, sigmas: torch.Tensor, terminal: torch.Tensor) -> torch.Tensor:
    """`carry_adjoint` with the Jacobian of one velocity alone.

    With the frozen base velocity this is the lean adjoint of arXiv 2409.08861 (section 5.2) in its deterministic form, whose fixed point
    is the optimal control; with the velocity that was sampled with, it is the gradient of the final reward at every state.
    """
    return carry_adjoint(lambda x, sigma, _, g: vector_jacobian_product(velocity, x, sigma, g), latents, sigmas, terminal)


def memoryless_adjoint(velocity: Velocity, latents: torch.Tensor, sigmas: torch.Tensor, terminal: torch.Tensor) -> torch.Tensor:
    """`carry_adjoint` for the mean of `memoryless_step`, whose last step, to sigma = 0, is a noiseless Euler step of the ODE.

    product = 2 J_v^T g + g / (1 - sigma'), and J_v^T g in the last step.
    """

    def product(x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        carried = vector_jacobian_product(velocity, x, sigma, g)
        noisy = expand_like(sigma_next > 0, g)
        return torch.where(noisy, 2 * carried + g / expand_like(1 - sigma_next, g), carried)

    return carry_adjoint(product, latents, sigmas, terminal)
