"""Resizes pictures for vision towers with torch operations alone, so that gradients reach the pixels.

Libraries resize 8-bit pictures with Pillow, which rounds and clips after each of its two passes; these functions
neither round nor clip.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to `size` pixels and crop the centre: (B, 3, H, W) to (B, 3, size, size).

    The geometry is that of transformers' `CLIPImageProcessor`.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    images = _resize(images, size * height // shorter, size * width // shorter)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Resize the longer side to `size` pixels and pad with black: (B, 3, H, W) to (B, 3, size, size).

    The geometry is that of HPSv2's `ResizeMaxSize`.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = _resize(images, round(height * scale), round(width * scale))
    vertical, horizontal = size - images.shape[-2], size - images.shape[-1]
    left, top = horizontal // 2, vertical // 2
    return F.pad(images, (left, horizontal - left, top, vertical - top))


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic resizing with antialiasing, as two matrix products.

    On a GPU the gradient of torch's interpolation varies from run to run; that of a matrix product does not.

    Args:
        images: (B, 3, H, W).
        height: The new height in pixels.
        width: The new width in pixels.
    """
    if images.shape[-2:] == (height, width):
        return images
    rows, columns = (_weights(*sizes).to(images) for sizes in zip(images.shape[-2:], (height, width), strict=True))
    return rows @ images @ columns.mT


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _weights(before: int, after: int) -> Tensor:
    """The weights (after, before) of the old pixels in each new one, along one side of a picture."""
    # With antialiasing torch uses Pillow's kernel (a = -1/2), without it another kernel (a = -3/4).
    unit = torch.eye(before)[None, None]
    return F.interpolate(unit, size=(after, before), mode="bicubic", antialias=True, align_corners=False)[0, 0]
