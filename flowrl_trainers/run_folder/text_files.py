"""Text files that say what is so: UTF-8 on every system, and JSON without NaN."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whatever the system's own encoding is."""
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, with null for each number that is not finite, as JSON has no sign for those."""
    write_text(path, json.dumps(_finite(value), indent=2, default=str, allow_nan=False) + "\n")


def json_line(value: Any) -> str:
    """A value as one line of JSON, as `write_json` writes it."""
    return json.dumps(_finite(value), default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(name): _finite(entry) for name, entry in value.items()}
        case list() | tuple():
            return [_finite(entry) for entry in value]
        case _:
            return value
