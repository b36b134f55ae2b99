"""One table of several demos, from the files that they wrote.

python benchmarks/demo_table.py "with value network=demo-vgg" "without=demo-vgg-none" --out docs/tables/vgg_flow.md
"""

import argparse
import json
from pathlib import Path

import torch
import yaml

from flowrl_trainers.cli.demo import PICTURES_PER_PROMPT
from flowrl_trainers.shapes import prompts

SAMPLERS = {"": "", "_ode": ", drawn by the ODE"}


def main() -> None:
    """Print the table in Markdown, and write it to `--out`. All runs must have the same base row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="LABEL=FOLDER of a demo's output.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()
    lines = [
        "| run | shapes reward | checker accuracy | diversity | updates | seconds of training |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    bases: list[str] = []
    for run in args.runs:
        label, folder = run.split("=", 1)
        report = json.loads((Path(folder) / "metrics.json").read_text())
        updates = yaml.safe_load((Path(folder) / "config.yaml").read_text())["max_steps"]
        samplers = [(suffix, words) for suffix, words in SAMPLERS.items() if f"base{suffix}" in report]
        rows = [(f"base{words}", report[f"base{suffix}"], "", "") for suffix, words in samplers if not bases]
        rows += [
            (f"{label}{words}", report[f"tuned{suffix}"], str(updates), f"{report['seconds']['training']:.0f}")
            for suffix, words in samplers
        ]
        bases.append(_figures(report["base"]))
        for name, row, steps, seconds in rows:
            lines.append(f"| {name} | {_figures(row)} | {steps} | {seconds} |")
    if any(base != bases[0] for base in bases):
        raise SystemExit(
            "The runs have different base rows, so their evaluations cannot be compared: run the demos with the same "
            "settings of evaluation."
        )
    pictures = len(prompts("held_out")) * PICTURES_PER_PROMPT
    lines += [
        "",
        f"{pictures} pictures of held-out prompts, the same seeds, no guidance; one run each, on a CPU, torch "
        f"{torch.__version__}.",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def _figures(row: dict[str, float]) -> str:
    return f"{row['reward/shapes']:.3f} | {100 * row['checker_accuracy']:.1f} % | {row['diversity']:.3f}"


if __name__ == "__main__":
    main()
