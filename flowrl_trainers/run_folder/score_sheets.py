"""Pictures of scores: how they are spread, and the best and the worst picture by each reward."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from .captions import Caption
from .gallery import GAP, INK, LINE, PAPER

TILE, SHOWN, FRAME = 192, 4, (200, 200, 200)


def draw_histograms(path: Path, scores: Mapping[str, Sequence[float]]) -> None:
    """Draw a histogram of the finite scores of every reward, side by side.

    Args:
        path: The picture to write.
        scores: Name of a reward -> its scores.
    """
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(4 * len(scores), 3), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        axes.hist(values, bins="auto" if len(set(values)) > 1 else 1, color="tab:blue")
        axes.set(xlabel=name, ylabel="pictures")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def picture_rows(rows: Mapping[str, Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """A sheet with one labelled row of pictures per name, each picture over its caption.

    Args:
        rows: Name of a row -> its pictures and captions; none longer than the first.
    """
    labels = {name: Caption.of(name, TILE) for name in rows}
    margin = 2 * GAP + max(label.width for label in labels.values())
    captions = {name: [Caption.of(caption, TILE) for _, caption in row] for name, row in rows.items()}
    heights = {n: TILE + 2 * GAP + LINE * max((len(c.lines) for c in row), default=1) for n, row in captions.items()}
    width = margin + max(len(row) for row in rows.values()) * (TILE + GAP)
    sheet = Image.new("RGB", (width, GAP + sum(heights.values())), PAPER)
    pen, top = ImageDraw.Draw(sheet), GAP
    for name, row in rows.items():
        labels[name].draw(pen, (GAP, top + TILE // 2 - LINE), margin - 2 * GAP, LINE, INK)
        for i, ((picture, _), caption) in enumerate(zip(row, captions[name], strict=True)):
            left = margin + i * (TILE + GAP)
            resampling = Image.Resampling.NEAREST if max(picture.size) <= TILE else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.pad(picture, (TILE, TILE), resampling, PAPER), (left, top))
            pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=FRAME)
            caption.draw(pen, (left, top + TILE), TILE, LINE, INK)
        top += heights[name]
    return sheet
