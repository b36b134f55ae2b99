"""Every caption of the world of shapes, and its split into training and held-out prompts."""

from itertools import permutations
from typing import Literal
from zlib import crc32

from datasets import Dataset

from .scenes import COLOURS, SHAPES, caption

OBJECTS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


def _held_out(pair: list[tuple[str, str]]) -> bool:
    """Whether a scene is held out: a fifth of the unordered pairs and two fifths of the single objects. Our choice.

    A checksum splits the pairs. A Latin square splits the single objects, so that each colour and each shape is held
    out equally often.
    """
    if len(pair) == 1:
        ((colour, shape),) = pair
        return (list(COLOURS).index(colour) + SHAPES.index(shape)) % 5 in (0, 2)
    return crc32(caption(sorted(pair)).encode()) % 5 == 0


def all_prompts() -> list[str]:
    """All 625 captions: 25 of one object and 600 ordered pairs of different objects."""
    singles = [[o] for o in OBJECTS]
    return [caption(objects) for objects in singles + [list(p) for p in permutations(OBJECTS, 2)]]


def prompts(split: Literal["train", "held_out"] = "train") -> Dataset:
    """The prompts of one split as a `datasets.Dataset` with the column `prompt`.

    No held-out prompt describes the same objects as a training prompt. Raises `ValueError` for another split.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"`split` is {split!r}: choose 'train' or 'held_out'.")
    scenes = [[o] for o in OBJECTS] + [list(p) for p in permutations(OBJECTS, 2)]
    return Dataset.from_dict({"prompt": [caption(s) for s in scenes if _held_out(s) == (split == "held_out")]})
