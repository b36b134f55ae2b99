"""Distinguishes a model that hacked its reward from one whose pictures got better."""

import math

from torch import Tensor

LEAST_DIVERSITY = 0.75  # as a share of the base model's
MOST_CHANGE = 1.5  # the factor by which an image statistic may rise or fall
SURE = 2.0  # standard errors


def standard_error_of_change(before: Tensor, after: Tensor) -> float:
    """The standard error of the mean change of the scores (N,) of the same pictures.

    Pictures without both scores (NaN) do not count; with fewer than two that count, the error is infinite.
    """
    difference = (after - before)[(after - before).isfinite()]
    return float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf


def signs_of_over_optimisation(
    base: dict[str, float],
    tuned: dict[str, float],
    trained: dict[str, float],
    judges: list[str],
    errors: dict[str, float],
) -> list[str]:
    """The signs that training improved its rewards at the cost of the pictures, one clause each.

    There is no sign unless all trained rewards improved. A reward rose or fell if its mean changed by more than two
    standard errors. Signs are a judge that fell, diversity below 75 % of the base model's, and edge density or colour
    entropy that changed by more than a factor of 1.5. These bounds are our choice.

    Args:
        base: The base model's row of an evaluation.
        tuned: The tuned model's row.
        trained: The rewards that training saw and their weights, which are negative for rewards to be lowered.
        judges: The rewards that training never saw.
        errors: The `standard_error_of_change` of each reward.
    """

    def moved(name: str, way: float) -> bool:
        return math.copysign(1, way) * (tuned[f"reward/{name}"] - base[f"reward/{name}"]) > SURE * errors[name]

    if not trained or not all(moved(name, weight) for name, weight in trained.items()):
        return []
    signs = [
        f"{name}, which training never saw, fell from {base[f'reward/{name}']:.3g} to {tuned[f'reward/{name}']:.3g}"
        for name in judges
        if moved(name, way=-1)
    ]
    if "diversity" in base and tuned.get("diversity", 0.0) < LEAST_DIVERSITY * base["diversity"]:
        signs.append(f"diversity fell from {base['diversity']:.3g} to {tuned.get('diversity', 0.0):.3g}")
    for name in ("edge_density", "colour_entropy"):
        if name in base and not base[name] / MOST_CHANGE <= tuned[name] <= base[name] * MOST_CHANGE:
            signs.append(f"{name.replace('_', ' ')} went from {base[name]:.3g} to {tuned[name]:.3g}")
    return signs
