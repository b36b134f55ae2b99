"""What counts as the scores of a reward."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


class WrongScores(ValueError):
    """What a reward returned is not one real number or None per image."""


def is_number(value: Any) -> bool:
    """Whether a value is one real number of Python, numpy or torch."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0 and not np.iscomplexobj(value.item())
    return isinstance(value, (Real, np.bool_))


def is_list(value: Any) -> bool:
    """Whether a value is several values in an order, and no text."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def checked_scores(reward: str, scores: Any, count: int) -> Tensor | list[float | None]:
    """The scores that a reward returned: a real tensor (B,), as it is; else floats and None, one for each image.

    Args:
        reward: Its name.
        scores: Whatever it returned.
        count: The number B of images.

    Raises:
        WrongScores: For anything but one real number or None per image.
    """
    rule = f"for {count} images: return one score per image"
    if isinstance(scores, Tensor):
        found: Tensor | list[float | None] = scores
        shape = tuple(scores.shape)
        if scores.is_complex():
            raise WrongScores(f"Reward {reward!r} returned complex scores {rule}, a real number.")
    else:
        if not is_list(scores):
            raise WrongScores(f"Reward {reward!r} returned {shown(scores)} {rule}.")
        listed = list(scores)
        for number, score in enumerate(listed):
            if not (score is None or is_number(score)):
                raise WrongScores(f"Reward {reward!r} returned {shown(score)} as score {number} {rule}.")
        found, shape = [None if score is None else _as_float(score) for score in listed], (len(listed),)
    if shape != (count,):
        raise WrongScores(f"Reward {reward!r} returned scores of shape {shape} {rule}.")
    return found


def _as_float(score: Any) -> float:
    try:
        return float(score)
    except OverflowError:  # a whole number beyond float
        return math.inf


def shown(value: Any) -> str:
    """A value in a sentence, with its type, and not longer than one."""
    text = repr(value)
    return "None" if value is None else f"a {type(value).__name__} ({text if len(text) < 80 else text[:76] + ' ...'})"
