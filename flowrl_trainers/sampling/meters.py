"""What an evaluation measures of pictures: meters that see every batch and say at the end what they found."""

from collections import Counter
from typing import Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..metrics import colour_entropy, edge_density, mean_distance
from ..rewards import CheckerReward, Reward
from ..rewards.shapes import checker_among
from .prompt_groups import Example


class Meter(Protocol):
    """Of the pictures of one process's rows, which come prompt by prompt."""

    def add(self, examples: list[Example], images: Tensor, scores: Tensor) -> None:
        """Look at a batch.

        Args:
            examples: B rows.
            images: (B, 3, H, W) in [0, 1], or vectors (B, d).
            scores: (B, number of rewards), NaN for None.
        """

    def row(self) -> dict[str, float]:
        """What was found, over all processes; all of them must call this."""


class RewardMeter:
    """`reward/NAME`, the mean of every reward over rows with a score; `checker_accuracy` is the checker's."""

    def __init__(self, rewards: list[Reward]) -> None:
        self.rewards = rewards
        self.scores: list[list[float]] = []
        self.by_reward: dict[str, Tensor] = {}  # (N,) of all rows, in an order that is always the same

    def add(self, examples: list[Example], images: Tensor, scores: Tensor) -> None:
        self.scores += scores.tolist()

    def row(self) -> dict[str, float]:
        everything = torch.tensor(gather_object(self.scores), dtype=torch.float64)
        everything = torch.where(everything.isfinite(), everything, torch.nan)
        self.by_reward = {r.name: column for r, column in zip(self.rewards, everything.unbind(dim=1), strict=True)}
        row = {f"reward/{name}": float(column.nanmean()) for name, column in self.by_reward.items()}
        checker = checker_among(self.rewards)
        return row if checker is None else row | {"checker_accuracy": row[f"reward/{checker}"]}


class StatisticsMeter:
    """The means of `edge_density` and `colour_entropy`; nothing of models of vectors, which have no edges."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def add(self, examples: list[Example], images: Tensor, scores: Tensor) -> None:
        if images.dim() == 4:
            self.found += torch.stack([edge_density(images), colour_entropy(images)], dim=1).tolist()

    def row(self) -> dict[str, float]:
        found = gather_object(self.found)
        if not found:
            return {}
        edges, entropy = (sum(column) / len(column) for column in zip(*found, strict=True))
        return {"edge_density": edges, "colour_entropy": entropy}


class DiversityMeter:
    """The mean distance between the pictures of a prompt, over prompts with two pictures that count; left out without
    any.

    Pictures that the checker rejects do not count, where it is among the rewards. Only the pictures of one prompt are
    kept.

    Args:
        rewards: Of the scores.
        rows: All examples of this process in their order, so that it is known when a prompt is done.
    """

    def __init__(self, rewards: list[Reward], rows: list[Example]) -> None:
        self.checker = next((i for i, reward in enumerate(rewards) if isinstance(reward, CheckerReward)), None)
        self.left = Counter(example.prompt for example in rows)
        self.kept: dict[str, list[Tensor]] = {}
        self.distances: list[float] = []

    def add(self, examples: list[Example], images: Tensor, scores: Tensor) -> None:
        for image, example, score in zip(images.cpu(), examples, scores.tolist(), strict=True):
            prompt = example.prompt
            if self.checker is None or score[self.checker] == 1:
                self.kept.setdefault(prompt, []).append(image)
            self.left[prompt] -= 1
            group = self.kept.pop(prompt, []) if self.left[prompt] == 0 else []
            if len(group) > 1:
                self.distances.append(mean_distance(group))

    def row(self) -> dict[str, float]:
        distances = gather_object(self.distances)
        return {"diversity": sum(distances) / len(distances)} if distances else {}
