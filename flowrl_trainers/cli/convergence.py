"""`flowrl demo --check`: whether a demo raised the checker's accuracy on held-out prompts as recorded demos did."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("convergence.json")
"""The recorded demos by method, written by `benchmarks/convergence.py` alone."""
SEEDS = 3  # as many recorded demos make a band
MARGIN = 2.0  # standard errors of one rise, beyond the lowest and the highest recorded one
FREE = ("seed", "output_dir", "overwrite_output_dir", "disable_tqdm", "log_level", "report_to")
"""The settings that a checked demo may change: what it learns depends on none but the seed."""


@dataclass(frozen=True)
class Rise:
    """What a demo did to the checker's accuracy, on the same prompts and seeds.

    Attributes:
        base: The accuracy of the base model, between 0 and 1.
        tuned: That of the tuned one.
        pictures: Of each.
    """

    base: float
    tuned: float
    pictures: int

    @property
    def points(self) -> float:
        """The rise in points, hundredths of the accuracy."""
        return 100 * (self.tuned - self.base)

    @property
    def standard_error(self) -> float:
        """That of `points`, as if the two rows had different seeds, which overstates it."""
        variance = self.base * (1 - self.base) + self.tuned * (1 - self.tuned)
        return 100 * math.sqrt(variance / self.pictures)


def band(rises: list[Rise]) -> tuple[float, float] | None:
    """Lowest and highest rise in points that a demo may have; None for fewer than three recorded ones.

    The rise, and not the accuracy, since base rows differ by up to four points between seeds and machines.
    """
    if len(rises) < SEEDS:
        return None
    margin = MARGIN * max(rise.standard_error for rise in rises)
    points = [rise.points for rise in rises]
    return min(points) - margin, max(points) + margin


def recorded_rises(method: str, settings: dict[str, Any], file: Path = RECORDED) -> list[Rise]:
    """The recorded demos of a method that had these settings, one for each seed.

    Args:
        method: Such as "ac_flow".
        settings: Those of the demo today; demos that were recorded with others do not count.
        file: Where they are recorded.
    """
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"].get(method, [])
    return [Rise(run["base"], run["tuned"], run["pictures"]) for run in runs if run["settings"] == settings]


def refuse_other_settings(arguments: list[str]) -> None:
    """Raises `ValueError` for a flag that would make another run of the demo."""
    flags = [part[2:].split("=")[0] for part in arguments if part.startswith("--")]
    other = [name for name in flags if name not in FREE]
    if other:
        raise ValueError(
            f"`--check` compares with recorded demos, which had the demo's own settings: leave `{other[0]}` out "
            f"(only {', '.join(FREE)} may differ)."
        )


def judge(method: str, rise: Rise, rises: list[Rise]) -> str:
    """Say in a sentence how a demo compares with the recorded ones.

    Args:
        method: Such as "ac_flow".
        rise: Of this demo.
        rises: The recorded ones.

    Raises:
        RuntimeError: If the rise is outside the band.
    """
    found = f"{method}: the checker's accuracy rose by {rise.points:+.1f} points"
    bounds = band(rises)
    if bounds is None:
        return (
            f"{found}; there is no band yet, which takes {SEEDS} recorded demos, and {len(rises)} "
            f"{'is' if len(rises) == 1 else 'are'}: record them by "
            f"`python benchmarks/convergence.py --methods {method}`."
        )
    low, high = bounds
    if not low <= rise.points <= high:
        raise RuntimeError(
            f"{found}, outside the band from {low:+.1f} to {high:+.1f} of {len(rises)} recorded demos: look at what "
            "changed since, and record them again if it was meant."
        )
    return f"{found}, inside the band from {low:+.1f} to {high:+.1f} of {len(rises)} recorded demos."
