"""How different the pictures of one prompt are."""

from itertools import combinations

import torch


def diversity_by_prompt(images: torch.Tensor, prompts: list[str], accepted: list[bool] | None = None) -> dict[str, float]:
    """Mean pairwise pixel distance between the accepted images of each prompt.

        d(a, b) = sqrt(mean over pixels and channels of (a - b)^2)

    Only pictures that a checker accepts count, so a wrong picture is no variety; prompts with fewer than two of them are left out.
    images: (B, 3, H, W) in [0, 1]. accepted: B values, None to count all. Values lie in [0, 1]. Our choice.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if accepted is None or accepted[index]:
            groups.setdefault(prompt, []).append(index)
    distances = {}
    for prompt, indices in groups.items():
        if len(indices) >= 2:
            pairs = torch.tensor(list(combinations(indices, 2)))
            square = (images[pairs[:, 0]] - images[pairs[:, 1]]).square().flatten(1).mean(dim=1)
            distances[prompt] = float(square.sqrt().mean())
    return distances


def diversity(images: torch.Tensor, prompts: list[str], accepted: list[bool] | None = None) -> float:
    """The mean of `diversity_by_prompt` over prompts; NaN if no prompt has two accepted images."""
    distances = diversity_by_prompt(images, prompts, accepted).values()
    return sum(distances) / len(distances) if distances else float("nan")
