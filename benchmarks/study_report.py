"""Writes the page of the study from its results file alone: tables, plots and the grid of pictures.

python benchmarks/study_report.py
"""

import argparse
import base64
import io
import json
import statistics
from bisect import bisect
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from study_measures import AXES, KEPT_DIVERSITY, LOST_POINTS, Record, at, equal_budget, matched_diversity, measured
from study_plan import (
    ABLATIONS,
    CALLS,
    CRITICS,
    FEWER_IMAGES,
    GRID,
    GRID_LENGTH,
    GRID_SEED,
    LENGTH,
    LONG,
    LONG_IMAGES,
    LONG_UPDATES,
    METHODS,
    QUICK_LENGTH,
    REWARDS,
    SCORED,
    SEEDS,
    Method,
    plan,
)
from study_text import CLAIMS, CRITICS_TEXT, FAILURES, FINDINGS, HEAD, METHOD, PUBLISHED, SCORED_TEXT
from variants import spread

ROOT = Path(__file__).parent.parent
CRITICS_TABLE = ROOT / "docs" / "tables" / "critics.md"
BIN_EDGES = (0.5, 0.75, 0.9)  # of the four bins of `timestep_sampling="pipeline"` in the embedded model
NOT_RUN, NONE_YET = "not run", "None of these has been run yet."
UNITS = {"seconds": "seconds of training", "reward_calls": "scored pictures", "updates": "updates"}

RIVALS = ("DRaFT-3", "Flow-GRPO", "Flow-GRPO, 4 steps")
LONG_STAGES = ("long", "ablation")
ORDER = [*METHODS, *SCORED, *CRITICS, *LONG, *ABLATIONS]  # of the rows of a grid
# By what draws in four steps; all others by the ODE.
BASES_OF_FOUR = {
    "tafs_grpo": "base, by the sampler of TAFS-GRPO",
    "flow_grpo": "base, by the sampler of Flow-GRPO",
}
MATCHED = ("adjoint matching, K = 3", "VGG-Flow", "VGG-Flow, no value network", "AC-Flow", "TAFS-GRPO, mixed")

COLUMNS: dict[str, tuple[str, str]] = {
    "checker_accuracy": ("checker accuracy, %", ".1f"),
    "shapes_reward": ("shapes reward", ".3f"),
    "kept_diversity": ("diversity, share of base", ".2f"),
    "velocity_distance": ("velocity distance", ".3f"),
    "over_optimisation": ("over-optimisation, points", "+.1f"),
}
HEADS = {"calls": "at the end, reward: the checker", "critic": "rollouts, and whether there is a critic"}
OF_END: dict[str, tuple[str, str]] = {
    "rise": ("rise, points", "+.1f"),
    "norm_ratio": ("length of the velocity beside the base's, longest quarter", ".3f"),
    "reward_calls": ("scored pictures", ".0f"),
    "seconds": ("seconds of one core", ".0f"),
}
COLLAPSED = "collapsed, at update"
OF_RUN: dict[str, tuple[str, str]] = {
    "feature_distance": ("feature distance", ".3f"),
    "seconds_per_update": ("s per update", ".2f"),
    "peak_mib": ("peak MiB of the process", ".0f"),
    "factor": ("learning rate, times the demo's", "g"),
}


