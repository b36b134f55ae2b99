"""What benchmarks share that run `flowrl demo` as a process: finished demos are not run again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_demo(method: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a demo, unless the folder has one with the same settings, and return its report.

    Args:
        method: The method.
        settings: Those in which the run differs from the method's demo.
        folder: The folder of the run.
    """
    settings = settings | {"output_dir": str(folder), "disable_tqdm": "true"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command, done = ["demo", "--trainer", method, *flags], folder / "variant.json"
    if not done.exists() or json.loads(done.read_text()) != command:
        subprocess.run([sys.executable, "-m", "flowrl_trainers.cli", *command], check=True, stdout=subprocess.DEVNULL)
        done.write_text(json.dumps(command))
    return json.loads((folder / "metrics.json").read_text())
