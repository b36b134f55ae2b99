"""Less noise at the start."""

import logging
import os


def hush() -> None:
    """Silence what the libraries say at import about optional packages that nothing here needs; keep warnings of a run.

    transformers reads its verbosity when it is imported, so this comes before.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in (
        "httpx2",
        "datasets",
        "diffusers",
        "accelerate",
        "torch",
        "filelock",
        "fsspec",
        "matplotlib",
        "PIL",
    ):
        logging.getLogger(library).setLevel(logging.WARNING)
