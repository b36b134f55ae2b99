"""Pictures of one or two coloured shapes, drawn by code, and the captions that describe them.

A scene is a list of one or two objects on a plain light background. Its caption is a sentence such as "a red circle"
or "a red circle and a blue square"; the order of the two objects has no meaning.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {
    "red": (214, 48, 40),
    "yellow": (238, 190, 30),
    "green": (46, 158, 72),
    "blue": (44, 96, 214),
    "purple": (146, 58, 190),
}
BACKGROUND = (238, 238, 234)
IMAGE_SIZE = 32

# Outlines in a box of half-width 1, chosen so that all shapes of one size look equally large.
_ARM = 0.34
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(0.96 * math.cos(a), 0.96 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False)],
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "diamond": [(0.0, -1.12), (1.12, 0.0), (0.0, 1.12), (-1.12, 0.0)],
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
_SUPERSAMPLING = 8
REACH = max(abs(c) for outline in OUTLINES.values() for point in outline for c in point)


@dataclass(frozen=True)
class SceneObject:
    """One shape: centre (`x`, `y`) and half-width `size` in pixels; `shade` multiplies the colour's brightness."""

    colour: str
    shape: str
    x: float
    y: float
    size: float
    shade: float = 1.0


def caption(objects: list[SceneObject] | list[tuple[str, str]]) -> str:
    """The sentence for objects, or for (colour, shape) pairs, in the order given."""
    pairs = [(o.colour, o.shape) if isinstance(o, SceneObject) else o for o in objects]
    return " and ".join(f"a {colour} {shape}" for colour, shape in pairs)


def parse(prompt: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs that a caption asks for; raises `ValueError` for any other sentence."""
    pairs, parts = [], prompt.split(" and ")
    for part in parts:
        words = part.split(" ")
        if len(parts) > 2 or len(words) != 3 or words[0] != "a" or words[1] not in COLOURS or words[2] not in SHAPES:
            raise ValueError(
                f"{prompt!r} is not a caption of this world: write 'a COLOUR SHAPE' once or twice, joined by ' and ', "
                f"with colours {', '.join(COLOURS)} and shapes {', '.join(SHAPES)}."
            )
        pairs.append((words[1], words[2]))
    return pairs


def coverage(shape: str, x: float, y: float, size: float, image_size: int = IMAGE_SIZE) -> np.ndarray:
    """The share of each pixel that a shape covers: (image_size, image_size) float32 in [0, 1].

    Args:
        shape: One of `SHAPES`.
        x: The centre in pixels from the left.
        y: The centre in pixels from the top.
        size: The half-width in pixels.
        image_size: The side of the picture in pixels.
    """
    k = _SUPERSAMPLING
    mask = Image.new("L", (image_size * k, image_size * k), 0)
    # Pixel i spans [i, i + 1), but Pillow puts its centre at i: hence the 0.5.
    outline = [((x + size * px) * k - 0.5, (y + size * py) * k - 0.5) for px, py in OUTLINES[shape]]
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    return np.asarray(mask.reduce(k), dtype=np.float32) / 255


def draw(objects: list[SceneObject], image_size: int = IMAGE_SIZE) -> np.ndarray:
    """The picture of a scene: `(image_size, image_size, 3)` uint8."""
    picture = np.tile(np.array(BACKGROUND, dtype=np.float32), (image_size, image_size, 1))
    for o in objects:
        colour = np.clip(np.array(COLOURS[o.colour], dtype=np.float32) * o.shade, 0, 255)
        mask = coverage(o.shape, o.x, o.y, o.size, image_size)[..., None]
        picture = (1 - mask) * picture + mask * colour
    return picture.round().astype(np.uint8)


def random_scene(
    pairs: list[tuple[str, str]], rng: np.random.Generator, image_size: int = IMAGE_SIZE
) -> list[SceneObject]:
    """Objects of the given colours and shapes with random place, size and shade; two objects never touch.

    Half-widths scale with the picture: at 32 pixels, one object has 6 to 10 pixels and each of two has 5.2 to 7.

    Args:
        pairs: One or two pairs (colour, shape).
        rng: The generator of all random draws.
        image_size: The side of the picture in pixels.
    """
    unit = image_size / 32
    low, high = (6.0, 10.0) if len(pairs) == 1 else (5.2, 7.0)
    gap = 2.0 * unit
    while True:
        objects = []
        for colour, shape in pairs:
            size = rng.uniform(low, high) * unit
            margin = REACH * size + 0.5 * unit
            x, y = rng.uniform(margin, image_size - margin, size=2)
            objects.append(SceneObject(colour, shape, float(x), float(y), float(size), float(rng.uniform(0.85, 1.1))))
        if len(objects) == 1:
            return objects
        a, b = objects
        if max(abs(a.x - b.x), abs(a.y - b.y)) >= REACH * (a.size + b.size) + gap:
            return objects
