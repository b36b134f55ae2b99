"""`pairwise`: a judge of two pictures as a reward, by the share of comparisons that each picture of a prompt wins."""

import inspect
import math
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from torch import Tensor

from .base import FunctionReward, Reward, Scores
from .scores import is_list, is_number, shown

Pair = tuple[int, int]


def pairs_of(count: int, budget: int | None) -> list[Pair]:
    """The pairs of `count` pictures that are compared, each picture in equally many of them.

    The pictures stand in a circle. A round compares each with the one k places on, k = 1, 2, ...: `count`
    comparisons, two for each picture, once as the first and once as the second of the pair. The last round of an even
    circle, k = count / 2, has half as many.

    Args:
        count: At least 2.
        budget: The most comparisons, of which whole rounds are taken; None for all pairs.

    Raises:
        ValueError: For a budget below one round.
    """
    pairs: list[Pair] = []
    for k in range(1, count // 2 + 1):
        starts = count // 2 if 2 * k == count else count
        if budget is not None and len(pairs) + starts > budget:
            break
        pairs += [(i, (i + k) % count) for i in range(starts)]
    if not pairs:
        raise ValueError(
            f"`budget` ({budget}) must be at least {count}, the pictures of a prompt (`num_generations`): each is "
            "compared equally often."
        )
    return pairs


class PairwiseReward(Reward):
    """The share of its comparisons that a picture wins among the pictures of its prompt: 0 to 1, on average 1/2.

    Args:
        judge: Called with `images` and `others`, the first and the second pictures of P pairs, both (P, 3, H, W),
            `prompts` (P) and every column of the data set as a list of P values. It returns P numbers, the probability
            that the first is the better one (1 where it wins, 1/2 for a tie), or None where it cannot tell; it may be
            `async`.
        budget: The most comparisons of the pictures of one prompt, at least as many as there are pictures; None
            compares all pairs. Whole rounds are taken, in which each picture is compared twice; see `pairs_of`.
        name: What it is called in logs and files; None for the judge's own name.

    Raises:
        TypeError: For a judge that cannot be called.
        ValueError: For a judge that cannot be called so, and a budget below 2.
    """

    groupwise = True

    def __init__(self, judge: Callable[..., Any], budget: int | None = None, name: str | None = None) -> None:
        if not callable(judge):
            raise TypeError(
                f"`judge` ({judge!r}) must be a function of `images, others, prompts, **columns`, which says how "
                "probably the first picture of each pair is the better one."
            )
        if budget is not None and budget < 2:
            raise ValueError(f"`budget` ({budget}) must be at least 2, or None for all pairs.")
        self.judge, self.budget = judge, budget
        self.function = FunctionReward(judge, name=name)
        self.name = self.function.name

    def __call__(self, /, images: Tensor, prompts: list[str], **columns: Any) -> Scores | Awaitable[Scores]:
        finite = images.flatten(1).isfinite().all(dim=1).tolist()
        pairs = [(i, j) for i, j in pairs_of(len(images), self.budget) if finite[i] and finite[j]]
        if not pairs:
            return self._shares([], [], finite)
        first, second = (torch.tensor(side, device=images.device) for side in zip(*pairs, strict=True))
        of_pairs = {
            name: [value[i] for i, _ in pairs] if isinstance(value, list) else value for name, value in columns.items()
        }
        answer = self.judge(
            images=images[first], others=images[second], prompts=[prompts[i] for i, _ in pairs], **of_pairs
        )
        if inspect.isawaitable(answer):
            return self._awaited(answer, pairs, finite)
        return self._shares(answer, pairs, finite)

    async def _awaited(self, answer: Awaitable[Any], pairs: list[Pair], finite: list[bool]) -> Scores:
        return self._shares(await answer, pairs, finite)

    def _shares(self, answer: Any, pairs: list[Pair], finite: list[bool]) -> Scores:
        """The mean over its comparisons of every picture; None for one without any, NaN for one that is not finite."""
        wins = answer.tolist() if isinstance(answer, Tensor) else answer
        if not is_list(wins):
            raise ValueError(
                f"The judge {self.name!r} returned {shown(answer)} for {len(pairs)} pairs: return a list of answers, "
                "one for each."
            )
        wins = list(wins)
        if len(wins) != len(pairs):
            raise ValueError(
                f"The judge {self.name!r} returned {len(wins)} answers for {len(pairs)} pairs: return one for each."
            )
        earned: list[list[float]] = [[] if good else [math.nan] for good in finite]
        for (first, second), win in zip(pairs, wins, strict=True):
            if win is None:
                continue
            if not (is_number(win) and 0 <= win <= 1):
                raise ValueError(
                    f"The judge {self.name!r} returned {win!r}: return the probability that the first picture is the "
                    "better one, between 0 and 1, or None."
                )
            earned[first].append(float(win))
            earned[second].append(1 - float(win))
        return [sum(shares) / len(shares) if shares else None for shares in earned]

    def to(self, device: torch.device) -> None:
        self.function.to(device)

    def signature(self) -> inspect.Signature:
        judge = self.function.signature()
        return judge.replace(parameters=[p for name, p in judge.parameters.items() if name != "others"])


def pairwise(judge: Callable[..., Any], budget: int | None = None, name: str | None = None) -> PairwiseReward:
    """A reward of a judge that says which of two pictures is the better one; see `PairwiseReward`.

    Args:
        judge: Called with `images`, `others`, `prompts` and columns; returns how probably the first is better.
        budget: The most comparisons of the pictures of one prompt; None for all pairs.
        name: What the reward is called; None for the judge's own name.
    """
    return PairwiseReward(judge, budget, name)
