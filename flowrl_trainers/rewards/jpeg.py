"""How large a picture is as a JPEG file: rewards without a model, from DDPO (arXiv 2305.13301, section 5.1)."""

import math
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base import Reward


def jpeg_kilobytes(image: Tensor) -> float:
    """Size of Pillow's JPEG of quality 95 of an image (3, H, W) in [0, 1], in kilobytes of 1000 bytes.

    The image is rounded to 8 bits per channel first. NaN for one that is not finite, which would be stored as black.
    """
    if not image.isfinite().all():
        return math.nan
    pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(file, format="JPEG", quality=95)
    return file.tell() / 1000


class JPEGIncompressibility(Reward):
    """Kilobytes of the picture as a JPEG of quality 95: positive, higher for larger files.

    Not differentiable. It grows with the number of pixels, so compare only pictures of one size. Pure noise scores
    best.
    """

    name = "jpeg_incompressibility"

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        return [jpeg_kilobytes(image) for image in images]


class JPEGCompressibility(Reward):
    """Minus the kilobytes of the picture as a JPEG of quality 95: negative, higher for smaller files.

    Not differentiable. It falls with the number of pixels, so compare only pictures of one size. A picture of one
    colour scores best.
    """

    name = "jpeg_compressibility"

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        return [-jpeg_kilobytes(image) for image in images]
