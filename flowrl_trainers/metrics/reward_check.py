"""What a reward is worth as a training signal: its spread, what moves it, its gradient, and its first hack.

A reward is a function of images (B, 3, H, W), nominally in [0, 1], and returns scores (B,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Score = Callable[[Tensor], Tensor]

DIFFERENCE_STEP = 1e-3  # of the finite difference, as the root mean square over pixels
ASCENT_STEP = 2e-2  # of gradient ascent, the same


@dataclass(frozen=True)
class Spread:
    """How the scores of several pictures of several prompts are spread.

    Attributes:
        within: Root mean square over prompts of the standard deviation within a prompt.
        between: Standard deviation of the prompts' means.
        level: Share of the prompts all of whose pictures have the same score.
    """

    within: float
    between: float
    level: float


def spread_of(scores: Tensor) -> Spread:
    """The spread of scores (prompts, pictures of each); NaN scores are left out."""
    groups = [row[row.isfinite()].double() for row in scores]
    groups = [group for group in groups if len(group)]
    if not groups:
        return Spread(torch.nan, torch.nan, torch.nan)
    variances = torch.stack([group.var(correction=0) for group in groups])
    means = torch.stack([group.mean() for group in groups])
    level = sum(float(group.max() == group.min()) for group in groups) / len(groups)
    return Spread(float(variances.mean().sqrt()), float(means.std(correction=0)), level)


def distortions(images: Tensor) -> dict[str, Tensor]:
    """The images (B, 3, H, W) in [0, 1], each changed a little in ways that should not matter to people.

    JPEG of quality 75; a Gaussian blur whose standard deviation is 1/256 of the shorter side, and at least half a
    pixel; a tenth darker; resized to three quarters and back. These amounts are our choice.
    """
    height, width = images.shape[-2:]
    smaller = (max(1, round(0.75 * height)), max(1, round(0.75 * width)))
    down = F.interpolate(images, size=smaller, mode="bilinear", antialias=True, align_corners=False)
    return {
        "jpeg": torch.stack([_as_jpeg(image) for image in images]),
        "blur": _blurred(images, max(0.5, min(height, width) / 256)),
        "brightness": 0.9 * images,
        "resize": F.interpolate(down, size=(height, width), mode="bilinear", align_corners=False),
    }


def _as_jpeg(image: Tensor) -> Tensor:
    pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(file, format="JPEG", quality=75)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).to(image) / 255


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(3 * sigma))
    place = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-((place / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=images.shape[1])


@dataclass(frozen=True)
class GradientCheck:
    """The gradient of a reward at some pictures.

    Attributes:
        norm: Mean L2 norm over a picture's pixels.
        predicted: Sum of the changes of the scores that the gradient predicts for a step along itself.
        measured: Sum of the changes that are measured.
    """

    norm: float
    predicted: float
    measured: float

    @property
    def disagreement(self) -> float:
        """How far the measured change is from the predicted one, as a share of the larger."""
        larger = max(abs(self.predicted), abs(self.measured))
        return abs(self.predicted - self.measured) / larger if larger else 0.0


def check_gradient(score: Score, images: Tensor) -> GradientCheck:
    """Compare the gradient with a central difference along its own direction, `DIFFERENCE_STEP` to either side."""
    gradient = _gradient(score, images)
    direction = _unit(gradient)
    with torch.no_grad():
        there, back = (score(images + sign * DIFFERENCE_STEP * direction) for sign in (1, -1))
    predicted = float((gradient * direction).sum() * DIFFERENCE_STEP * 2)
    return GradientCheck(float(gradient.flatten(1).norm(dim=1).mean()), predicted, float((there - back).sum()))


def hacked(score: Score, noise: Tensor, steps: int = 50) -> Tensor:
    """The pictures after gradient ascent on a reward alone, from noise (B, 3, H, W) in [0, 1]: (B, 3, H, W) in [0, 1].

    Each step moves the pixels by `ASCENT_STEP` (root mean square) along the gradient, and clamps them.

    Args:
        score: The reward.
        noise: Where the ascent begins.
        steps: Their number.
    """
    images = noise
    for _ in range(steps):
        images = (images + ASCENT_STEP * _unit(_gradient(score, images))).clamp(0, 1)
    return images


def _gradient(score: Score, images: Tensor) -> Tensor:
    with torch.enable_grad():
        x = images.detach().requires_grad_()
        return torch.autograd.grad(score(x).sum(), x)[0]


def _unit(gradient: Tensor) -> Tensor:
    """Each picture's gradient, its root mean square over pixels made 1; zero stays zero."""
    size = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)
