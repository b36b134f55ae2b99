"""Where prompts come from: a file, a list of strings or a `datasets.Dataset`, read into a plain `datasets.Dataset`."""

import glob
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
from pandas.errors import ParserWarning

PromptSource = Dataset | str | PathLike[str] | list[str]

# How `datasets` reads the files of a suffix: the name of its loader, and what it is called with.
_TABLE = {"encoding": "utf-8-sig", "skip_blank_lines": False, "index_col": False}
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".csv": ("csv", _TABLE),
    ".tsv": ("csv", {**_TABLE, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
SUFFIXES = f"{', '.join(list(LOADERS)[:-1])} or {list(LOADERS)[-1]}"
_TABLES = ("pandas", "polars", "arrow")  # formats in which one row is a table


def prompts_of(source: Any, argument: str) -> Dataset:
    """The rows of a source of prompts, the prompt of each a plain string.

    Args:
        source: A `PromptSource`.
        argument: What the caller calls it.

    Raises:
        ValueError: For any other object, and for a file or list that cannot be read as prompts.
    """
    if isinstance(source, (str, PathLike)):
        return _of_path(source, argument)
    if isinstance(source, list):
        return _of_list(source, argument)
    if isinstance(source, Mapping):  # a `DatasetDict` too
        splits = ", ".join(map(repr, source)) or "none"
        raise ValueError(
            f"`{argument}` is a {type(source).__name__} of several data sets ({splits}): pass one of them, such as "
            "`dataset['train']`."
        )
    if isinstance(source, IterableDataset):
        raise ValueError(
            f"`{argument}` is an IterableDataset, whose rows cannot be asked for by number: pass a "
            "`datasets.Dataset`, such as `Dataset.from_list(list(dataset))`."
        )
    if not isinstance(source, Dataset):
        raise ValueError(
            f"`{argument}` is a {type(source).__name__}: pass a `datasets.Dataset` with a column 'prompt', the path "
            "of a file or a list of prompts."
        )
    return _plain(source, argument)


def is_prompt_file(name: str) -> bool:
    """Whether a name is that of a file, present or missing, and not of a folder or a data set of the Hub."""
    path = Path(name)
    return path.is_file() or (path.suffix.lower() in LOADERS and not path.is_dir())


def read_prompt_file(path: str | PathLike[str], column: str = "prompt") -> Dataset:
    """The rows of a file, read afresh: `datasets` would keep a copy of a file that is changed later.

    The lines of a text file are the column 'prompt'; other files have their own columns.

    Args:
        path: The file.
        column: The column with the prompts, in which 2024 is a text.

    Raises:
        ValueError: For a missing file, another suffix, another encoding than UTF-8, and what the loader refuses.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r} with prompts, seen from {str(Path.cwd())!r}: give its path.")
    if suffix not in LOADERS:
        raise ValueError(f"The prompts {str(path)!r} have an unknown suffix: save them as {SUFFIXES}.")
    if suffix != ".parquet":
        _refuse_other_texts(path)
    loader, options = LOADERS[suffix]
    if loader == "csv":
        options = {**options, "converters": {column: str}}
    files = glob.escape(str(path.resolve()))
    try:
        with _silently(), tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # of cells that have no column, and would be left out
            dataset = load_dataset(
                loader, data_files=files, split="train", cache_dir=cache, keep_in_memory=True, **options
            )
    except (OSError, ValueError, DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        mend = "put a prompt that holds a separator into double quotes" if loader == "csv" else "mend the file"
        raise ValueError(f"The prompts {str(path)!r} cannot be read as {suffix} ({cause}): {mend}.") from error
    return dataset.rename_column("text", "prompt") if loader == "text" else dataset


@contextmanager
def _silently() -> Iterator[None]:
    """Without the progress bars of `datasets`, and what it logs of an error that it raises too."""
    had_bars, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def refuse_blank_prompts(dataset: Dataset, path: str | PathLike[str]) -> Dataset:
    """The rows of a file; raises `ValueError` for a blank prompt among its column 'prompt'."""
    suffix = Path(path).suffix.lower()
    blank = next((row for row, prompt in enumerate(dataset["prompt"]) if _is_blank(prompt)), None)
    if blank is not None:
        where = f"line {blank + 1}" if suffix in (".txt", ".jsonl") else f"row {blank + 1}"
        raise ValueError(f"The prompt in {where} of {str(path)!r} is missing or blank: fill it in, or delete it.")
    return dataset


def _is_blank(prompt: Any) -> bool:
    return prompt is None or (isinstance(prompt, str) and not prompt.strip())


def _refuse_other_texts(path: Path) -> None:
    """Raises `ValueError` for a file that is empty or no UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"The prompts {str(path)!r} are not encoded as UTF-8 in line {line}: save the file as UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"The prompts {str(path)!r} are empty: write at least one.")


def _of_path(path: str | PathLike[str], argument: str) -> Dataset:
    if not is_prompt_file(str(path)):
        raise ValueError(
            f"`{argument}` ({str(path)!r}) is no file of prompts: pass the path of a {SUFFIXES} file, or what "
            "`datasets.load_dataset` returns."
        )
    dataset = read_prompt_file(path)
    if "prompt" not in dataset.column_names:
        columns = " and ".join(map(repr, dataset.column_names))
        raise ValueError(
            f"`{argument}` ({str(path)!r}) has {columns} but no 'prompt': rename the one with the prompts."
        )
    return refuse_blank_prompts(dataset, path)


def _of_list(prompts: list[Any], argument: str) -> Dataset:
    if not prompts:
        raise ValueError(f"`{argument}` is empty: it needs at least one prompt.")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"`{argument}` is a list whose element {number} ({prompt!r}) is no string: pass strings, or rows by "
                "`Dataset.from_list`."
            )
        if _is_blank(prompt):
            raise ValueError(f"`{argument}` is a list whose element {number} ({prompt!r}) is blank: leave it out.")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(
                f"`{argument}` is a list whose element {number} ({prompt!r}) holds half of a character, which UTF-8 "
                "cannot write: read the text again as UTF-8."
            )
    return Dataset.from_dict({"prompt": prompts})


def _plain(dataset: Dataset, argument: str) -> Dataset:
    """All columns of a data set, also those that its format hides; the prompts as strings, the others as they were.

    Raises `ValueError` for a transform: prompts are read when they are encoded and again when they are scored, and
    would have to be the same.
    """
    kind, columns = dataset.format["type"], dataset.format["columns"]
    if kind == "custom":
        raise ValueError(
            f"`{argument}` has a transform (`set_transform`), which would run anew each time that a row is read: "
            "apply it once with `dataset.map`."
        )
    if kind in _TABLES or kind is None:
        return dataset.with_format(None) if kind is not None or columns != dataset.column_names else dataset
    others = [name for name in columns if name != "prompt"]
    return dataset.with_format(kind, others, output_all_columns=True, **dataset.format["format_kwargs"])
