"""Pictures with text, drawn by Pillow: the texts of real prompts in three sizes, on plain and on busy backgrounds."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

DATA = Path(__file__).parent / "data"
PROMPTS = (DATA / "ocr_prompts.txt").read_text(encoding="utf-8").splitlines()
SIZE, FONT_SIZES, MARGIN = 512, (24, 40, 64), 24


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def draw_text(lines: list[str], font_size: int = 40, busy: int | None = None, top: int = 180) -> Image.Image:
    """Lines of text, dark on a light background; `busy` seeds a background of bright patches and noise."""
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    if busy is not None:
        random = np.random.default_rng(busy)
        patches = random.integers(110, 256, (8, 8, 3), dtype=np.uint8)
        noise = random.normal(0, 12, (SIZE, SIZE, 3))
        blown_up = np.asarray(Image.fromarray(patches).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        picture = Image.fromarray((blown_up + noise).clip(0, 255).astype(np.uint8))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size)
    for number, line in enumerate(lines):
        pen.text((MARGIN, top + number * round(1.4 * font_size)), line, (20, 20, 60), font)
    return picture


def wrapped(text: str, font_size: int) -> list[str]:
    """The lines of a text that fit into a picture."""
    font, lines = ImageFont.load_default(font_size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > SIZE - 2 * MARGIN and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def picture_of(number: int, text: str) -> Image.Image:
    """The text of prompt `number`: the three sizes by turns, every other one on a busy background."""
    font_size = FONT_SIZES[number % 3]
    return draw_text(wrapped(text, font_size), font_size, busy=number if number % 2 else None)
