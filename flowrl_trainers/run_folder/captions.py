"""Captions in any script: which font draws them, what stands for letters that no font has, where lines break."""

import io
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont, features

MOST_LINES = 6
SIZE = 14
JOINERS = "\u200c\u200d"
"""Zero-width letters that change the shape of their neighbours; a font may lack them."""

# Chinese and Japanese have no spaces: a line may break beside each of these letters, but not before closing marks.
_IDEOGRAPH = "\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_CLOSING = "\u3001\u3002\u300b\u300d\u300f\u3011\u3015\u30fc\uff01\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\u2026"
_BREAKABLE = re.compile(rf" |[{_IDEOGRAPH}][{_CLOSING}]*|[^ {_IDEOGRAPH}]+[{_CLOSING}]*")
_FOLLOWING = JOINERS + "\u0e33\u0eb3"  # and the vowels of Thai and Lao that belong to the letter before
_ESCAPE = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\U[0-9a-f]{8}")


@dataclass(frozen=True)
class Typeface:
    """A font and the letters that it has."""

    font: ImageFont.FreeTypeFont
    letters: str

    def fits(self, text: str, width: int) -> bool:
        """Whether a line is at most `width` pixels wide."""
        return self.font.getlength(text) <= width


@dataclass(frozen=True)
class Caption:
    """A text that is ready to be drawn, broken into at most `MOST_LINES` lines."""

    lines: list[str]
    font: ImageFont.FreeTypeFont
    to_the_left: bool

    @property
    def width(self) -> int:
        """That of the longest line, in pixels."""
        return math.ceil(max(self.font.getlength(line) for line in self.lines))

    @classmethod
    def of(cls, text: str, width: int) -> "Caption":
        r"""Choose the font of a text and break it into lines of at most `width` pixels.

        Pillow's font draws the text if it has all its letters; if not, the first font that has them, of matplotlib's
        and of those that matplotlib finds on the system. Where none has them, the one that lacks fewest draws it, and
        each letter that it lacks is written out: symbols by their Unicode names, as in `[rocket]`, letters as Python
        escapes, as in `\u732b`. So the same text may look different on a machine with other fonts. Scripts that run
        to the left need Pillow's raqm, which orders and joins their letters; without it they are written out too.
        Invisible marks of formatting are left out. A text of more than `MOST_LINES` lines ends in an ellipsis, and an
        empty one says that it is empty.
        """
        visible = "".join(c for c in text if c.isspace() or unicodedata.category(c) != "Cf" or c in JOINERS)
        flat = " ".join(visible.split()) or "(empty)"
        face = _typeface_for(flat)
        lines = _wrapped(_spelled(flat, face.letters), face, width)
        first = next((c for c in lines[0] if unicodedata.bidirectional(c) in ("L", "R", "AL")), "L")
        return cls(lines, face.font, _runs_to_the_left(first))

    def draw(
        self,
        pen: ImageDraw.ImageDraw,
        corner: tuple[int, int],
        width: int,
        line_height: int,
        ink: tuple[int, int, int],
    ) -> None:
        """Draw the lines, those that run to the left at the right edge.

        Args:
            pen: that of the sheet.
            corner: left and top of a box.
            width: of the box, in pixels.
            line_height: from one line to the next.
            ink: the colour.
        """
        left, top = corner
        baseline = top + _default().font.getmetrics()[0]  # the same for all fonts, whatever their ascent
        for number, line in enumerate(self.lines):
            place = (left + width if self.to_the_left else left, baseline + number * line_height)
            # Pillow refuses a direction where it has no raqm; there nothing runs to the left.
            direction = "rtl" if self.to_the_left else None
            pen.text(place, line, ink, self.font, anchor="rs" if self.to_the_left else "ls", direction=direction)


def _wrapped(text: str, face: Typeface, width: int) -> list[str]:
    """Fill lines up to a width in pixels: break between words, and within a word that is wider than a line."""
    lines = [""]
    for part in _BREAKABLE.findall(text):
        if face.fits(lines[-1] + part, width):
            lines[-1] += part
            continue
        if not part.strip():  # a space at the end of a full line opens no other
            continue
        lines[-1:] = [lines[-1].rstrip()] if lines[-1].strip() else []
        lines.append("")
        for unit in _units(part.lstrip()):
            if lines[-1] and not face.fits(lines[-1] + unit, width):
                lines.append("")
            lines[-1] += unit
        if len(lines) > MOST_LINES:
            break
    lines = [line for line in lines if line] or [""]
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], _cut(lines[MOST_LINES - 1], face, width)]


