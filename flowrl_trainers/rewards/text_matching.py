"""Compares the texts that were read in a picture with the text that was asked for."""
# ruff: noqa: RUF001  the marks of other scripts are what this file is about

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEFT_OUT = re.compile(r"[\s\"“”„«»‹›「」『』]")
_APOSTROPHES = str.maketrans("‘’`´", "''''")


def folded(text: str) -> str:
    """A text as it is compared: without case, spaces and quotation marks, one form of each letter."""
    return _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold())


@dataclass(frozen=True)
class Run:
    """Neighbouring texts `start` to `stop` (exclusive), and their edit distance from the text that was asked for."""

    distance: int
    start: int
    stop: int


def best_run(asked: str, read: Sequence[str]) -> Run:
    """The run of texts which, joined, has the smallest edit distance from a text; the longest of several.

    A row of the Levenshtein matrix is carried along from text to text, so each start costs one comparison. No run is
    worse than none, whose distance is the length of the text.

    Args:
        asked: A text, folded.
        read: Texts in reading order, folded.
    """
    best, longest = Run(len(asked), 0, 0), 0
    for start in range(len(read)):
        row, length = list(range(len(asked) + 1)), 0
        for stop in range(start, len(read)):
            for letter in read[stop]:
                row = _next_row(row, letter, asked)
            length += len(read[stop])
            if (row[-1], -length) < (best.distance, -longest):
                best, longest = Run(row[-1], start, stop + 1), length
            if length >= 2 * len(asked):  # from here on a run has too many letters by the length of the text
                break
    return best


def _next_row(row: list[int], letter: str, asked: str) -> list[int]:
    """The edit distances of the beginnings of `asked` from a text that got one more letter."""
    after = [row[0] + 1]
    for diagonal, above, wanted in zip(row, row[1:], asked, strict=False):
        after.append(min(after[-1] + 1, above + 1, diagonal + (letter != wanted)))
    return after


def text_score(asked: Sequence[str], read: Sequence[str], strict: bool) -> float:
    """How well texts were written, from 0 to 1.

        score = max(0, 1 - (sum of distances + unasked letters, if strict) / sum of lengths)

    The distance of a text is that of its `best_run`; unasked letters are those of texts in none of these runs.

    Args:
        asked: One or more texts, none of them empty when folded.
        read: Texts in reading order.
        strict: Whether unasked letters count.
    """
    wanted, seen = [folded(text) for text in asked], [folded(text) for text in read]
    runs = [best_run(text, seen) for text in wanted]
    errors = sum(run.distance for run in runs) + (sum(map(len, _outside(runs, seen))) if strict else 0)
    return max(0.0, 1.0 - errors / sum(map(len, wanted)))


def unasked_words(asked: Sequence[str], read: Sequence[str]) -> int:
    """The number of words in texts that belong to no `best_run`.

    Args:
        asked: The texts that were asked for.
        read: Texts in reading order.
    """
    seen = [folded(text) for text in read]
    return sum(len(text.split()) for text in _outside([best_run(folded(text), seen) for text in asked], read))


def _outside(runs: Sequence[Run], texts: Sequence[str]) -> list[str]:
    return [text for i, text in enumerate(texts) if not any(run.start <= i < run.stop for run in runs)]


def reading_order(boxes: np.ndarray) -> list[int]:
    """The numbers of boxes from the top to the bottom, and from left to right within a line.

    A box belongs to a line if its middle is above the bottom of the line's first box, whatever its height: letters
    without ascenders make lower boxes.

    Args:
        boxes: (N, 4, 2), the corners in pixels.
    """
    left, top = boxes.min(axis=1).T
    bottom = boxes[..., 1].max(axis=1)
    middle = (top + bottom) / 2
    lines: list[list[int]] = []
    for i in np.argsort(middle, kind="stable").tolist():
        if lines and middle[i] < bottom[lines[-1][0]]:
            lines[-1].append(i)
        else:
            lines.append([i])
    return [i for line in lines for i in sorted(line, key=lambda i: left[i])]
