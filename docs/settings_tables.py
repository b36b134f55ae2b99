"""mkdocs hook: `<!-- settings: ConfigClass -->` in a page becomes a table of the settings that the class declares."""

import re
from dataclasses import MISSING, Field, fields
from typing import Any

from flowrl_trainers import trainers


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks in the source of a page; mkdocs calls this for every page."""
    return re.sub(
        r"^<!-- settings: (\w+) -->$",
        lambda match: table(getattr(trainers, match[1])),
        markdown,
        flags=re.MULTILINE,
    )


def table(config: type) -> str:
    """Name, default and help of the settings that a config declares itself."""
    rows = ["| setting | default | what it does |", "|---|---|---|"]
    for field in fields(config):
        if field.name in config.__annotations__:
            rows.append(
                f"| `{field.name}` | `{default(field)!r}` | {field.metadata['help'].replace('|', '&#124;')} |"
            )
    return "\n".join(rows)


def default(field: Field[Any]) -> Any:
    """The default value of a setting."""
    return (
        field.default if field.default_factory is MISSING else field.default_factory()
    )
