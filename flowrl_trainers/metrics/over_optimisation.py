"""Distinguishes a model that hacked its reward from one whose pictures got better."""

import math
from typing import NamedTuple

from torch import Tensor

LEAST_DIVERSITY = 0.75  # as a share of the base model's
MOST_CHANGE = 1.5  # the factor by which an image statistic may rise or fall
SURE = 2.0  # standard errors


class Change(NamedTuple):
    """Of a reward on the same pictures: its means before and after, and the standard error of their difference."""

    before: float
    after: float
    error: float


def paired_change(before: Tensor, after: Tensor) -> Change:
    """The change of the scores (N,) of the same pictures.

    Pictures without both scores (NaN) do not count; with fewer than two that count, the error is infinite.
    """
    both = (after - before).isfinite()
    before, after = before[both].double(), after[both].double()
    error = float((after - before).std()) / math.sqrt(len(after)) if len(after) > 1 else math.inf
    return Change(float(before.mean()), float(after.mean()), error)


def signs_of_over_optimisation(
    base: dict[str, float],
    tuned: dict[str, float],
    trained: dict[str, float],
    judges: list[str],
    changes: dict[str, Change],
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
        changes: The `paired_change` of each reward.
    """

    def moved(name: str, way: float) -> bool:
        change = changes[name]
        return math.copysign(1, way) * (change.after - change.before) > SURE * change.error

    if not trained or not all(moved(name, weight) for name, weight in trained.items()):
        return []
    signs = [
        f"{name}, which training never saw, fell from {changes[name].before:.3g} to {changes[name].after:.3g}"
        for name in judges
        if moved(name, way=-1)
    ]
    if "diversity" in base and tuned.get("diversity", 0.0) < LEAST_DIVERSITY * base["diversity"]:
        signs.append(f"diversity fell from {base['diversity']:.3g} to {tuned.get('diversity', 0.0):.3g}")
    for name in ("edge_density", "colour_entropy"):
        if name in base and not base[name] / MOST_CHANGE <= tuned[name] <= base[name] * MOST_CHANGE:
            signs.append(f"{name.replace('_', ' ')} went from {base[name]:.3g} to {tuned[name]:.3g}")
    return signs
