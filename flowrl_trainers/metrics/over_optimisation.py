"""Telling a reward that was hacked from pictures that got better."""

import math

from torch import Tensor

LEAST_DIVERSITY = 0.75  # of the base's
MOST_CHANGE = 1.5  # of an image statistic, either way


SURE = 2.0  # standard errors


def standard_error_of_change(before: Tensor, after: Tensor) -> float:
    """Of the mean difference of the scores (N,) of the same pictures, NaN where there is none; infinite for fewer than two differences."""
    difference = (after - before)[(after - before).isfinite()]
    return float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf


def signs_of_over_optimisation(
    base: dict[str, float],
    tuned: dict[str, float],
    trained: dict[str, float],
    judges: list[str],
    errors: dict[str, float],
) -> list[str]:
    """What speaks against what training reached: one clause each, none where it reached nothing or nothing does.

    base, tuned: rows of an evaluation. trained: the weights of the rewards that training saw, negative where they were lowered. judges:
    those that it never saw. errors: the `standard_error_of_change` of each reward; what changed by less than two of them neither rose nor
    fell. The bounds are our choice: a judge below the base's mean, diversity below 75 % of it, edge density or colour entropy changed by a
    factor of 1.5.
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
