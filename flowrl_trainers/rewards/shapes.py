"""The two judges of the embedded default: a CLIP trained on correct captions, and a checker without training."""

import math
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from torch import Tensor

from ..shapes import WEIGHTS, check, parse
from .base import Reward
from .clip import CLIPScore


class ShapesReward(CLIPScore):
    """CLIP score under the shipped CLIP of the world of shapes: -1 to 1. It tolerates rounded outlines.

    Differentiable.
    """

    def __init__(self) -> None:
        super().__init__(WEIGHTS / "clip", name="shapes")


class CheckerReward(Reward):
    """1 if the picture shows exactly the objects of the prompt, else 0: colour segmentation and geometry.

    Not differentiable.
    """

    name = "checker"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pairs = zip(check(images, prompts), finite, strict=True)
        return [float(right) if seen else math.nan for right, seen in pairs]

    def check_rows(self, rows: Dataset) -> None:
        for prompt in rows["prompt"]:
            parse(prompt)


def checker_among(rewards: Iterable[Reward]) -> str | None:
    """What the checker is called among rewards; None if it is none of them."""
    return next((reward.name for reward in rewards if isinstance(reward, CheckerReward)), None)
