"""How large a picture is as a JPEG file: rewards without a model, from DDPO (arXiv 2305.13301, section 5.1)."""

from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base import Reward


def jpeg_kilobytes(image: Tensor) -> float:
    """Size of one image (3, H, W) in [0, 1], rounded to 8 bits, as Pillow's JPEG of quality 95, in kilobytes of 1000 bytes."""
    pixels = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8)
    file = BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(file, format="JPEG", quality=95)
    return file.tell() / 1000


class JPEGIncompressibility(Reward):
    """Kilobytes of the picture as a JPEG of quality 95: positive, higher is larger. Not differentiable.

    It grows with the number of pixels, so compare pictures of one size. Fooled by noise, which is what it asks for.
    """

    name = "jpeg_incompressibility"

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        return [jpeg_kilobytes(image) for image in images]


class JPEGCompressibility(Reward):
    """Minus the kilobytes of the picture as a JPEG of quality 95: below 0, higher is smaller. Not differentiable.

    It falls with the number of pixels, so compare pictures of one size. Fooled by a plain picture, which is what it asks for.
    """

    name = "jpeg_compressibility"

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        return [-jpeg_kilobytes(image) for image in images]
