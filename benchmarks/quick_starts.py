"""Run the quick start of a method's page as it stands, and leave its sheet and its curve in docs/images.

python benchmarks/quick_starts.py adjoint_matching vgg_flow ac_flow diffusion_nft tafs_grpo
"""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from flowrl_trainers import FlowRLTrainer

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def main() -> None:
    """Run each block in a folder that is deleted, and print what a page says of it."""
    for method in sys.argv[1:]:
        page = (ROOT / "docs" / f"{method}.md").read_text()
        block = re.search(r"## Quick start\n\n```python\n(.*?)```", page, flags=re.S)
        assert block, method
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            scope: dict = {}
            exec(block[1], scope)
            keep(method, scope["trainer"])
            os.chdir(ROOT)


def keep(method: str, trainer: FlowRLTrainer) -> None:
    """The sheet of the last evaluation, the curve, and a line of numbers."""
    sheet = max((trainer.run_folder.path / "samples").glob("step-*.png"))
    shutil.copy(sheet, IMAGES / f"quick_{method}.png")
    name = f"reward/{trainer.rewards[0].name}"
    draw_curve(trainer.state.log_history, trainer.rows, name, IMAGES / f"quick_{method}_curve.png")
    for label, row in trainer.rows.items():
        numbers = ", ".join(f"{key} {row[key]:.3f}" for key in ("reward/shapes", "checker_accuracy"))
        print(f"{method}, {label}: {numbers}; {trainer.seconds['training']:.0f} s of training")


def draw_curve(history: list[dict], rows: dict[str, dict[str, float]], name: str, path: Path) -> None:
    """Draw the reward of every rollout, and of base and tuned model on held-out prompts.

    Args:
        history: What training logged.
        rows: Of the last evaluation, "base" and "tuned".
        name: Of the reward, as it is logged.
        path: Of the picture.
    """
    points = [(row["step"], row[name]) for row in history if name in row]
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), label="training prompts, each rollout")
    axes.axhline(rows["base"][name], color="gray", linestyle="--", label="held-out prompts, base")
    axes.axhline(rows["tuned"][name], color="tab:green", linestyle="--", label="held-out prompts, tuned")
    axes.set(xlabel="update", ylabel=name)
    figure.legend(loc="outside upper center", ncols=3, fontsize=7.5)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
