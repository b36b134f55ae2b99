"""`SettingsParser`: flags and a YAML file, with one sentence for what is wrong about their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..suggestions import did_you_mean

FOR_LAUNCHER = ("accelerate_config", "num_processes")
READ_BEFORE = ("config", *FOR_LAUNCHER, "trainer")
"""Flags that `flowrl` takes off the arguments itself."""


@contextmanager
def wrong_arguments() -> Iterator[None]:
    """Turn the errors of `TrlParser` into `ValueError`, which `flowrl` shows as one sentence."""
    try:
        yield
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error


class SettingsParser(TrlParser):
    """`TrlParser`, which refuses what it does not know by one `ValueError` that names all of it.

    A flag wins over the YAML file of `--config`, and that over the defaults.
    """

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a value that a flag or key cannot have, and for one that is missing."""
        raise ValueError(f"{message} (see `{self.prog} --help`).")

    def read(self, arguments: list[str]) -> tuple[Any, ...]:
        """The settings of a command, one object of each dataclass.

        Raises:
            ValueError: For unknown names, duplicate keys, a file that cannot be read, and wrong values.
        """
        with wrong_arguments():
            file = config_file(arguments)
            keys = [] if file is None else _keys(file)
            flags = [part.split("=")[0] for part in arguments if part.startswith("--") and part != "--"]
            known = {action.dest for action in self._actions} - {"help"}
            for key in set(FOR_LAUNCHER) & (set(keys) - known):
                raise ValueError(
                    f"{key!r} in the YAML file says how processes are started: give it on the command line, as "
                    f"`--{key}`."
                )
            self._refuse_unknown(
                [(key, "the YAML file") for key in keys if key not in known | {"env"}]
                + [(f[2:], "the command line") for f in flags if f not in {"--config", *self._option_string_actions}]
            )
            *settings, _, loose = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
            self._refuse_unknown([(word, "the command line") for word in loose])
        return tuple(settings)

    def _refuse_unknown(self, names: list[tuple[str, str]]) -> None:
        """Raises `ValueError` if there is a name, each with the place where it stands."""
        options = [option.lstrip("-") for option in self._option_string_actions]
        known = [*(option for option in options if "-" not in option), *READ_BEFORE]
        named = [f"{name!r} in {place}" for name, place in names]
        if named:
            listed = " and ".join(part for part in (", ".join(named[:-1]), named[-1]) if part)
            are = "is no setting" if len(named) == 1 else "are no settings"
            wrong = [name for name, _ in names]
            meant = did_you_mean(wrong, [name for name in known if name not in wrong])
            raise ValueError(f"{listed} {are} of `{self.prog}`{meant}: see `{self.prog} --help`.")


def config_file(arguments: list[str]) -> Path | None:
    """The YAML file of `--config`, if it is among the arguments. Raises `ValueError` if no name follows it."""
    if "--config" not in arguments:
        return None
    rest = arguments[arguments.index("--config") + 1 :]
    if not rest or rest[0].startswith("--"):
        raise ValueError("`--config` needs the name of a YAML file.")
    if "--config" in rest:
        raise ValueError("`--config` stands twice: write all settings into one file.")
    return Path(rest[0])


def _keys(path: Path) -> list[str]:
    """The keys of a YAML file. Raises `ValueError` for a file that is no mapping, or has a key twice."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, _StrictLoader)  # a `SafeLoader`
    except UnicodeDecodeError as error:
        raise ValueError(f"`--config` ({path}) is not encoded as UTF-8: save the file as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"`--config` ({path}) cannot be read ({error.strerror}): name a YAML file.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`--config` ({path}) holds no settings: write one as `key: value` on each line.")
    return [str(key) for key in settings]


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain types, but a mapping has each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                raise ValueError(
                    f"{node.start_mark.name} sets {key.value!r} twice, in lines {lines[key.value]} and {line}: keep "
                    "one of them."
                )
        return super().construct_mapping(node, deep)
