"""From rewards to weights: shaping, explained variance, and the weighting functions of reward-weighted flow matching."""

from typing import Literal

import torch
import torch.nn.functional as F

Weighting = Literal["exponential", "softplus", "positive", "indicator", "linear"]
WEIGHTINGS: tuple[Weighting, ...] = ("exponential", "softplus", "positive", "indicator", "linear")
SMALLEST_SPREAD = 1e-4


def shape_rewards(rewards: torch.Tensor, groups: torch.Tensor, clip: float) -> torch.Tensor:
    """Rewards minus the mean of their group, over the standard deviation of all so centred, clipped to +-clip.

    A standard deviation over everything, as a group whose images are nearly alike would otherwise be blown up. rewards: (M,), NaN for
    images that have none, which get 0. groups: (M,), equal numbers for images of one prompt. clip: above 0, in standard deviations.
    """
    present = ~rewards.isnan()
    _, number = groups.unique(return_inverse=True)
    values = torch.where(present, rewards, 0.0)
    zeros = torch.zeros(int(number.max()) + 1, dtype=rewards.dtype, device=rewards.device)
    means = zeros.index_add(0, number, values) / zeros.index_add(0, number, present.to(rewards.dtype)).clamp(min=1)
    centred = torch.where(present, values - means[number], 0.0)
    spread = (centred.square().sum() / present.sum().clamp(min=1)).sqrt()
    return (centred / (spread + SMALLEST_SPREAD)).clamp(-clip, clip)


def advantage_weights(advantages: torch.Tensor, weighting: Weighting, temperature: float) -> torch.Tensor:
    """The weight f(A) of an advantage, any shape; temperature: tau, above 0.

    exponential   exp(A / tau)               softplus   log(1 + exp(A / tau))
    positive      max(A, 0)                  indicator  1 where A > 0
    linear        A / tau, signed: without an anchor the loss has no minimum
    """
    match weighting:
        case "exponential":
            return torch.exp(advantages / temperature)
        case "softplus":
            return F.softplus(advantages / temperature)
        case "positive":
            return advantages.clamp(min=0)
        case "indicator":
            return (advantages > 0).to(advantages.dtype)
        case "linear":
            return advantages / temperature


def explained_variance(values: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """1 - Var(values - predictions) / Var(values) over the first dimension: 1 is perfect, 0 no better than a constant. (M, ...) each.

    NaN where the values are all equal, and there is nothing to explain.
    """
    spread = values.var(dim=0, correction=0)
    return torch.where(spread > 0, 1 - (values - predictions).var(dim=0, correction=0) / spread, torch.nan)
