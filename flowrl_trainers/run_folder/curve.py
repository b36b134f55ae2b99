"""The reward of a run, drawn over its updates."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LEAST_POINTS = 2


def draw_reward_curve(path: Path, history: Sequence[dict[str, Any]], reward: str) -> bool:
    """Draw the mean reward of rollouts, and that of base and tuned model on held-out prompts.

    Args:
        path: The picture.
        history: What `Trainer` logged; None stands for a number that is not finite.
        reward: The name of the reward.

    Returns:
        Whether there was enough to draw.
    """
    name = f"reward/{reward}"
    history = [{key: math.nan if value is None else value for key, value in row.items()} for row in history]
    points = [(row["step"], row[name]) for row in history if name in row]
    if len(points) < LEAST_POINTS:
        return False
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), color="tab:blue", label="training prompts, each rollout")
    evaluated = [row for row in history if f"eval_{name}" in row]
    evaluated.sort(key=lambda row: row["step"])  # the last may be of the best checkpoint
    held_out = [(row["step"], row[f"eval_{name}"], row[f"eval_base_{name}"]) for row in evaluated]
    if held_out:
        steps, tuned, base = zip(*held_out, strict=True)
        axes.axhline(base[-1], color="gray", linestyle="--", label="held-out prompts, base")
        axes.plot(steps, tuned, color="tab:green", marker="o", label="held-out prompts, tuned")
    axes.set(xlabel="update", ylabel=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
