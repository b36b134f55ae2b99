"""What is measured of pictures, as metrics of the `evaluate` library.

from flowrl_trainers.metrics import Diversity
Diversity().compute(images=pictures, prompts=prompts)          # pictures of Pillow
Diversity(clip.image_embeddings).compute(images=..., prompts=...)  # in the feature space of a CLIP reward
"""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from ..shapes import check
from .diversity import diversity, diversity_by_prompt

Features = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to features (B, D)."""

IMAGES = {"images": datasets.Image(), "prompts": datasets.Value("string")}


def as_tensor(images: list[Any]) -> Tensor:
    """Pictures of Pillow, of one size, as (B, 3, H, W) float32 in [0, 1]."""
    return torch.stack(
        [
            torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
            for image in images
        ]
    )


class _PictureMetric(evaluate.Metric):
    """A metric of pictures: its class says what it is (docstring) and what it takes (`takes`)."""

    takes: dict[str, Any] = IMAGES

    def __init__(self, space: Features | None = None, **kwargs: Any) -> None:
        """space: what maps pictures to the features that are compared; None for pixels."""
        self.space = space
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=", ".join(self.takes),
            features=datasets.Features(self.takes),
        )

    def _placed(self, images: list[Any]) -> Tensor:
        """Pictures as points: pixels as they are, or features shaped so that root mean square distance is Euclidean distance."""
        pictures = as_tensor(images)
        if self.space is None:
            return pictures
        with torch.no_grad():
            found = self.space(pictures).float()
        return found * found.shape[1] ** 0.5


class Diversity(_PictureMetric):
    """Mean distance between the pictures of a prompt: root mean square over pixels, or Euclidean between features. `accepted`, one bool
    per picture, leaves wrong pictures out. NaN where no prompt has two.
    """

    def _compute(self, images: list[Any], prompts: list[str], accepted: list[bool] | None = None) -> dict[str, float]:
        return {"diversity": diversity(self._placed(images), prompts, accepted)}


class PriorPreservation(_PictureMetric):
    """Mean distance between a tuned picture and the base model's of the same prompt and seed, and that between the base's own pictures of
    a prompt, as a yardstick: `prior_distance` and `prior_spread`.
    """

    takes = IMAGES | {"base_images": datasets.Image()}

    def _compute(self, images: list[Any], prompts: list[str], base_images: list[Any]) -> dict[str, float]:
        tuned, base = self._placed(images), self._placed(base_images)
        distances = (tuned - base).square().flatten(1).mean(dim=1).sqrt()
        spread = diversity_by_prompt(base, prompts).values()
        return {
            "prior_distance": float(distances.mean()),
            "prior_spread": sum(spread) / len(spread) if spread else float("nan"),
        }


class MeanReward(evaluate.Metric):
    """The mean of scores, those that are missing (None) left out, and their share."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"scores": datasets.Value("float64")})
        return evaluate.MetricInfo(
            description=self.__doc__ or "", citation="", inputs_description="scores", features=features
        )

    def _compute(self, scores: list[float | None]) -> dict[str, float]:
        present = [s for s in scores if s is not None and s == s]
        mean = sum(present) / len(present) if present else float("nan")
        return {"mean_reward": mean, "missing": 1 - len(present) / len(scores)}


class CheckerAccuracy(_PictureMetric):
    """The share of pictures of the world of shapes that show what their prompt asks for."""

    def _compute(self, images: list[Any], prompts: list[str]) -> dict[str, float]:
        return {"checker_accuracy": float(np.mean(check(as_tensor(images), prompts)))}
