"""Records the demos that `flowrl demo --check` and `make converge` compare with, several seeds of each method.

    python benchmarks/convergence.py                        # three seeds of all methods
    python benchmarks/convergence.py --methods ac_flow --seeds 0 1 2

Every run is `flowrl demo` as it stands, in a folder of its own below `--folder`; finished ones are not repeated. After
each, the file of recorded runs is written, so that an interrupted recording goes on where it was. Runs of a demo whose
settings changed since are dropped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from demo_runs import run_demo
from machine import machine
from tqdm import tqdm

from flowrl_trainers.cli.convergence import RECORDED, SEEDS, band, recorded_rises
from flowrl_trainers.cli.demo import METHODS, checked_settings, rise_of
from flowrl_trainers.run_folder.text_files import write_json


def record(method: str, seed: int, report: dict[str, Any], file: Path) -> None:
    """Add a finished demo to the file, in place of an earlier one of that seed, and drop those of other settings.

    Args:
        method: The method.
        seed: The seed.
        report: The `metrics.json` of the demo.
        file: Of the recorded runs.
    """
    recorded = json.loads(file.read_text(encoding="utf-8"))
    rise, settings = rise_of(report), checked_settings(method)
    run = {
        "seed": seed,
        "base": rise.base,
        "tuned": rise.tuned,
        "pictures": rise.pictures,
        "seconds": report["seconds"],
        "machine": machine(),
        "torch": torch.__version__,
        "settings": settings,
    }
    kept = [r for r in recorded["runs"].get(method, []) if r["settings"] == settings and r["seed"] != seed]
    recorded["runs"][method] = sorted([*kept, run], key=lambda run: run["seed"])
    write_json(file, recorded)


def main() -> None:
    """Run and record the missing demos, then print every method's band."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="The methods.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="The seeds.")
    parser.add_argument("--folder", type=Path, default=Path("convergence"), help="The folder of the runs.")
    parser.add_argument("--out", type=Path, default=RECORDED, help="The file of the recorded runs.")
    args = parser.parse_args()
    runs = [(method, seed) for method in args.methods for seed in args.seeds]
    for method, seed in tqdm(runs, desc="demos"):
        report = run_demo(method, {"seed": seed}, args.folder / method / f"seed {seed}")
        record(method, seed, report, args.out)
    for method in METHODS:
        bounds = band(recorded_rises(method, checked_settings(method), args.out))
        print(f"{method}:", "no band yet" if bounds is None else "from {:+.1f} to {:+.1f} points".format(*bounds))


if __name__ == "__main__":
    main()
