"""Costs of a control, and the control that is best against a given adjoint.

With d latent dimensions and RMS(u) = |u| / sqrt(d), taken over each latent, the costs are radial (our choice: they
keep the direction of the adjoint and do not depend on the size of the latent):

    order 2:    d c RMS(u)^2 / 2          = c |u|^2 / 2, the quadratic cost
    order 4:    d c RMS(u)^4 / 4
    "2+4":      d c (RMS(u)^2 / 2 + RMS(u)^4 / 4)

The best control against the adjoint g maximises <u, g> - L(u): it points along g, with the RMS s that solves l'(s) =
RMS(g), where L(u) = d l(RMS(u)). Higher orders compress large adjoints; the pure order 4 has infinite slope at g = 0,
which "2+4" mends.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .conversions import expand_like

ControlCostOrder = Literal["2", "4", "2+4"]


def root_mean_square(x: Tensor, batch_dims: int = 1) -> Tensor:
    """RMS of each latent: (B,) of (B, ...), or with two batch dimensions (B, K) of (B, K, ...)."""
    return x.flatten(batch_dims).square().mean(dim=batch_dims).sqrt()


def control_cost(control: Tensor, order: ControlCostOrder, weight: float) -> Tensor:
    """The cost L(u) of controls (B, ...) per latent dimension: (B,).

    Args:
        control: u, (B, ...).
        order: The powers of its RMS that are paid for.
        weight: c, at least 0.
    """
    square = control.flatten(1).square().mean(dim=1)  # no root: its gradient at a control of zero is not a number
    quadratic, quartic = weight * square / 2, weight * square**2 / 4
    return {"2": quadratic, "4": quartic, "2+4": quadratic + quartic}[order]


def control_cost_gradient(control: Tensor, order: ControlCostOrder, weight: float) -> Tensor:
    """Grad L(u) = c u l'(s) / s of controls (B, ...): c u, c s^2 u, or their sum. Arguments as in `control_cost`."""
    square = expand_like(root_mean_square(control), control) ** 2
    factor = {"2": torch.ones_like(square), "4": square, "2+4": 1 + square}[order]
    return weight * factor * control


def best_rms(adjoint_rms: Tensor, order: ControlCostOrder, weight: float) -> Tensor:
    """The RMS s of the best control: the root of c s, c s^3, or c (s + s^3) = RMS(g).

    Args:
        adjoint_rms: RMS(g), of any shape.
        order: The powers of the control's RMS that are paid for.
        weight: c, above 0.
    """
    y = adjoint_rms / weight
    match order:
        case "2":
            return y
        case "4":
            return y ** (1 / 3)
        case "2+4":
            return 2 / math.sqrt(3) * torch.sinh(torch.asinh(1.5 * math.sqrt(3) * y) / 3)


def best_control(adjoint: Tensor, order: ControlCostOrder, weight: float, batch_dims: int = 1) -> Tensor:
    """The control that maximises <u, g> - L(u): grad L*(g), of the shape of g, zero where g is zero.

    Args:
        adjoint: g, (B, ...), or (B, K, ...) with two batch dimensions.
        order: The powers of the control's RMS that are paid for.
        weight: c, above 0.
        batch_dims: The number of leading dimensions of g that number latents.
    """
    rms = root_mean_square(adjoint, batch_dims)
    return expand_like((best_rms(rms, order, weight) / rms).nan_to_num(0.0, posinf=0.0), adjoint) * adjoint
