"""Fewer messages at the start of a command."""

import logging
import os

from ..sampling.progress import MessageHandler

LIBRARIES = (
    "httpx2", "datasets", "diffusers", "accelerate", "torch", "filelock", "fsspec", "matplotlib", "PIL",
)  # fmt: skip


def hush() -> None:
    """Silence the libraries' messages about optional packages that nothing here needs, and keep warnings of a run.

    diffusers says of every adapter that it holds nothing for the text encoders, which is so of all adapters here.

    Call this before the first import of transformers, which reads its verbosity then.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[MessageHandler()])
    logging.captureWarnings(True)
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("diffusers.loaders.lora_base").addFilter(
        lambda record: not record.getMessage().startswith("No LoRA keys associated to")
    )