def _cut(line: str, face: Typeface, width: int) -> str:
    """A line shortened until an ellipsis fits behind it."""
    ellipsis = next(mark for mark in ("\u2026", "...", "") if set(mark) <= set(face.letters))
    units = list(_units(line))
    while len(units) > 1 and not face.fits("".join(units) + ellipsis, width):
        units.pop()
    return "".join(units).rstrip() + ellipsis


def _units(text: str) -> Iterator[str]:
    """What no line break divides: a letter with its combining marks, or one written as an escape."""
    start = 0
    while start < len(text):
        escape = _ESCAPE.match(text, start)
        end = escape.end() if escape else start + 1
        while end < len(text) and (unicodedata.category(text[end]).startswith("M") or text[end] in _FOLLOWING):
            end += 1
        yield text[start:end]
        start = end


def _runs_to_the_left(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL")


def _missing(text: str, letters: str) -> set[str]:
    """What of a text would be drawn as boxes, or in the wrong order, by a font with these letters."""
    ordered = features.check("raqm")
    visible = set(text) - set(JOINERS)
    return {
        c
        for c in visible
        if c not in letters or unicodedata.category(c) == "Cc" or (not ordered and _runs_to_the_left(c))
    }


def _spelled(text: str, letters: str) -> str:
    """The text with a stand-in for each letter that is missing."""
    missing = _missing(text, letters) | {c for c in JOINERS if c not in letters}
    return " ".join("".join(_stand_in(c) if c in missing else c for c in text).split())


def _stand_in(letter: str) -> str:
    """What is written for a letter that cannot be drawn."""
    name = unicodedata.name(letter, "")
    if letter in JOINERS or name.startswith("VARIATION SELECTOR"):
        return ""
    if name and unicodedata.category(letter).startswith("S"):
        return f" [{name.lower()}] "
    return letter.encode("unicode_escape").decode()


@cache
def _typeface_for(text: str) -> Typeface:
    """The first font with all letters of a text, or else the one that lacks fewest and can write out the others."""
    best = _default()
    fewest = len(_missing(text, best.letters))
    for path in _installed() if fewest else []:
        letters = _letters(path)
        count = len(_missing(text, letters))
        if count < fewest and not _missing(_spelled(text, letters), letters) and (font := _font(path)) is not None:
            best, fewest = Typeface(font, letters), count
        if fewest == 0:
            break
    return best


@cache
def _default() -> Typeface:
    """Pillow's font."""
    font = ImageFont.load_default(size=SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as always where a size is given
    return Typeface(font, _letters_of(io.BytesIO(font.font_bytes)))


@cache
def _installed() -> list[Path]:
    """The fonts that a caption may be drawn in: matplotlib's, then those of the system, plain ones first.

    Fonts of coloured pictures, which Pillow does not draw at the size of text, and those that have a box for every
    letter are left out.
    """
    from matplotlib.font_manager import findSystemFonts  # importing it reads every font where it has no cache yet

    bundled = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

    def rank(path: Path) -> tuple[bool, bool, bool, str]:
        name = path.stem
        return "Regular" not in name, "Sans" not in name, "Mono" in name or "Serif" in name, str(path)

    found = (Path(path) for path in findSystemFonts())
    unfit = ("Color", "LastResort", "Blank")
    return [bundled, *sorted((path for path in found if not any(word in path.stem for word in unfit)), key=rank)]


@cache
def _font(path: Path) -> ImageFont.FreeTypeFont | None:
    """The font of a file; None if it has no outlines that can be drawn at the size of captions."""
    try:
        return ImageFont.truetype(path, SIZE)
    except OSError:
        return None


@cache
def _letters(path: Path) -> str:
    """The letters of a font; none if the file is damaged."""
    try:
        return _letters_of(path)
    except (OSError, RuntimeError):
        return ""


def _letters_of(source: Path | io.BytesIO) -> str:
    return "".join(map(chr, FT2Font(source).get_charmap()))
