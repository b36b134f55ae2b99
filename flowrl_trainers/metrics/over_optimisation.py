"""Telling a reward that was hacked from pictures that got better."""

import math

import torch

LEAST_DIVERSITY = 0.75  # of the base's
MOST_CHANGE = 1.5  # of an image statistic, either way


SURE = 2.0  # standard errors


def standard_error_of_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of the mean difference of the scores (N,) of the same pictures, NaN where there is none; infinite for fewer than two differences."""
    difference = (after - before)[(after - before).isfinite()]
    return float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf


def signs_of_over_optimisation(
    base: dict[str, float], tuned: dict[str, float], trained: list[str], judges: list[str], errors: dict[str, float]
) -> list[str]:
    """What speaks against the rise of the trained rewards: one clause each, none where they did not rise or nothing does.

    base, tuned: rows of an evaluation. trained: the rewards that training saw. judges: those that it never saw. errors: the
    `standard_error_of_change` of each reward; what changed by less than two of them neither rose nor fell. The bounds are our choice: a
    judge below the base's mean, diversity below 75 % of it, edge density or colour entropy changed by a factor of 1.5.
    """

    def rose(name: str, way: int = 1) -> bool:
        return way * (tuned[f"reward/{name}"] - base[f"reward/{name}"]) > SURE * errors[name]

    if not all(rose(name) for name in trained):
        return []
    signs = [
        f"{name}, which training never saw, fell from {base[f'reward/{name}']:.3g} to {tuned[f'reward/{name}']:.3g}"
        for name in judges
        if rose(name, way=-1)
    ]
    if "diversity" in base and tuned.get("diversity", 0.0) < LEAST_DIVERSITY * base["diversity"]:
        signs.append(f"diversity fell from {base['diversity']:.3g} to {tuned.get('diversity', 0.0):.3g}")
    for name in ("edge_density", "colour_entropy"):
        if name in base and not base[name] / MOST_CHANGE <= tuned[name] <= base[name] * MOST_CHANGE:
            signs.append(f"{name.replace('_', ' ')} went from {base[name]:.3g} to {tuned[name]:.3g}")
    return signs
