"""Puts the picture and the table of a demo into the README, from the files that the demo wrote.

python benchmarks/update_readme.py flowrl-demo
"""

import json
import re
import shutil
import sys
from pathlib import Path

from flowrl_trainers.cli.demo import PICTURES_PER_PROMPT
from flowrl_trainers.shapes import prompts

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Copy the pictures, and replace the text of the README between the two marks."""
    run = Path(sys.argv[1])
    report = json.loads((run / "metrics.json").read_text())
    for name in ("before_after.png", "reward_curve.png"):
        shutil.copy(run / name, ROOT / "docs" / "images" / name)
    rows = ["| | shapes reward | checker accuracy | diversity |", "|---|---:|---:|---:|"]
    for label in ("base", "tuned"):
        row = report[label]
        accuracy = f"{100 * row['checker_accuracy']:.1f} %"
        rows.append(f"| {label} | {row['reward/shapes']:.3f} | {accuracy} | {row['diversity']:.3f} |")
    seconds = " and ".join(f"{value:.0f} s of {phase}" for phase, value in report["seconds"].items())
    picture = "![Held-out prompts before and after tuning](docs/images/before_after.png)"
    pictures = len(prompts("held_out")) * PICTURES_PER_PROMPT
    note = (
        f"{pictures} pictures of held-out prompts, the same seeds, no guidance; one run, seed 42, {seconds} on a CPU."
    )
    block = "\n\n".join([picture, "\n".join(rows), note])
    readme = ROOT / "README.md"
    marks = re.compile(r"(<!-- demo:begin -->\n).*(<!-- demo:end -->)", flags=re.S)
    readme.write_text(marks.sub(lambda m: f"{m[1]}{block}\n{m[2]}", readme.read_text()))


if __name__ == "__main__":
    main()
