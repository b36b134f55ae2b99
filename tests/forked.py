"""Processes that begin with everything imported, which takes a process of its own seven seconds.

A fork server that has imported the library, and computed nothing, forks a child for each call: the child's state is
that of a new process, it can be killed as one, and what it changes is gone with it.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from flowrl_trainers.cli import main
from flowrl_trainers.shapes import prompts

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forked", "tests.preloaded"])


def call(
    function: Callable[..., Any], *arguments: Any, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Call a function in a child; its exit status is what the function returns or exits with.

    Args:
        function: of a module, since its name is sent; None counts as 0.
        arguments: that can be pickled.
        cwd: the child's current folder.
        environment: all variables of the child; None for those of this process. Libraries have read those that they
            read at import.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = FORKS.Process(
            target=_call,
            args=(
                function,
                arguments,
                str(cwd or Path.cwd()),
                dict(os.environ) if environment is None else environment,
                *(multiprocessing.reduction.DupFd(file.fileno()) for file in (output, errors)),
            ),
        )
        child.start()
        child.join()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(
            [function.__name__, *arguments], child.exitcode, output.read(), errors.read()
        )


def _call(function, arguments, cwd, environment, output, errors) -> None:
    for stream, duplicate in ((1, output), (2, errors)):
        os.dup2(duplicate.detach(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.exit(function(*arguments))


def flowrl(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """`flowrl` with arguments, called from a folder."""
    return call(_flowrl, *map(str, arguments), cwd=folder)


def _flowrl(*arguments: str) -> int:
    return main(list(arguments))


def demo(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """`flowrl demo` that is evaluated on the first 24 of the held-out prompts."""
    return call(_demo, *map(str, arguments), cwd=folder)


def _demo(*arguments: str) -> int:
    import_module("flowrl_trainers.cli.demo").prompts = lambda split="train": (
        prompts(split).select(range(24)) if split == "held_out" else prompts(split)
    )
    return main(["demo", *arguments])


def script(
    path: Path, *arguments: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """A Python file with arguments, as `python path arguments` runs it; see `call`."""
    return call(_script, str(path), *map(str, arguments), cwd=cwd, environment=environment)


def _script(path: str, *arguments: str) -> None:
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
