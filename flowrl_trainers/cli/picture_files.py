"""The pictures that `flowrl score` is given, with their prompts: a folder, or a data set with pictures in it."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ..sampling.prompt_groups import Example, ImageKey
from ..trainers.input_checks import check_dataset
from .run import load_prompts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
NAMED_BY = "file_name"  # the column of a `datasets` image folder


@dataclass(frozen=True)
class NamedPicture:
    """A picture, where it comes from, and its prompt with the other columns of its row."""

    name: str
    source: Path | Image.Image
    example: Example

    def load(self) -> Image.Image:
        """The picture as viewers show it, in red, green and blue of 8 bits.

        Raises `ValueError` for a file that is none, for pixels of more than 8 bits, and for transparent ones.
        """
        try:
            picture = Image.open(self.source) if isinstance(self.source, Path) else self.source
            picture = ImageOps.exif_transpose(picture)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"The picture {self.name!r} cannot be read ({error}): mend it or take it away."
            ) from error
        if picture.mode[0] in "IF":  # Pillow would cut off what is above 255
            raise ValueError(
                f"The picture {self.name!r} has pixels of the mode {picture.mode!r}: save it with 8 bits per colour."
            )
        if picture.has_transparency_data and any(a < 255 for a in picture.convert("RGBA").getchannel("A").tobytes()):
            raise ValueError(
                f"The picture {self.name!r} has transparent pixels, whose colour is what lies behind: save it on a "
                "background."
            )
        return picture.convert("RGB")


def find_pictures(
    source: str, prompts: str | None, column: str, split: str, leave_out: Sequence[Path] = ()
) -> list[NamedPicture]:
    """The pictures of a folder or a data set.

    Args:
        source: A folder with pictures; else a data set of the Hub with a column `image`.
        prompts: A file with a row per picture of the folder: matched by the column `file_name` where there is one,
            else in the order of the names. None for the file names: `a_red_circle_03.png` shows "a red circle".
        column: The column with the prompts.
        split: The split of a data set.
        leave_out: Files that are none of these pictures, though they may lie inside.

    Raises:
        ValueError: If there are no pictures, or if prompts and pictures do not match.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _of_data_set(source, column, split)
    ours = {path.resolve() for path in leave_out}
    files = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.resolve() not in ours
    )
    if not files:
        raise ValueError(f"The folder {source!r} has no pictures: it needs files with {', '.join(SUFFIXES)}.")
    names = [path.relative_to(folder).as_posix() for path in files]
    if prompts is None:
        rows: list[dict[str, Any]] = [{"prompt": _prompt_in_name(path)} for path in files]
    else:
        rows = _rows_of_file(prompts, column, names)
    return [_named(i, *picture) for i, picture in enumerate(zip(names, files, rows, strict=True))]


def _named(number: int, name: str, source: Path | Image.Image, row: dict[str, Any]) -> NamedPicture:
    columns = {key: value for key, value in row.items() if key not in ("prompt", NAMED_BY)}
    return NamedPicture(name, source, Example(ImageKey(number, 0, 0), row["prompt"], columns))


def _prompt_in_name(path: Path) -> str:
    """The name of a file without a number at its end, underscores as spaces; the name itself where nothing is left."""
    words = re.sub(r"[\s_-]*\d+$", "", path.stem.replace("_", " ")).strip()
    return words or path.stem


def _rows_of_file(path: str, column: str, names: list[str]) -> list[dict[str, Any]]:
    rows = check_dataset(load_prompts(path, None, "train", column), "prompts")
    if NAMED_BY not in rows.column_names:
        if len(rows) != len(names):
            raise ValueError(
                f"`prompts` ({path!r}) has {len(rows)} rows for {len(names)} pictures: write one per picture in the "
                f"order of their names, or add a column {NAMED_BY!r}."
            )
        return list(rows)
    by_name: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row[NAMED_BY] in by_name:
            raise ValueError(f"`prompts` ({path!r}) has two rows whose {NAMED_BY!r} is {row[NAMED_BY]!r}: keep one.")
        by_name[row[NAMED_BY]] = row
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(
            f"`prompts` ({path!r}) has no row whose {NAMED_BY!r} is {missing[0]!r}, and {len(missing)} such pictures "
            "in all: add them, or take the pictures away."
        )
    if len(by_name) > len(names):
        print(f"flowrl: {len(by_name) - len(names)} of the rows of {path!r} name no picture here.", file=sys.stderr)
    return [by_name[name] for name in names]


def _of_data_set(name: str, column: str, split: str) -> list[NamedPicture]:
    try:
        rows = check_dataset(load_prompts(name, None, split, column), name)
    except ValueError as error:
        raise ValueError(f"{name!r} is no folder with pictures, and as a data set: {error}") from error
    if "image" not in rows.column_names:
        raise ValueError(f"The data set {name!r} has no column 'image': rename the one with the pictures.")
    for number, picture in enumerate(rows["image"]):
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"The column 'image' of {name!r} holds {picture!r} in row {number}, which is no picture: name the "
                "folder of the pictures, with this file as `prompts`."
            )
    return [_named(i, f"{i:05d}", row.pop("image"), row) for i, row in enumerate(rows)]
