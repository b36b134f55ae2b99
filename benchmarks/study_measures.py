"""What the study makes of a run's evaluations: what collapse is, and values at an equal budget.

A point is an evaluation: `updates`, `seconds` of training, `reward_calls`, `training_reward` since the point before,
and `rows` as `metrics.json` has them. A record is a finished run with its points.
"""

from itertools import pairwise
from typing import Any

KEPT_DIVERSITY = 0.5  # of the base model's
LOST_POINTS = 10.0  # of checker accuracy, below the best of the run so far
AXES = ("seconds", "reward_calls", "updates")
OWN, ODE = ("tuned", "base"), ("tuned_ode", "base_ode")

Point = dict[str, Any]
Record = dict[str, Any]


def collapse(points: list[Point]) -> dict[str, Any] | None:
    """When and why a run collapsed; None if it did not.

    Defined before any run: the first evaluation at which diversity is below half of the base model's, with the same
    prompts and seeds, or the checker's accuracy is 10 points below its best in the run so far, the base included. A
    model of which no prompt has two right pictures has no diversity.
    """
    best = points[0]["rows"]["base"]["checker_accuracy"] if points else 0.0
    for point in points:
        tuned, base = point["rows"]["tuned"], point["rows"]["base"]
        accuracy = tuned["checker_accuracy"]
        best = max(best, accuracy)
        if tuned.get("diversity", 0.0) < KEPT_DIVERSITY * base.get("diversity", 0.0):
            return {"updates": point["updates"], "reason": "diversity"}
        if round(100 * (best - accuracy), 6) >= LOST_POINTS:
            return {"updates": point["updates"], "reason": "accuracy"}
    return None


def rows_of(record: Record, steps: int) -> tuple[str, str]:
    """The labels of tuned and base row by the ODE, for a table whose rows are drawn in so many steps; of the sampler
    that TAFS-GRPO trains, where the table has its four.
    """
    has_ode = "tuned_ode" in record["points"][-1]["rows"]
    return ODE if has_ode and steps == 20 else OWN


def measured(record: Record, point: Point | None, steps: int) -> dict[str, float]:
    """The values of a point; of the base model for None. What an evaluation lacks is left out.

    Args:
        record: The run.
        point: One of its points.
        steps: See `rows_of`.
    """
    tuned_name, base_name = rows_of(record, steps)
    rows = (point or record["points"][0])["rows"]
    base = rows[base_name]
    row = base if point is None else rows[tuned_name]
    found = {"checker_accuracy": 100 * row["checker_accuracy"], "shapes_reward": row["reward/shapes"]}
    if "diversity" in base:
        found["kept_diversity"] = row.get("diversity", 0.0) / base["diversity"]
    found["velocity_distance"] = 0.0 if point is None else rows["tuned"]["velocity_distance"]
    if point is not None and point["training_reward"] is not None:
        found["over_optimisation"] = 100 * (point["training_reward"] - row["checker_accuracy"])
    return found


def at(record: Record, axis: str, budget: float, steps: int) -> dict[str, float]:
    """The values of a run when it had spent a budget, on straight lines between its evaluations; those of its last one
    where it collapsed before.

    Args:
        record: The run.
        axis: One of `AXES`.
        budget: At most what the run has spent.
        steps: See `rows_of`.

    Raises:
        ValueError: If the run never spent as much, and did not collapse.
    """
    before, spent = measured(record, None, steps), 0.0
    for point in record["points"]:
        after = measured(record, point, steps)
        if point[axis] >= budget:
            share = (budget - spent) / (point[axis] - spent)
            shared = {name: value for name, value in after.items() if name in before}
            return {n: before[n] + share * (v - before[n]) for n, v in shared.items()} | {
                name: value for name, value in after.items() if name not in before
            }
        before, spent = after, point[axis]
    if record["collapse"]:
        return before
    raise ValueError(f"`budget` ({budget}) must be at most the {axis} of the run ({spent}): lower it.")


def matched_diversity(record: Record, rival: Record) -> tuple[float, float] | None:
    """The diversity that a run keeps less that of a rival of the same seed, at the highest checker accuracy that both
    reached by the ODE in 20 steps, each where it first reached it; and by how many points that is above the base
    model's. None where it is not.
    """
    curves = [[measured(r, point, 20) for point in (None, *r["points"])] for r in (record, rival)]
    accuracy = min(max(value["checker_accuracy"] for value in curve) for curve in curves)
    rise = accuracy - curves[0][0]["checker_accuracy"]
    if rise <= 0:
        return None
    kept = []
    for curve in curves:
        for before, after in pairwise(curve):
            low, high = before["checker_accuracy"], after["checker_accuracy"]
            if high >= accuracy:
                share = (accuracy - low) / (high - low)
                diversities = before.get("kept_diversity", 0.0), after.get("kept_diversity", 0.0)
                kept.append(diversities[0] + share * (diversities[1] - diversities[0]))
                break
    return kept[0] - kept[1], rise


def equal_budget(records: list[Record], axis: str) -> float:
    """The most that every one of the runs has spent, but for those that collapsed, where there are others."""
    lasting = [record for record in records if not record["collapse"]]
    return min(record["points"][-1][axis] for record in lasting or records)


def best_factor(records: list[Record], steps: int) -> float:
    """The factor of the grid with the highest checker accuracy at the end; the one nearest to 1 of equal ones."""

    def standing(record: Record) -> tuple[float, float]:
        accuracy = measured(record, record["points"][-1], steps)["checker_accuracy"]
        return accuracy, -abs(record["factor"] - 1)

    return max(records, key=standing)["factor"]
