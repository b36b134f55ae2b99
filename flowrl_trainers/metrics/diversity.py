"""How different the pictures of one prompt are."""

from itertools import combinations

import torch
from torch import Tensor


def mean_distance(images: list[Tensor]) -> float:
    """The mean distance over all pairs of at least two images (3, H, W) in [0, 1]: a number in [0, 1].

    d(a, b) = sqrt(mean over pixels and channels of (a - b)^2)
    """
    distances = [(a - b).square().mean().sqrt() for a, b in combinations(images, 2)]
    return float(torch.stack(distances).mean())


def diversity_by_prompt(images: Tensor, prompts: list[str], accepted: list[bool] | None = None) -> dict[str, float]:
    """The `mean_distance` between the accepted images of each prompt, in [0, 1]. The definition is ours.

    Only pictures that a checker accepts count, because a wrong picture is no variety. Prompts with fewer than two
    accepted pictures are left out.

    Args:
        images: (B, 3, H, W) in [0, 1].
        prompts: B strings.
        accepted: Whether the checker accepts each of the B images. None: all images count.
    """
    groups: dict[str, list[Tensor]] = {}
    for index, prompt in enumerate(prompts):
        if accepted is None or accepted[index]:
            groups.setdefault(prompt, []).append(images[index])
    return {prompt: mean_distance(group) for prompt, group in groups.items() if len(group) >= 2}


def diversity(images: Tensor, prompts: list[str], accepted: list[bool] | None = None) -> float:
    """The mean of `diversity_by_prompt` over prompts, in [0, 1].

    Args:
        images: (B, 3, H, W) in [0, 1].
        prompts: B strings.
        accepted: Whether the checker accepts each of the B images. None: all images count.

    Returns:
        NaN if no prompt has two accepted images.
    """
    distances = diversity_by_prompt(images, prompts, accepted).values()
    return sum(distances) / len(distances) if distances else float("nan")
