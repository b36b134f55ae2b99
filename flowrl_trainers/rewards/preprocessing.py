"""Pictures as vision towers read them, by torch operations alone, so that gradients reach the pixels.

Libraries resize 8-bit pictures with Pillow, which rounds and clips after each of its two passes; here nothing is rounded or clipped.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_and_crop(images: Tensor, size: int) -> Tensor:
    """Shorter side to `size` pixels, then the centre: (B, 3, H, W) to (B, 3, size, size), as transformers' `CLIPImageProcessor`."""
    height, width = images.shape[-2:]
    shorter = min(height, width)
    images = _resize(images, size * height // shorter, size * width // shorter)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def resize_and_pad(images: Tensor, size: int) -> Tensor:
    """Longer side to `size` pixels, then black around: (B, 3, H, W) to (B, 3, size, size), as HPSv2's `ResizeMaxSize`."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = _resize(images, round(height * scale), round(width * scale))
    vertical, horizontal = size - images.shape[-2], size - images.shape[-1]
    left, top = horizontal // 2, vertical // 2
    return F.pad(images, (left, horizontal - left, top, vertical - top))


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as two matrix products: on a GPU torch's own gradient of it is not the same twice."""
    if images.shape[-2:] == (height, width):
        return images
    rows, columns = (_weights(*sizes).to(images) for sizes in zip(images.shape[-2:], (height, width), strict=True))
    return rows @ images @ columns.mT


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _weights(before: int, after: int) -> Tensor:
    """What each of `before` pixels counts in each of `after`: (after, before)."""
    # With antialiasing torch uses Pillow's kernel (a = -1/2), without it another one (a = -3/4).
    return F.interpolate(
        torch.eye(before)[None, None], size=(after, before), mode="bicubic", antialias=True, align_corners=False
    )[0, 0]
