"""Fewer messages at the start of a command."""

import logging
import os

from ..sampling.progress import MessageHandler

LIBRARIES = (
    "httpx2", "datasets", "diffusers", "accelerate", "torch", "filelock", "fsspec", "matplotlib", "PIL",
)  # fmt: skip


def hush() -> None:
    """Silence the libraries' messages about optional packages that nothing here needs, and keep warnings of a run.

    Call this before the first import of transformers, which reads its verbosity then.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[MessageHandler()])
    logging.captureWarnings(True)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)
