"""From rewards to weights: shaping, explained variance, weighting functions, and the credit of a sampler's steps."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .conversions import expand_like

Weighting = Literal["exponential", "softplus", "positive", "indicator", "linear"]
Scale = Literal["batch", "group", "none"]
CreditRule = Literal["mixed", "final", "level", "gain", "return"]
Spread = Literal["centred", "raw"]
SMALLEST_SPREAD = 1e-4
LARGEST_SQUARED = 1e15  # the squares of larger numbers, summed over a rollout, may overflow float32


def with_room(rewards: Tensor) -> Tensor:
    """Rewards (NaN: absent) as they are, or in float64 where the sum of their squares may overflow float32."""
    huge = rewards.numel() > 0 and bool(rewards.nan_to_num(0.0).abs().max() > LARGEST_SQUARED)
    return rewards.double() if huge else rewards


def less_their_mean(rewards: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus the mean of their group, and how many are in each.

    Where those of a group are equal the difference is exactly 0: the lowest is taken off before the mean, which
    rounding would part from the numbers that it is the mean of.

    Args:
        rewards: (M, ...), NaN where there is none, which gets 0.
        number: (M,), the group of each, from 0 to G - 1.

    Returns:
        (M, ...), and (G, ...), at least 1.
    """
    present = ~rewards.isnan()
    zeros = rewards.new_zeros(int(number.max()) + 1, *rewards.shape[1:])
    counts = zeros.index_add(0, number, present.to(rewards.dtype)).clamp(min=1)
    index = expand_like(number, rewards).expand_as(rewards)
    lowest = torch.full_like(zeros, torch.inf).scatter_reduce(0, index, rewards.nan_to_num(torch.inf), "amin")
    above = torch.where(present, rewards - lowest[number], 0.0)
    means = zeros.index_add(0, number, above) / counts
    return torch.where(present, above - means[number], 0.0), counts


def shape_rewards(rewards: Tensor, groups: Tensor, clip: float, spread_of: Spread = "centred") -> Tensor:
    """Rewards minus the mean of their group, over a standard deviation, clipped to +-clip.

    The standard deviation is one of everything, as a group whose images are nearly alike would otherwise be blown up.

    Args:
        rewards: (M,), NaN for images that have none, which get 0.
        groups: (M,), equal numbers for images of one prompt.
        clip: Above 0, in standard deviations; infinity for no bound.
        spread_of: "centred" takes the standard deviation of the centred rewards, "raw" that of the rewards as they
            came, to which differences between groups add.
    """
    dtype, rewards = rewards.dtype, with_room(rewards)
    present = ~rewards.isnan()
    centred, _ = less_their_mean(rewards, groups.unique(return_inverse=True)[1])
    count = present.sum().clamp(min=1)
    if spread_of == "centred":
        spread = (centred.square().sum() / count).sqrt()
    else:
        values = torch.where(present, rewards, 0.0)
        spread = (torch.where(present, values - values.sum() / count, 0.0).square().sum() / count).sqrt()
    return (centred / (spread + SMALLEST_SPREAD)).clamp(-clip, clip).to(dtype)


def advantage_weights(advantages: Tensor, weighting: Weighting, temperature: float) -> Tensor:
    """The weight f(A) of every advantage.

    exponential   exp(A / tau)               softplus   log(1 + exp(A / tau))
    positive      max(A, 0)                  indicator  1 where A > 0
    linear        A / tau, signed: without an anchor the loss has no minimum

    Args:
        advantages: Of any shape.
        weighting: Which f.
        temperature: tau, above 0.
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


def explained_variance(values: Tensor, predictions: Tensor) -> Tensor:
    """1 - Var(values - predictions) / Var(values) over the first dimension of (M, ...) each.

    1 is perfect, 0 no better than a constant.

    NaN where the values are all equal, and there is nothing to explain.
    """
    spread = values.var(dim=0, correction=0)
    return torch.where(spread > 0, 1 - (values - predictions).var(dim=0, correction=0) / spread, torch.nan)


def compare_within_groups(rewards: Tensor, groups: Tensor, scale: Scale) -> Tensor:
    """The advantages of GRPO: rewards minus the mean of their group, column by column, over a standard deviation.

    Columns are never mixed: rewards rise over the steps, and a common mean would blame every early step.

    Args:
        rewards: (M, J), NaN where an image has none, which gets 0.
        groups: (M,), equal numbers for images of one prompt.
        scale: "batch" divides by the standard deviation of the column, "group" by that of the group in the column,
            "none" by nothing (the words of TRL).
    """
    present = ~rewards.isnan()
    _, number = groups.unique(return_inverse=True)
    centred, counts = less_their_mean(rewards, number)
    match scale:
        case "batch":
            total = present.sum(dim=0).clamp(min=1)
            distance = torch.where(present, rewards - rewards.nansum(dim=0) / total, 0.0)
            return centred / ((distance.square().sum(dim=0) / total).sqrt() + SMALLEST_SPREAD)
        case "group":
            squares = torch.zeros_like(counts).index_add(0, number, centred.square())
            return centred / ((squares / counts).sqrt()[number] + SMALLEST_SPREAD)
        case "none":
            return centred


def step_advantages(
    rewards: Tensor, groups: Tensor, rule: CreditRule, scale: Scale, mix: float = 0.5, discount: float = 0.9
) -> Tensor:
    """The advantage of every draw of an N-step sampler from the rewards of its N clean estimates: (M, N) to (M, N -
    1).

    Draw k makes the state of step k + 1, so it had a hand in the rewards of columns k + 1 and later alone; column k
    was settled before it, and its expected policy gradient is zero. With a_j the advantages of column j
    (`compare_within_groups`):

        final    a_{N-1}                                  level    a_{k+1}
        gain     the advantages of R_{k+1} - R_k          return   sum_{j > k} discount^(j-k-1) a_j
        mixed    mix a_{N-1} + (1 - mix) a_{k+1}

    Our choice throughout: the rule of arXiv 2602.01591 could not be read.

    Args:
        rewards: (M, N), NaN where there are none.
        groups: (M,), equal numbers for images of one prompt.
        rule: Which of the above.
        scale: As in `compare_within_groups`.
        mix: In [0, 1].
        discount: In [0, 1].
    """
    dtype, rewards = rewards.dtype, with_room(rewards)
    return _step_advantages(rewards, groups, rule, scale, mix, discount).to(dtype)


def _step_advantages(
    rewards: Tensor, groups: Tensor, rule: CreditRule, scale: Scale, mix: float, discount: float
) -> Tensor:
    if rule == "gain":
        return compare_within_groups(rewards[:, 1:] - rewards[:, :-1], groups, scale)
    levels = compare_within_groups(rewards[:, 1:], groups, scale)
    final = levels[:, -1:].expand_as(levels)
    match rule:
        case "final":
            return final
        case "level":
            return levels
        case "mixed":
            return mix * final + (1 - mix) * levels
        case "return":
            powers = discount ** torch.arange(levels.shape[1], dtype=levels.dtype, device=levels.device)
            later = [(levels[:, k:] * powers[: levels.shape[1] - k]).sum(dim=1) for k in range(levels.shape[1])]
            return torch.stack(later, dim=1)