def page(records: dict[str, Record], quick: bool = False) -> str:
    """The text of the page.

    Args:
        records: By the names of their runs.
        quick: Whether they are those of the quick study.
    """
    runs, done = plan(quick), [r for r in records.values() if "error" not in r]
    length = QUICK_LENGTH if quick else LENGTH
    dates = sorted(r["date"] for r in done)
    where = sorted({f"{r['machine']}, torch {r['torch']}" for r in done})
    lines = [
        HEAD.format(
            not_run=NOT_RUN, done=len(done), planned=len(runs),
            when=f", between {dates[0]} and {dates[-1]}, on: {'; '.join(where)}" if done else "",
        ),
        "" if quick else FINDINGS,
        METHOD.format(
            seeds=", ".join(map(str, SEEDS)), pictures=length.prompts * length.pictures, prompts=length.prompts,
            grid=", ".join(f"{factor:g}" for factor in GRID), grid_seed=GRID_SEED,
            grid_seconds=GRID_LENGTH.seconds, grid_pictures=GRID_LENGTH.prompts * GRID_LENGTH.pictures,
            seconds=length.seconds,
            images=FEWER_IMAGES["per_device_train_batch_size"],
            kept=KEPT_DIVERSITY, lost=LOST_POINTS,
        ),
    ]  # fmt: skip
    failed = {name: r["error"] for name, r in records.items() if "error" in r}
    lines += [f"**{name} failed**: {error}\n" for name, error in failed.items()]
    if quick:
        lines += ["**This is the quick study**: seed 0 alone, at the demo's learning rate, 32 pictures an update.", ""]
    main = [r for r in done if r["stage"] in ("main", "quick")]
    for setting, reward in REWARDS.items():
        of_setting = [r for r in main if r["setting"] == setting]
        lines += [f"## {setting.capitalize()}: the reward is `{reward}`", ""]
        if not of_setting:
            lines += [NONE_YET, ""]
            continue
        for axis in AXES:
            lines += _equal(of_setting, setting, axis, 20)
        lines += _matched(of_setting, setting) + _images(of_setting, setting)
        if setting == "black box":
            lines += [
                "### In four steps",
                "",
                "Rows are drawn in 4 steps, those of TAFS-GRPO and Flow-GRPO by the samplers that they train.",
                "",
            ]
            lines += _equal(of_setting, setting, "seconds", 4)
    lines += _scored(done, "calls", SCORED, f"Black box: after {CALLS} scored pictures", SCORED_TEXT)
    lines += _scored(done, "critic", CRITICS, "What a critic buys", CRITICS_TEXT)
    lines += _long([r for r in done if r["stage"] in LONG_STAGES])
    if not quick:
        lines += [CLAIMS, FAILURES, PUBLISHED]
    return "\n".join(lines).rstrip() + "\n"


def _labels(setting: str, steps: int) -> list[str]:
    """The methods of a table."""
    return [label for label, method in METHODS.items() if setting in method.settings and steps in method.tables]


