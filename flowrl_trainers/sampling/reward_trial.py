"""Tries a reward on drawn pictures: everything that `flowrl check_reward` reports."""

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..metrics.reward_check import GradientCheck, Spread, check_gradient, distortions, hacked, spread_of
from ..rewards import Reward
from .prompt_groups import Example
from .scoring import call_rewards

ASCENT_STEPS = 50
TIMED = 3  # passes over the pictures


@dataclass(frozen=True)
class Trial:
    """What was found out.

    Attributes:
        scores: Of the pictures, a list per prompt; NaN for None, infinity for a fault.
        spread: Of the scores.
        moved: Distortion -> mean change of the scores.
        repeats: The largest change of a score when the same pictures are scored again.
        alone: The largest change of a score when each picture is scored by itself.
        seconds: Per picture, of scoring.
        gradient: None for a reward without one.
        ascent: The scores of noise before and after gradient ascent; None without a gradient.
    """

    scores: list[list[float]]
    spread: Spread
    moved: dict[str, float]
    repeats: float
    alone: float
    seconds: float
    gradient: GradientCheck | None
    ascent: tuple[list[float], list[float]] | None

    @property
    def flat(self) -> list[float]:
        """The scores of all pictures."""
        return [score for row in self.scores for score in row]


def try_reward(
    reward: Reward, images: Tensor, examples: list[Example], per_prompt: int, noise: Tensor, context: dict[str, Any]
) -> tuple[Trial, Tensor | None]:
    """Score pictures as they are, again, one by one and distorted; follow the gradient where there is one.

    Args:
        reward: On the device of the images.
        images: (N, 3, H, W) in [0, 1], those of one prompt after another.
        examples: N of them.
        per_prompt: The pictures of each prompt.
        noise: (M, 3, H, W) in [0, 1], at most one per prompt: where gradient ascent begins.
        context: What the reward is called with beside images, prompts and columns.

    Returns:
        What was found out, and the pictures (M, 3, H, W) after the ascent; None for a reward without a gradient.

    Raises:
        ValueError: If no picture has a score.
    """

    def score(of: Tensor, first: int = 0, step: int = 1) -> Tensor:
        return call_rewards([reward], of, examples[first::step][: len(of)], **context)[:, 0]

    def score_noise(of: Tensor) -> Tensor:
        return score(of, step=per_prompt)

    with torch.no_grad():
        scores = score(images)
        if not scores.isfinite().any():
            raise ValueError(
                f"Reward {reward.name!r} scores none of {len(images)} pictures: does it apply to prompts such as "
                f"{examples[0].prompt!r}?"
            )
        seconds, again = [], scores
        for _ in range(TIMED):
            start = time.perf_counter()
            again = score(images).cpu()  # which waits for the device
            seconds.append((time.perf_counter() - start) / len(images))
        alone = torch.cat([score(images[i : i + 1], i) for i in range(len(images))])
        moved = {name: _mean_change(scores, score(changed)) for name, changed in distortions(images).items()}
    gradient, ascent, after = None, None, None
    if reward.differentiable:
        gradient, after = check_gradient(score, images), hacked(score_noise, noise, ASCENT_STEPS)
        with torch.no_grad():
            ascent = (score_noise(noise).tolist(), score_noise(after).tolist())
    trial = Trial(
        scores=scores.reshape(-1, per_prompt).tolist(),
        spread=spread_of(scores.reshape(-1, per_prompt)),
        moved=moved,
        repeats=_largest_change(scores.cpu(), again),
        alone=_largest_change(scores, alone),
        seconds=median(seconds),
        gradient=gradient,
        ascent=ascent,
    )
    return trial, after


def _mean_change(before: Tensor, after: Tensor) -> float:
    change = after - before
    return float(change[change.isfinite()].mean())


def _largest_change(before: Tensor, after: Tensor) -> float:
    """Of the scores; infinite where a picture has a score in one of the two and none in the other."""
    if not torch.equal(before.isfinite(), after.isfinite()):
        return float("inf")
    both = before.isfinite()
    return float((after[both] - before[both]).abs().max())
