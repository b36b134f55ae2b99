"""Bars that vanish when they are done, and messages that stand out and break no bar."""

import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

WIDTH = 119
BOLD_YELLOW, PLAIN = "\033[1;33m", "\033[0m"

T = TypeVar("T")


def bar(items: Sequence[T], label: str, shown: bool) -> Iterator[T]:
    """The items one by one, counted beside a label."""
    return iter(tqdm(items, desc=label, disable=not shown, leave=False, bar_format="{desc}: {n_fmt} of {total_fmt}"))


@contextmanager
def without_bars_of_datasets() -> Iterator[None]:
    """Inside, `datasets` shows no bars of its own."""
    were_shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            enable_progress_bars()


class MessageHandler(logging.Handler):
    """Prints log messages above the bars of this process, on standard error.

    From warnings on, the level comes first, bold on a terminal; what is longer than `WIDTH` goes on in the next line.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.capitalize()}: {text}"
        wrapped = "\n".join(
            textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            for line in text.splitlines()
        )
        if record.levelno >= logging.WARNING and sys.stderr.isatty():
            wrapped = f"{BOLD_YELLOW}{wrapped}{PLAIN}"
        tqdm.write(wrapped, file=sys.stderr)


@contextmanager
def messages_above_bars() -> Iterator[None]:
    """Inside, log messages and Python's warnings are printed above the bars.

    Where this process has configured logging, its handlers of the console print as they are; where it has not, a
    `MessageHandler` does.
    """
    root = logging.getLogger()
    if any(isinstance(handler, MessageHandler) for handler in root.handlers):
        yield
    elif root.handlers:
        with logging_redirect_tqdm():
            yield
    else:
        handler = MessageHandler()
        root.addHandler(handler)
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)
