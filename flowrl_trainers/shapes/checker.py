"""A judge without training: colour segmentation and geometry decide whether a picture shows what its prompt asks.

It shares no code and no weights with the CLIP reward; it takes the outlines of the five shapes from `scenes`.
"""

import colorsys
from collections import Counter

import numpy as np
from scipy import ndimage
from torch import Tensor

from .scenes import COLOURS, OUTLINES, SHAPES, coverage, parse

FOREGROUND_DISTANCE = 0.22  # Euclidean distance to the background in RGB [0, 1]; shapes have 0.5 and more
MIN_AREA = 8.0  # pixels; smaller specks are not objects. The smallest drawn object covers about 50.
MAX_OBJECTS = 4  # prompts ask for at most two: the objects of a picture with more than four are not identified
MIN_OVERLAP = 0.82  # soft intersection over union with the best template
MAX_HUE_ERROR = 24.0  # degrees
MIN_SATURATION = 0.4

_HUES = {name: 360 * colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for name, rgb in COLOURS.items()}


def _area_and_centroid(outline: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Area and centroid of a polygon by the shoelace formula."""
    x, y = np.array(outline).T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    area = cross.sum() / 2
    cx = ((x + np.roll(x, -1)) * cross).sum() / (6 * area)
    cy = ((y + np.roll(y, -1)) * cross).sum() / (6 * area)
    return abs(float(area)), float(cx), float(cy)


_MOMENTS = {shape: _area_and_centroid(OUTLINES[shape]) for shape in SHAPES}


def _colour_name(rgb: np.ndarray) -> str | None:
    hue, saturation, _ = colorsys.rgb_to_hsv(*rgb.tolist())
    errors = {name: abs((360 * hue - h + 180) % 360 - 180) for name, h in _HUES.items()}
    name = min(errors, key=errors.__getitem__)
    return name if saturation >= MIN_SATURATION and errors[name] <= MAX_HUE_ERROR else None


def _shape_name(mask: np.ndarray) -> str | None:
    """The shape whose template, placed by area and centroid, overlaps a soft mask best; None below `MIN_OVERLAP`."""
    total = float(mask.sum())
    ys, xs = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
    x, y = float((mask * xs).sum()) / total, float((mask * ys).sum()) / total
    overlaps = {}
    for shape, (area, cx, cy) in _MOMENTS.items():
        size = (total / area) ** 0.5
        template = coverage(shape, x - size * cx, y - size * cy, size, mask.shape[0])
        overlaps[shape] = float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def objects_in(image: np.ndarray) -> list[tuple[str | None, str | None]]:
    """The (colour, shape) of every object in a square picture (H, H, 3) with values in [0, 1]; None where unclear."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(image - background, axis=-1)
    labels, _ = ndimage.label(distance > FOREGROUND_DISTANCE, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    regions = [labels == index for index, size in enumerate(sizes, 1) if size >= MIN_AREA]
    if len(regions) > MAX_OBJECTS:
        return [(None, None)] * len(regions)
    return [_object(image, background, distance, labels, region) for region in regions]


def _object(
    image: np.ndarray, background: np.ndarray, distance: np.ndarray, labels: np.ndarray, region: np.ndarray
) -> tuple[str | None, str | None]:
    """The colour and shape of one object; None where unclear.

    Args:
        image: The picture (H, H, 3) in [0, 1].
        background: Its background colour (3,).
        distance: The distance (H, H) of each pixel to the background.
        labels: The number (H, H) of each pixel's region, 0 for the background.
        region: The mask (H, H) of the object.
    """
    core = np.median(image[region & (distance >= np.quantile(distance[region], 0.5))], axis=0)
    # The soft edge of an antialiased shape lies one pixel outside the threshold.
    reach = ndimage.binary_dilation(region) & ((labels == 0) | region)
    direction = core - background
    mask = np.clip((image - background) @ direction / (direction @ direction), 0, 1) * reach
    return _colour_name(core), _shape_name(mask)


def check(images: Tensor, prompts: list[str]) -> list[bool]:
    """Whether each picture shows exactly the objects of its prompt.

    images: (B, 3, H, H) in [0, 1]. prompts: B captions of the world of shapes. Raises `ValueError` for another prompt,
    and for pictures that are not square.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"The checker judges square pictures, not those of {width} x {height} pixels: cut them.")
    pictures = images.detach().float().cpu().permute(0, 2, 3, 1).numpy().astype(np.float64)
    return [Counter(objects_in(p)) == Counter(parse(prompt)) for p, prompt in zip(pictures, prompts, strict=True)]