def _equal(records: list[Record], setting: str, axis: str, steps: int) -> list[str]:
    """A table at an equal budget; the budget is that of the methods in it."""
    labels = _labels(setting, steps)
    shown = [r for r in records if r["label"] in labels]
    budget = equal_budget(shown, axis) if shown else None
    of_run = OF_RUN if axis == "seconds" else {}
    title = f"At equal {UNITS[axis]}" + (f" ({budget:.0f})" if budget is not None else "")
    names = [*(title for title, _ in (COLUMNS | of_run).values()), COLLAPSED]
    lines = [f"| {title} | runs | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names) + "---|"]
    for label, of_base in _bases(shown, steps).items():
        rows = [measured(r, None, steps) for r in of_base]
        lines.append(_row(label, rows, of_run) + " |" if rows else _empty(label, names))
    for label in labels:
        found = [r for r in shown if r["label"] == label]
        if not found or budget is None:
            lines.append(_empty(label, names))
            continue
        values = [at(r, axis, budget, steps) | {name: r[name] for name in of_run} for r in found]
        lines.append(_row(label, values, of_run) + f" {_ends(found)} |")
    return [*lines, ""]


def _bases(records: list[Record], steps: int) -> dict[str, list[Record]]:
    """The runs that say what the base model does, sampler by sampler."""
    if steps == 20:
        return {"base": records}
    found: dict[str, list[Record]] = {"base": []} | {name: [] for name in BASES_OF_FOUR.values()}
    for record in records:
        sampler = record["settings"].get("kernel", METHODS[record["label"]].demo)
        found[BASES_OF_FOUR.get(sampler, "base")].append(record)
    return found


def _row(label: str, values: list[dict[str, float]], more: Mapping[str, tuple[str, str]]) -> str:
    cells = []
    for name, (_, form) in (COLUMNS | more).items():
        present = [v[name] for v in values if name in v]
        cells.append(spread(present, form) if present else "")
    return f"| {label} | {len(values)} | " + " | ".join(cells) + " |"


def _empty(label: str, names: list[str]) -> str:
    return f"| {label} | {NOT_RUN} | " + " | ".join([""] * len(names)) + " |"


def _matched(records: list[Record], setting: str) -> list[str]:
    """How much more diversity a method keeps than a rival at the same checker accuracy, seed by seed."""
    rivals = [label for label in RIVALS if setting in METHODS[label].settings]
    by_run = {(r["label"], r["seed"]): r for r in records}
    lines = ["| Diversity at matched checker accuracy less that of | " + " | ".join(rivals) + " |"]
    lines.append("|---|" + "---:|" * len(rivals))
    for label in (label for label in MATCHED if setting in METHODS[label].settings):
        cells = []
        for rival in rivals:
            pairs = [(by_run[label, s], by_run[rival, s]) for s in SEEDS if {(label, s), (rival, s)} <= by_run.keys()]
            found = [d for pair in pairs if (d := matched_diversity(*pair)) is not None]
            cells.append(_at_rise(found) if found else NOT_RUN if not pairs else "never above the base")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _at_rise(found: list[tuple[float, float]]) -> str:
    """Differences, and how far above the base they were taken, from those of pairs of runs."""
    differences, rises = zip(*found, strict=True)
    pairs = f"{len(found)} pair{'s' if len(found) > 1 else ''}"
    return f"{spread(list(differences), '+.3f')}, {statistics.mean(rises):.0f} points above the base ({pairs})"


def _images(records: list[Record], setting: str) -> list[str]:
    if not records:
        return []
    name, texts = setting.replace(" ", "_"), {
        "pareto": "Checker accuracy at the end of every run, against kept diversity and against velocity distance",
        "curves": "Checker accuracy against seconds of training and against scored pictures, every run",
    }  # fmt: skip
    plots = [part for kind, text in texts.items() for part in (f"![{text}](images/study_{name}_{kind}.png)", "")]
    return [*plots, *_pictures(records, name)]


def _pictures(records: list[Record], name: str) -> list[str]:
    """The grid of a setting or a stage, with what was asked for."""
    return [f"![The same prompts and seeds: {'; '.join(records[0]['prompts'])}](images/study_{name}_grid.png)", ""]


def _scored(records: list[Record], stage: str, methods: Mapping[str, Method], title: str, text: str) -> list[str]:
    found = [r for r in records if r["stage"] == stage]
    shown = [*table_at_end(records, stage, methods), "", *_pictures(found, stage)] if found else [NONE_YET, ""]
    return [f"## {title}", "", *text.splitlines(), "", *shown]


def table_at_end(records: list[Record], stage: str, methods: Mapping[str, Method]) -> list[str]:
    """The methods of a stage at the end of their runs, under a row for each base that they start from."""
    names = [*(title for title, _ in (COLUMNS | OF_END).values()), COLLAPSED]
    lines = [f"| {HEADS[stage]} | runs | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names) + "---|"]
    base: list[dict[str, float]] = []
    for label, method in methods.items():
        found = [r for r in records if (r["stage"], r["label"]) == (stage, label)]
        found.sort(key=lambda r: r["seed"])  # the file has them as they ended
        if not found:
            lines.append(_empty(label, names))
            continue
        before, base = base, [measured(r, None, method.steps) for r in found]
        if base[:1] != before[:1]:
            lines.append(_row("base", base, OF_END) + " |")
        lines.append(_row(label, [_at_end(r, method.steps) for r in found], OF_END) + f" {_ends(found)} |")
    return lines


def black_box_table(records: dict[str, Record]) -> str:
    """The methods for rewards without a gradient, with what the table is of."""
    done = [r for r in records.values() if "error" not in r]
    return "\n".join(table_at_end(done, "calls", SCORED)) + "\n"


def _at_end(record: Record, steps: int) -> dict[str, float]:
    """The values of a run's last evaluation, with those of `OF_END`."""
    last = record["points"][-1]
    found = measured(record, last, steps)
    ratios = [value for name, value in last["rows"]["tuned"].items() if name.startswith("velocity_norm_ratio_")]
    return found | {
        "rise": found["checker_accuracy"] - measured(record, None, steps)["checker_accuracy"],
        "norm_ratio": max(ratios),
        "reward_calls": last["reward_calls"],
        "seconds": last["seconds"],
    }


def _long(records: list[Record]) -> list[str]:
    """The long runs and the ablations of AC-Flow, with what its critic explains of the reward's variance."""
    lines = [
        "## Long runs: what is stable",
        "",
        f"Black box, {LONG_UPDATES} updates of {LONG_IMAGES} pictures or until collapse; the demo's learning rate. "
        "Collapse is judged by the sampler that a method trains, the rows here are drawn by the ODE. Levels are the "
        "bins of these runs, quarters of the sampler's steps: sigma up to 0.5, 0.75, 0.9 and 1; [what could be "
        "explained](ac_flow.md#critics) is the mean of the levels measured in a bin.",
        "",
    ]
    if not records:
        return [*lines, NONE_YET, ""]
    lines += [
        f"| method | runs | {COLLAPSED} | best checker accuracy, % | last | kept diversity, last "
        "| explained variance of the critic by level, last quarter |",
        "|---|---:|---|---:|---:|---:|---:|",
        f"| *what could be explained* | | | | | | {_explainable()} |",
    ]
    for label in [*LONG, *ABLATIONS]:
        found = [r for r in records if r["label"] == label]
        if not found:
            lines.append(f"| {label} | {NOT_RUN} | | | | | |")
            continue
        values = [[measured(r, point, 20) for point in r["points"]] for r in found]
        best = spread([max(v["checker_accuracy"] for v in each) for each in values], ".1f")
        last = spread([each[-1]["checker_accuracy"] for each in values], ".1f")
        kept = spread([each[-1].get("kept_diversity", 0.0) for each in values], ".2f")
        lines.append(f"| {label} | {len(found)} | {_ends(found)} | {best} | {last} | {kept} | {_explained(found)} |")
    curves = "![Checker accuracy against updates and against scored pictures, every run](images/study_long_curves.png)"
    return [*lines, "", curves, "", *_pictures(records, LONG_STAGES[0])]


def _ends(records: list[Record]) -> str:
    """When and why runs collapsed."""
    ends = [f"{r['collapse']['updates']} ({r['collapse']['reason']})" for r in records if r["collapse"]]
    return ", ".join(ends) or "none"


def _explainable() -> str:
    """The shares that a critic could explain, from the table of `critics.py`, bin by bin from the cleanest."""
    rows = [line.strip("| ").split("|") for line in CRITICS_TABLE.read_text(encoding="utf-8").splitlines()]
    bins: list[list[float]] = [[], [], [], []]
    for level, share in zip(rows[0][3:], rows[2][3:], strict=True):
        bins[bisect(BIN_EDGES, float(level.removeprefix(" sigma ")))].append(float(share))
    return " / ".join(f"{statistics.mean(shares):.2f}" for shares in bins)


def _explained(records: list[Record]) -> str:
    """The mean over the last quarter of every run, level by level from the cleanest; empty without a critic."""
    late = [row for r in records for row in r["explained_variance"][-max(1, len(r["explained_variance"]) // 4) :]]
    levels = sorted({name for row in late for name in row if name != "updates"})
    return " / ".join(f"{statistics.mean(row[name] for row in late if name in row):.2f}" for name in levels)


# ---- pictures -----------------------------------------------------------------------------------------------------


def draw(records: dict[str, Record], folder: Path) -> None:
    """Draw plots and grids of all settings and stages that have runs into a folder."""
    done = [r for r in records.values() if "error" not in r]
    for stages in (("calls",), ("critic",), LONG_STAGES):
        found = [r for r in done if r["stage"] in stages]
        if found:
            _grid(found, folder / f"study_{stages[0]}_grid.png")
        if found and stages == LONG_STAGES:
            _curves(found, folder / "study_long_curves.png", ["updates", "reward_calls"])
    for setting in REWARDS:
        found = [r for r in done if r["setting"] == setting and r["stage"] in ("main", "quick")]
        if found:
            name = f"study_{setting.replace(' ', '_')}"
            _pareto(found, folder / f"{name}_pareto.png")
            _curves(found, folder / f"{name}_curves.png", ["seconds", "reward_calls"])
            _grid(found, folder / f"{name}_grid.png")


def _two_plots(records: list[Record], file: Path, axes: list[str], draw_run: Callable[..., None]) -> None:
    """Two plots of checker accuracy side by side, a colour for each method."""
    labels = list(dict.fromkeys(r["label"] for r in records))
    colours = dict(zip(labels, matplotlib.colormaps["tab20"](np.linspace(0, 1, len(labels))), strict=True))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for plot, axis in zip(figure.subplots(1, 2, sharey=True), axes, strict=True):
        named: set[str] = set()
        for record in records:
            label = record["label"]
            draw_run(plot, axis, record, color=colours[label], label=None if label in named else label)
            named.add(label)
        plot.set_xlabel((COLUMNS.get(axis) or (UNITS.get(axis),))[0])
    figure.axes[0].set_ylabel(COLUMNS["checker_accuracy"][0])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    figure.savefig(file, dpi=90)


def _pareto(records: list[Record], file: Path) -> None:
    def end(plot: Axes, axis: str, record: Record, **style: object) -> None:
        last = measured(record, record["points"][-1], METHODS[record["label"]].steps)
        if axis in last:
            plot.plot(last[axis], last["checker_accuracy"], "o", **style)

    _two_plots(records, file, ["kept_diversity", "velocity_distance"], end)


def _curves(records: list[Record], file: Path, axes: list[str]) -> None:
    def curve(plot: Axes, axis: str, record: Record, **style: object) -> None:
        points, steps = [None, *record["points"]], (METHODS | LONG | ABLATIONS)[record["label"]].steps
        accuracy = [measured(record, point, steps)["checker_accuracy"] for point in points]
        plot.plot([0.0 if point is None else point[axis] for point in points], accuracy, "-", **style)

    _two_plots(records, file, axes, curve)


def _grid(records: list[Record], file: Path) -> None:
    """A row of pictures for each method, of its first seed, below that of the base model by the same sampler."""
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: (r["seed"], ORDER.index(r["label"]))):
        first.setdefault(record["label"], record)
    rows: list[tuple[str, str]] = []
    for base in dict.fromkeys(record["pictures"]["base"] for record in first.values()):
        rows.append(("base, drawn as the rows below", base))
        rows += [(label, r["pictures"]["tuned"]) for label, r in first.items() if r["pictures"]["base"] == base]
    figure = Figure(figsize=(7, 1.2 * len(rows)), layout="constrained")
    for plot, (label, strip) in zip(np.atleast_1d(figure.subplots(len(rows), 1)), rows, strict=True):
        plot.imshow(Image.open(io.BytesIO(base64.b64decode(strip))), interpolation="nearest")
        plot.set_title(label, fontsize=8, loc="left")
        plot.axis("off")
    figure.savefig(file, dpi=90)


def write_page(results: Path, file: Path, quick: bool = False) -> None:
    """Write the page, its pictures into `images/` and a table into `tables/` beside it.

    Args:
        results: The results file.
        file: The page.
        quick: Whether the results are those of the quick study.
    """
    records = json.loads(results.read_text(encoding="utf-8"))["runs"]
    for folder in ("images", "tables"):
        (file.parent / folder).mkdir(parents=True, exist_ok=True)
    draw(records, file.parent / "images")
    file.write_text(page(records, quick), encoding="utf-8")
    if not quick:  # for the pages of the methods
        (file.parent / "tables" / "black_box.md").write_text(black_box_table(records), encoding="utf-8")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "study.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "study.md")
    parser.add_argument("--quick", action="store_true", help="The results are those of the quick study.")
    args = parser.parse_args()
    write_page(args.results, args.page, quick=args.quick)


if __name__ == "__main__":
    main()
