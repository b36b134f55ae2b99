"""Pictures of pictures."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..sampling.pictures import Pictures
from .captions import Caption

INK, PAPER, RIGHT, WRONG = (40, 40, 40), (255, 255, 255), (46, 140, 70), (200, 60, 50)
GAP, LINE = 12, 20
LEAST_LABEL, MOST_LABEL, LEAST_CAPTION = 60, 240, 96

Box = tuple[int, int, int, int]


def to_pillow(image: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1] as Pillow sees it, rounded as diffusers rounds."""
    return Image.fromarray((image.detach().cpu().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def before_after(
    prompts: list[str], rows: dict[str, Tensor], right: dict[str, list[bool]] | None = None, columns: int = 4
) -> tuple[Image.Image, dict[str, list[Box]]]:
    """A sheet with the pictures of each prompt under one another, one labelled row per model.

    Captions and labels are drawn as `Caption.of` says: in a font with all their letters where one is installed, with
    stand-ins for letters that no font has, and in at most `captions.MOST_LINES` lines.

    Args:
        prompts: B captions.
        rows: Name of a model -> pictures (B, 3, H, W) in [0, 1]; small ones are enlarged by a whole factor to about
            160 pixels, large ones reduced to 256.
        right: For each model, whether each picture is right; those are framed in green and the others in red.
        columns: Prompts side by side.

    Returns:
        The sheet and, for each model, the boxes (left, top, right, bottom) of its pictures on it.
    """
    height, width = next(iter(rows.values())).shape[-2:]
    longest = max(height, width)
    factor = max(1, round(160 / longest)) if longest <= 256 else 256 / longest
    tile_width, tile_height = round(width * factor), round(height * factor)
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    labels = {name: Caption.of(name, MOST_LABEL) for name in rows}
    margin = 2 * GAP + max(LEAST_LABEL, *(label.width for label in labels.values()))
    column = max(tile_width, LEAST_CAPTION)
    captions = [Caption.of(prompt, column) for prompt in prompts]
    text_height = LINE * max(len(caption.lines) for caption in captions)
    block = len(rows) * (tile_height + GAP) + text_height + 2 * GAP
    blocks = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (margin + min(columns, len(prompts)) * (column + GAP), GAP + blocks * block), PAPER)
    pen = ImageDraw.Draw(sheet)
    boxes: dict[str, list[Box]] = {name: [] for name in rows}
    for i, caption in enumerate(captions):
        left, top = margin + (i % columns) * (column + GAP), GAP + (i // columns) * block
        for name, images in rows.items():
            if i % columns == 0:
                middle = top + tile_height // 2 - 8 - (len(labels[name].lines) - 1) * LINE // 2
                labels[name].draw(pen, (GAP, middle), margin - 2 * GAP, LINE, INK)
            sheet.paste(to_pillow(images[i]).resize((tile_width, tile_height), resampling), (left, top))
            boxes[name].append((left, top, left + tile_width, top + tile_height))
            colour = INK if right is None else RIGHT if right[name][i] else WRONG
            pen.rectangle((left - 3, top - 3, left + tile_width + 2, top + tile_height + 2), outline=colour, width=3)
            top += tile_height + GAP
        caption.draw(pen, (left, top), column, LINE, INK)
    return sheet, boxes


def sheet_of(models: Mapping[str, Pictures]) -> tuple[Image.Image, dict[str, list[Box]]]:
    """`before_after` of the pictures of each model, which are framed where the checker judged all of them."""
    right = {name: pictures.right for name, pictures in models.items() if pictures.right is not None}
    prompts = next(iter(models.values())).prompts
    rows = {name: pictures.images for name, pictures in models.items()}
    return before_after(prompts, rows, right if len(right) == len(models) else None)
