"""Measures of pictures as metrics of the `evaluate` library.

from flowrl_trainers.metrics import Diversity
Diversity().compute(images=pictures, prompts=prompts)  # pictures of Pillow
Diversity(clip.image_embeddings).compute(images=..., prompts=...)  # in the feature space of a CLIP reward
"""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..shapes import check
from .diversity import diversity, diversity_by_prompt

Features = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to features (B, D)."""

PICTURES = {"images", "base_images"}  # the columns of them
IMAGES = {"images": datasets.Image(), "prompts": datasets.Value("string")}


def as_tensor(images: list[Any]) -> Tensor:
    """Pictures of Pillow as (B, 3, H, W) float32 in [0, 1]; raises `ValueError` where they are not of one size."""
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"The pictures have {len(sizes)} sizes, {sizes[0]} and {sizes[1]} among them: make them one.")
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])


def _as_it_is(image: Any) -> Any:
    """A picture of Pillow without its file, upright; anything else untouched."""
    return ImageOps.exif_transpose(image).convert("RGB") if isinstance(image, Image.Image) else image


class _PictureMetric(evaluate.Metric):
    """A metric of pictures. A subclass describes it in the docstring and names its columns in `takes`."""

    takes: dict[str, Any] = IMAGES

    def __init__(self, space: Features | None = None, **kwargs: Any) -> None:
        """Compare pictures by the features to which `space` maps them; None compares pixels."""
        self.space = space
        super().__init__(keep_in_memory=True, **kwargs)

    # `datasets` would store a picture that was opened from a file by its path, though it was edited since.

    def add_batch(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> None:
        """As that of `evaluate.Metric`, with the pictures as they are now."""
        for name in columns.keys() & PICTURES:
            columns[name] = [_as_it_is(image) for image in columns[name]]
        super().add_batch(predictions=predictions, references=references, **columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """As that of `evaluate.Metric`, with the picture as it is now."""
        for name in columns.keys() & PICTURES:
            columns[name] = _as_it_is(columns[name])
        super().add(prediction=prediction, reference=reference, **columns)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=", ".join(self.takes),
            features=datasets.Features(self.takes),
        )

    def _placed(self, images: list[Any]) -> Tensor:
        """Pictures as points: their pixels, or their features (B, D) times sqrt(D).

        The root mean square difference of features that are scaled in this way is their Euclidean distance.
        """
        pictures = as_tensor(images)
        if self.space is None:
            return pictures
        with torch.no_grad():
            found = self.space(pictures).float()
        return found * found.shape[1] ** 0.5


class Diversity(_PictureMetric):
    """Mean distance between the pictures of a prompt: root mean square over pixels, or Euclidean between features.

    `accepted`, one bool per picture, excludes wrong pictures. NaN if no prompt has two accepted pictures.
    """

    def _compute(self, images: list[Any], prompts: list[str], accepted: list[bool] | None = None) -> dict[str, float]:
        return {"diversity": diversity(self._placed(images), prompts, accepted)}


class PriorPreservation(_PictureMetric):
    """`prior_distance`: the mean distance between the tuned and the base model's picture of one prompt and seed.

    `prior_spread` is a yardstick for it: the mean distance between the base model's pictures of one prompt.
    """

    takes = IMAGES | {"base_images": datasets.Image()}

    def _compute(self, images: list[Any], prompts: list[str], base_images: list[Any]) -> dict[str, float]:
        tuned, base = self._placed(images), self._placed(base_images)
        distances = (tuned - base).square().flatten(1).mean(dim=1).sqrt()
        spread = diversity_by_prompt(base, prompts).values()
        mean_spread = sum(spread) / len(spread) if spread else float("nan")
        return {"prior_distance": float(distances.mean()), "prior_spread": mean_spread}


class MeanReward(evaluate.Metric):
    """The mean of the scores that are there, and the share of those that are missing (None or NaN)."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"scores": datasets.Value("float64")})
        description = self.__doc__ or ""
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description="scores", features=features
        )

    def _compute(self, scores: list[float | None]) -> dict[str, float]:
        present = [s for s in scores if s is not None and s == s]
        mean = sum(present) / len(present) if present else float("nan")
        return {"mean_reward": mean, "missing": 1 - len(present) / len(scores) if scores else float("nan")}


class CheckerAccuracy(_PictureMetric):
    """The share of pictures of the world of shapes that show exactly what their prompt asks for."""

    def _compute(self, images: list[Any], prompts: list[str]) -> dict[str, float]:
        return {"checker_accuracy": float(np.mean(check(as_tensor(images), prompts)))}
