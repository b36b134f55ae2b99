"""`benchmarks/study.py`: what collapse is, equal budgets, a run that is made once, and a page that says what was run."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "study.md"
RESULTS = BENCHMARKS / "results" / "study.json"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def point(updates: int, accuracy: float, diversity: float | None = 0.2) -> dict:
    """An evaluation of a run with a base of 40 % and a diversity of 0.2, two seconds and ten scored pictures an update."""
    tuned = {"checker_accuracy": accuracy, "reward/shapes": accuracy, "velocity_distance": accuracy / 10}
    tuned |= {} if diversity is None else {"diversity": diversity}
    rows = {"base": {"checker_accuracy": 0.4, "reward/shapes": 0.4, "diversity": 0.2}, "tuned": tuned}
    spent = {"updates": updates, "seconds": 2.0 * updates, "reward_calls": 10.0 * updates}
    return spent | {"training_reward": 0.9, "rows": rows}


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([point(1, 0.5), point(2, 0.41)], None),  # nine points below its best
        ([point(1, 0.5), point(2, 0.40)], {"updates": 2, "reason": "accuracy"}),
        ([point(1, 0.3)], {"updates": 1, "reason": "accuracy"}),  # the base model's was the best
        ([point(1, 0.5, 0.1), point(2, 0.5, 0.099)], {"updates": 2, "reason": "diversity"}),  # below half, not at it
        ([point(1, 0.5, None)], {"updates": 1, "reason": "diversity"}),
    ],
    ids=["near", "accuracy", "below the base", "diversity", "no right pictures"],
)
def test_collapse_is_half_the_diversity_or_ten_points(points, found):
    from study_measures import collapse

    assert collapse(points) == found


def test_an_equal_budget_is_read_between_two_evaluations():
    """40 % at 0, 50 % at 20 seconds, 70 % at 40: 60 % at 30 seconds, which are 15 updates and 150 scored pictures."""
    from study_measures import at, equal_budget

    record = {"points": [point(10, 0.5), point(20, 0.7, 0.1)], "collapse": None}
    for axis, budget in (("seconds", 30.0), ("updates", 15), ("reward_calls", 150.0)):
        found = at(record, axis, budget, 20)
        assert found["checker_accuracy"] == pytest.approx(60)
        assert found["kept_diversity"] == pytest.approx(0.75)
    assert at(record, "seconds", 10.0, 20)["checker_accuracy"] == pytest.approx(45)
    assert equal_budget([record, {"points": [point(15, 0.5)], "collapse": None}], "updates") == 15
    with pytest.raises(ValueError, match=r"^`budget` \(41\) must be at most the seconds of the run \(40\.0\)"):
        at(record, "seconds", 41, 20)


def test_a_collapsed_run_counts_with_its_end_and_lowers_no_budget():
    from study_measures import at, equal_budget

    whole = {"points": [point(10, 0.5), point(20, 0.7)], "collapse": None}
    ended = {"points": [point(10, 0.3)], "collapse": {"updates": 10, "reason": "accuracy"}}
    assert equal_budget([whole, ended], "updates") == 20
    assert equal_budget([ended], "updates") == 10
    assert at(ended, "updates", 20, 20)["checker_accuracy"] == pytest.approx(30)
    assert at(ended, "updates", 5, 20)["checker_accuracy"] == pytest.approx(35)


def test_diversity_is_compared_where_both_runs_first_were_as_good():
    """60 %: halfway from 50 to 70 % of the first run (0.2 to 0.1 of a base of 0.2), and the rival's only point."""
    from study_measures import matched_diversity

    record = {"points": [point(10, 0.5), point(20, 0.7, 0.1), point(30, 0.6, 0.01)]}
    assert matched_diversity(record, {"points": [point(10, 0.6, 0.12)]}) == pytest.approx((0.75 - 0.6, 20))
    assert matched_diversity(record, {"points": [point(10, 0.3)]}) is None


def test_few_step_samplers_are_judged_as_they_draw():
    """TAFS-GRPO's rows by the ODE where others are drawn in 20 steps, by its own sampler among those of 4."""
    from study_measures import measured

    record = {"points": [point(10, 0.5)]}
    rows = record["points"][0]["rows"]
    rows |= {"tuned_ode": rows["tuned"] | {"checker_accuracy": 0.6}, "base_ode": rows["base"]}
    assert measured(record, record["points"][0], 20)["checker_accuracy"] == pytest.approx(60)
    assert measured(record, record["points"][0], 4)["checker_accuracy"] == pytest.approx(50)


def test_the_plan_fits_about_a_day_of_one_core_and_every_setting_is_accepted(tmp_path):
    from study_plan import ABLATIONS, CRITICS, LONG, METHODS, SCORED, SEEDS, plan

    from flowrl_trainers.cli.arguments import TRAINERS, parse

    runs = plan()
    assert len({run.name for run in runs}) == len(runs)
    assert sum(run.estimated_seconds for run in runs) <= 25 * 3600
    for label, method in METHODS.items():
        seeds = [run.seed for run in runs if (run.stage, run.label) == ("main", label)]
        assert sorted(seeds) == sorted(SEEDS * len(method.settings))
    for stage, methods in (("calls", SCORED), ("critic", CRITICS)):
        named = [(run.label, run.seed) for run in runs if run.stage == stage]
        assert sorted(named) == sorted((label, seed) for label in methods for seed in SEEDS)
    long = [(run.stage, run.seed) for run in runs if run.stage in ("long", "ablation")]
    others = ["long"] * len(LONG) * (len(SEEDS) - 1)
    assert [stage for stage, _ in long] == ["long"] * len(LONG) + ["ablation"] * len(ABLATIONS) + others
    assert {seed for _, seed in long[: len(LONG) + len(ABLATIONS)]} == {SEEDS[0]}  # what is cut first comes last
    for run in [*{(r.setting, r.label): r for r in runs}.values(), *plan(quick=True)]:
        settings = run.settings(2.0) | {"output_dir": str(tmp_path)}
        _, config = parse("demo", TRAINERS[run.method.demo].config_class, [], settings)
        assert config.learning_rate == pytest.approx(2e-3)


def test_seeds_wait_for_the_grid_and_take_what_it_chose(tmp_path):
    """In both settings. And what is in the results file is not run again, unless its settings changed."""
    from study import study
    from study_plan import plan

    runs = [run for run in plan() if run.label == "AC-Flow" and run.stage in ("grid", "main")]
    grid, seeds = runs[:3], runs[3:]
    made = []

    def measure(run, factor):
        made.append((run.seed, factor))
        settings = json.loads(json.dumps(run.settings(factor)))
        return {"factor": factor, "settings": settings, "points": [point(10, 0.6 if factor == 2 else 0.5)]}

    file = tmp_path / "results" / "study.json"
    assert study(seeds, runs, file, measure) == {}
    study(grid, runs, file, measure)
    study(runs, runs, file, measure)
    assert {run.setting for run in grid} == {"black box"}
    assert {run.setting for run in seeds} == {"differentiable", "black box"}
    assert made == [(100, 0.5), (100, 1.0), (100, 2.0)] + 2 * [(0, 2.0), (1, 2.0), (2, 2.0)]
    records = json.loads(file.read_text())["runs"]
    records[seeds[1].name]["settings"]["learning_rate"] = 1
    file.write_text(json.dumps({"runs": records}))
    study(runs, runs, file, measure)
    assert made[9:] == [(1, 2.0)]
    del made[:]
    study(runs, runs, tmp_path / "two at a time.json", measure, jobs=2)
    assert sorted(made[:3]) == [(100, 0.5), (100, 1.0), (100, 2.0)]
    assert sorted(made[3:]) == sorted(2 * [(0, 2.0), (1, 2.0), (2, 2.0)])


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """The rows of each table of a page, by the first cell of its head and of the row."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()]
        found.setdefault(head[0], {}).update({row[0]: row[1:] for row in rows})
    return found


def test_the_smallest_study_is_run_and_its_page_has_its_numbers(tmp_path):
    """One update of four pictures for one trainer of each kind of reward; the page is read back and compared."""
    import study_report
    from study import study
    from study_plan import Length, plan
    from study_run import measure

    short = {"num_inference_steps": 2, "adjoint_steps": 2}, {
        "num_inference_steps": 2, "timestep_bins": 2, "num_generations": 2,
    }  # fmt: skip
    runs = []
    for run in plan(quick=True):
        changes = {"adjoint matching, K = 3": short[0], "DiffusionNFT": short[1]}.get(run.label)
        if changes is None or (run.label == "DiffusionNFT" and run.setting != "black box"):
            continue
        method = replace(run.method, changes=dict(run.method.changes) | changes, steps=2)
        runs.append(replace(run, method=method, length=Length(None, 1, 1, prompts=4, pictures=2, images=4)))
    assert len(runs) == 2
    file = tmp_path / "study.json"
    study(runs, runs, file, lambda run, factor: measure(run, factor, tmp_path / run.label))

    study_report.write_page(file, tmp_path / "study.md", quick=True)
    page, records = (tmp_path / "study.md").read_text(), json.loads(file.read_text())["runs"]
    assert "2 of 7 runs have been run" in page
    found = tables(page)
    for record in records.values():
        (last,) = record["points"]
        assert (last["updates"], last["reward_calls"]) == (1, 4)
        row = found[f"At equal seconds of training ({last['seconds']:.0f})"][record["label"]]
        assert row[0] == "1"
        accuracy, shapes = last["rows"]["tuned"]["checker_accuracy"], last["rows"]["tuned"]["reward/shapes"]
        assert row[1] == f"{100 * accuracy:.1f}"
        assert row[2] == f"{shapes:.3f}"
        assert row[4] == f"{last['rows']['tuned']['velocity_distance']:.3f}"
        assert row[5] == f"{100 * (last['training_reward'] - accuracy):+.1f}"
        assert row[6] == f"{record['feature_distance']:.3f}"
        assert row[9] == "1"  # the demo's learning rate
    assert page.count("None of these has been run yet.") == 3  # at equal calls, critics, long runs
    for setting in ("differentiable", "black_box"):
        for kind in ("pareto", "curves", "grid"):
            assert (tmp_path / "images" / f"study_{setting}_{kind}.png").stat().st_size > 2000


def test_a_long_run_and_a_failed_one_stand_on_the_page():
    """Three evaluations, the last one ten points below the best; two levels of a critic, of which the last rows count."""
    from study_measures import collapse
    from study_report import page

    points = [point(40, 0.5), point(80, 0.7), point(120, 0.6)]
    explained = [{"updates": n, "critic/a_0": 0.1 * n, "critic/a_1": -0.1 * n} for n in range(1, 9)]
    facts = {"setting": "black box", "date": "2026-11-29", "machine": "m", "torch": "2", "prompts": ["a red circle"]}
    long = facts | {"stage": "long", "label": "RAM", "seed": 0, "points": points, "explained_variance": explained}
    long["collapse"] = collapse(points)
    failed = facts | {"stage": "main", "label": "AWM", "seed": 1, "error": "ValueError: no"}
    text = page({"long/RAM": long, "main/AWM": failed})
    assert tables(text)["method"]["RAM"] == ["1", "120 (accuracy)", "70.0", "60.0", "1.00", "0.75 / -0.75"]
    could = tables((PAGE.parent / "tables" / "critics.md").read_text())["critic"]["*what could be explained*"]
    at_90, at_75, at_60, at_45, at_30 = (float(share) for share in could[-5:])
    bins = f"{(at_30 + at_45) / 2:.2f} / {at_60:.2f} / {at_75:.2f} / {at_90:.2f}"
    assert tables(text)["method"]["*what could be explained*"][-1] == bins
    assert "**main/AWM failed**: ValueError: no" in text
    assert "**1 of 192 runs have been run, between 2026-11-29 and 2026-11-29, on: m, torch 2.**" in text


def test_the_bins_of_a_critic_are_those_of_the_runs():
    """Quarters of the steps of the embedded model's sampler, whose levels are shifted."""
    from study_plan import ABLATIONS, BASES, LONG
    from study_report import BIN_EDGES

    from flowrl_trainers import FlowPipeline
    from flowrl_trainers.shapes import load_pipeline

    for method in (LONG["AC-Flow"], *ABLATIONS.values()):
        settings = BASES[method.demo] | dict(method.changes)
        assert settings["timestep_sampling"] == "pipeline"
        assert settings.get("timestep_bins", 4) == 4
    levels = FlowPipeline.from_pipeline(load_pipeline()).sigmas(4, "uniform").tolist()
    assert levels == pytest.approx([1.0, *reversed(BIN_EDGES), 0.0])


def test_methods_stand_below_the_base_that_their_sampler_draws(tmp_path):
    """Three methods of two samplers, so two rows of base pictures; a second seed adds none."""
    import torch
    from PIL import Image
    from study_report import draw
    from study_run import strip

    shades = iter(torch.linspace(0, 1, 8).tolist())
    ode, sde = (strip(torch.full((6, 3, 8, 8), next(shades))) for _ in range(2))
    drawn = [("RAM", 0, ode), ("Flow-GRPO", 0, sde), ("AWM", 0, ode), ("AWM", 1, sde)]
    records = {
        f"{label} {seed}": {
            "stage": "calls", "setting": "black box", "label": label, "seed": seed,
            "pictures": {"base": base, "tuned": strip(torch.full((6, 3, 8, 8), next(shades)))},
        }
        for label, seed, base in drawn
    }  # fmt: skip
    draw(records, tmp_path)
    with Image.open(tmp_path / "study_calls_grid.png") as grid:
        assert grid.height == round(1.2 * 90 * (3 + 2))


def test_the_findings_of_the_page_hold():
    """Its sentences on the results file: who gains more, moves less and collapses, as means over the seeds."""
    from study_measures import at, matched_diversity, measured
    from study_plan import SEEDS

    runs = json.loads(RESULTS.read_text())["runs"]

    def of(stage, setting, label):
        return [runs[f"{stage}/{setting}/{label}/seed {seed}"] for seed in SEEDS]

    def rises(records, steps=20):
        ends = [measured(r, r["points"][-1], steps)["checker_accuracy"] for r in records]
        starts = [measured(r, None, steps)["checker_accuracy"] for r in records]
        return [end - start for end, start in zip(ends, starts, strict=True)]

    def mean(records, name, steps=20):
        return statistics.mean(measured(r, r["points"][-1], steps)[name] for r in records)

    adjoint, vgg, draft, grpo = (
        of("main", "differentiable", label)
        for label in ("adjoint matching, K = 3", "VGG-Flow", "DRaFT-3", "Flow-GRPO")
    )
    assert min(rises(adjoint) + rises(draft)) > max(rises(vgg) + rises(grpo))

    def gains(records):
        """In the same time."""
        ends = [at(r, "seconds", 240, 20)["checker_accuracy"] for r in records]
        return [end - measured(r, None, 20)["checker_accuracy"] for r, end in zip(records, ends, strict=True)]

    free = of("main", "differentiable", "VGG-Flow, no value network")
    fourth, both, memoryless = (
        of("main", "differentiable", f"adjoint matching, {label}")
        for label in ("K = 3, order 4", "K = 3, order 2+4", "memoryless")
    )
    for records, points in ((free, 34), (draft, 33), (fourth, 28), (both, 29), (vgg, 9), (memoryless, 1)):
        assert statistics.mean(gains(records)) == pytest.approx(points, abs=0.5)
    assert mean(free, "velocity_distance") < mean(draft, "velocity_distance") / 3
    for records in (free, fourth, both):
        assert all(matched_diversity(*pair)[0] > 0 for pair in zip(records, draft, strict=True))
    assert all(matched_diversity(*pair)[0] < 0 for pair in zip(free, adjoint, strict=True))
    in_20 = [
        [at(r, "updates", 20, 20)["checker_accuracy"] - measured(r, None, 20)["checker_accuracy"] for r in records]
        for records in (free, vgg)
    ]
    assert abs(statistics.mean(in_20[0]) - statistics.mean(in_20[1])) < 3
    longer = [v["seconds_per_update"] / f["seconds_per_update"] for v, f in zip(vgg, free, strict=True)]
    assert min(longer) > 2
    assert {r["points"][-1]["updates"] for r in memoryless} == {34}
    spent = [statistics.mean(r["points"][-1]["reward_calls"] for r in records) for records in (free, draft, adjoint)]
    assert spent[0] > 3 * max(spent[1:])
    for records, points in ((draft, 10), (adjoint, 6), (free, 2)):
        early = [at(r, "reward_calls", 624, 20)["checker_accuracy"] for r in records]
        early = [end - measured(r, None, 20)["checker_accuracy"] for r, end in zip(records, early, strict=True)]
        assert statistics.mean(early) == pytest.approx(points, abs=0.5)
    assert mean(adjoint, "velocity_distance") < mean(draft, "velocity_distance") / 5
    two, whole = (of("main", "differentiable", f"adjoint matching, {label}") for label in ("K = 2", "all steps"))
    assert min(rises(two)) > max(rises(vgg + grpo + whole))
    assert all(matched_diversity(*pair)[0] > 0 for pair in zip(two, draft, strict=True))
    for records, points in ((whole, 8), (adjoint, 27)):
        assert statistics.mean(rises(records)) == pytest.approx(points, abs=0.5)
    assert mean(two, "velocity_distance") < mean(draft, "velocity_distance") / 5
    longer, shorter = (statistics.mean(r["seconds_per_update"] for r in records) for records in (whole, adjoint))
    assert longer / shorter == pytest.approx(2.6, abs=0.05)
    at_20 = [
        statistics.mean(at(r, "updates", 20, 20)["checker_accuracy"] for r in records) for records in (whole, adjoint)
    ]
    assert at_20[0] - at_20[1] == pytest.approx(2, abs=0.5)
    assert mean(grpo, "velocity_distance") > 2 * mean(adjoint, "velocity_distance")
    assert all(matched_diversity(*pair)[0] > 0 for pair in zip(adjoint, draft, strict=True))
    slower = [v["seconds_per_update"] / a["seconds_per_update"] for v, a in zip(vgg, adjoint, strict=True)]
    assert min(slower) > 3

    awm, nft, ram, ac_flow = (
        of("calls", "black box", label) for label in ("AWM", "DiffusionNFT", "RAM", "AC-Flow, linear")
    )
    assert min(rises(awm + nft + ram)) > max(rises(ac_flow))
    assert max(mean(r, "kept_diversity") for r in (awm, nft, ram)) < 0.8
    ten, four = (of("calls", "black box", label) for label in ("Flow-GRPO", "Flow-GRPO, 4 steps"))
    assert min(rises(awm + nft + ram)) > max(rises(ten + four))
    for records, points in ((ten, 7), (four, 5)):
        assert statistics.mean(rises(records)) == pytest.approx(points, abs=0.5)
    longer, shorter = (statistics.mean(r["points"][-1]["seconds"] for r in records) for records in (ten, four))
    assert longer / shorter == pytest.approx(3, abs=0.15)
    assert mean(ac_flow, "velocity_distance") < 0.1 < min(mean(r, "velocity_distance") for r in (awm, nft, ram))

    tafs = of("main", "black box", "TAFS-GRPO, mixed")
    fast = of("main", "black box", "AWM")
    grpo = of("main", "black box", "Flow-GRPO, 4 steps")
    for records, points, kept in ((fast, 35, 0.85), (tafs, 24, 1.0), (grpo, 7, 0.98)):  # as in the table
        assert statistics.mean(gains(records)) == pytest.approx(points, abs=0.5)
        left = statistics.mean(at(r, "seconds", 240, 20)["kept_diversity"] for r in records)
        assert left == pytest.approx(kept, abs=0.005)
    assert min(rises(fast)) > max(rises(tafs + grpo))
    for label, reached in (("RAM", 84), ("DiffusionNFT", 89)):
        records = of("main", "black box", label)
        assert {r["factor"] for r in records} == {2}
        early = [r["collapse"] for r in records if r["collapse"] is not None]
        assert len(early) == 2
        assert all(c["reason"] == "accuracy" and c["updates"] in (15, 16) for c in early)
        (in_grid,) = [
            r
            for r in runs.values()
            if (r["stage"], r["label"], r["factor"]) == ("grid", label, 1) and len(r["points"])
        ]
        assert in_grid["points"][0]["updates"] == {"RAM": 21, "DiffusionNFT": 23}[label]
        assert rises([in_grid])[0] == pytest.approx({"RAM": -5.5, "DiffusionNFT": -7}[label], abs=0.5)
        slower = of("calls", "black box", label)
        assert {r["factor"] for r in slower} == {1}
        for r in slower:
            assert [point["updates"] for point in r["points"]] == [31, 62]
            assert min(rises([r | {"points": [point]}])[0] for point in r["points"]) > 0
        assert mean(slower, "checker_accuracy") == pytest.approx(reached, abs=0.5)
    orw = of("main", "black box", "ORW-CFM-W2")
    assert sorted(r["collapse"]["updates"] for r in orw if r["collapse"]) == [51, 52]
    moved = {
        r["label"]: mean(of(r["stage"], r["setting"], r["label"]), "velocity_distance")
        for r in runs.values()
        if r["stage"] == "main"
    }
    assert max(moved, key=moved.get) == "ORW-CFM-W2"
    for setting in ("differentiable", "black box"):
        assert 1 < statistics.mean(rises(of("main", setting, "AC-Flow"))) < 3
    final, level = (of("main", "black box", f"TAFS-GRPO, {rule}") for rule in ("final", "level"))
    for records, in_twenty, in_four in ((final, 29, 35), (tafs, 24, 29), (level, 15, 27)):
        assert statistics.mean(gains(records)) == pytest.approx(in_twenty, abs=0.5)
        assert statistics.mean(rises(records, 4)) == pytest.approx(in_four, abs=0.5)
    assert [sum(r["collapse"] is not None for r in records) for records in (final, tafs, level)] == [0, 0, 1]
    for records in (final, tafs):
        assert mean(records, "kept_diversity", 4) == pytest.approx(0.98, abs=0.005)
        assert mean(records, "kept_diversity") > 0.99
    assert min(r["points"][-1]["updates"] for r in final) > max(r["points"][-1]["updates"] for r in tafs)
    assert statistics.mean(rises(grpo, 4)) == pytest.approx(9, abs=0.5)
    few = [of("main", "black box", label) for label in ("DiffusionNFT, 4 steps", "AWM, 4 steps")]
    assert statistics.mean(rises(tafs, 4)) > max(statistics.mean(rises(records, 4)) for records in (grpo, *few))
    assert statistics.mean(rises(few[1], 4)) == pytest.approx(24, abs=0.5)
    more = [rise > other for rise, other in zip(rises(few[1], 4), rises(tafs, 4), strict=True)]
    assert more == [r["collapse"] is not None for r in few[1]] == [True, False, True]
    for label in ("DiffusionNFT, 4 steps", "AWM, 4 steps"):
        records = of("main", "black box", label)
        assert sum(r["collapse"] is not None for r in records) >= 2
        assert all(rise < 0 for rise in rises([r | {"points": r["points"][:1]} for r in records], 4))
    assert not any(r["collapse"] for r in tafs)
    first = [r | {"points": r["points"][:1]} for r in (*tafs, *of("main", "differentiable", "TAFS-GRPO, mixed"))]
    assert (min(rises(first)), max(rises(first))) == pytest.approx((-7, 5.5), abs=0.5)
    with_it, without = (of("critic", "black box", f"RAM, 4 steps, {which}") for which in ("critic", "no critic"))
    spent, saved = (
        {name: statistics.mean(r["points"][-1][name] for r in records) for name in ("reward_calls", "seconds")}
        for records in (with_it, without)
    )
    assert spent["reward_calls"] == 5 * saved["reward_calls"]
    assert spent["seconds"] / saved["seconds"] == pytest.approx(1.5, abs=0.05)

    long = {r["label"]: r for r in runs.values() if r["stage"] in ("long", "ablation")}

    def of_long(name):
        return {label: measured(r, r["points"][-1], 20)[name] for label, r in long.items()}

    end, kept, moved = (of_long(name) for name in ("checker_accuracy", "kept_diversity", "velocity_distance"))
    base = measured(long["AC-Flow"], None, 20)["checker_accuracy"]
    clipped = {"": 11, ", exponential": 7}  # what it costs, by the weighting
    for weighting, points in clipped.items():
        free = end[f"AC-Flow{weighting}, no clipping of advantages"]
        assert free - end[f"AC-Flow{weighting}"] == pytest.approx(points, abs=0.5)
        assert abs(end[f"AC-Flow{weighting}"] - end[f"AC-Flow{weighting}, no critic"]) < 3
        spent, without = (long[f"AC-Flow{weighting}{label}"]["points"][-1] for label in ("", ", no critic"))
        assert spent["reward_calls"] == 5 * without["reward_calls"]
        assert without["seconds"] < 0.67 * spent["seconds"]
    warmed = (", backbone critic", ", backbone critic, no warm-up")
    for label in ("", ", no clipping of advantages", ", no critic", *warmed):
        gained, other = (end[f"AC-Flow{weighting}{label}"] - base for weighting in ("", ", exponential"))
        assert other <= 0.5 * gained + 0.1  # a picture in 256 is 0.4 points
    for weighting in clipped:
        with_it, without = (end[f"AC-Flow{weighting}{label}"] for label in warmed)
        assert abs(with_it - without) < 3
    for label in (f"AC-Flow{weighting}{how}" for weighting in clipped for how in warmed):
        cleanest = [row.get("critic/explained_variance_0", 0.0) for row in long[label]["explained_variance"]]
        assert abs(statistics.mean(cleanest[:50])) < 0.03
        assert statistics.mean(cleanest[50:100]) < statistics.mean(cleanest[-100:]) / 2
        assert 0.2 < statistics.mean(cleanest[-100:]) < 0.25
    shaped, raw = end["AC-Flow, no critic"] - base, end["AC-Flow, no critic, no shaping"] - base
    assert shaped > 2 * raw

    assert end["AC-Flow"] - base == pytest.approx(18, abs=0.5)
    anchored = {label for label in long if label.startswith("AC-Flow") and "anchor" not in label}
    assert not any(long[label]["collapse"] for label in anchored)
    assert min(kept[label] for label in anchored) > 0.9
    assert max(moved[label] for label in anchored) < 0.12
    weak, none = long["AC-Flow, anchor of 0.01 for 0.5"], long["AC-Flow, exponential, no anchor"]
    at_160 = measured(weak, weak["points"][3], 20)
    assert weak["points"][3]["updates"] == 160
    assert at_160["checker_accuracy"] - base == pytest.approx(47, abs=0.5)
    assert at_160["kept_diversity"] > 0.9
    assert weak["collapse"] == {"updates": 240, "reason": "diversity"}
    assert none["collapse"] == {"updates": 40, "reason": "accuracy"}
    assert end["AC-Flow, exponential, no anchor"] == pytest.approx(3, abs=0.5)
    assert long["RAM"]["collapse"]["reason"] == "accuracy"
    assert long["DiffusionNFT"]["collapse"]["reason"] == "diversity"
    assert [long[label]["collapse"]["updates"] for label in ("RAM", "DiffusionNFT")] == [200, 240]
    for label, accuracy, of_own in (("TAFS-GRPO", 88, 0.72), ("Flow-GRPO", 95, 0.87)):
        assert long[label]["collapse"] is None
        assert end[label] == pytest.approx(accuracy, abs=0.5)
        assert kept[label] == pytest.approx(0.97, abs=0.005)
        own = measured(long[label], long[label]["points"][-1], 4)
        assert own["checker_accuracy"] == pytest.approx(95, abs=0.5)
        assert own["kept_diversity"] == pytest.approx(of_own, abs=0.005)
    ten, four = (long[label]["points"][-1] for label in ("Flow-GRPO", "TAFS-GRPO"))
    assert 3 * ten["reward_calls"] == four["reward_calls"]
    assert 2 < ten["seconds"] / four["seconds"] < 2.5
    early = long["Flow-GRPO"]["points"][2]
    assert early["updates"] == 120
    assert measured(long["Flow-GRPO"], early, 20)["checker_accuracy"] - base < 11
    ram = [measured(long["RAM"], point, 20)["checker_accuracy"] for point in long["RAM"]["points"]]
    assert (max(ram[:-1]), ram[-1]) == pytest.approx((69.5, 46.5), abs=0.1)


def test_the_page_in_the_docs_is_that_of_the_results_file():
    """Text and pictures follow from the file; each mean of the tables at equal time is computed here again."""
    from study_measures import at, equal_budget
    from study_plan import METHODS
    from study_report import black_box_table, page

    records = json.loads(RESULTS.read_text())["runs"]
    assert page(records) == PAGE.read_text()
    assert black_box_table(records) == (PAGE.parent / "tables" / "black_box.md").read_text()
    assert black_box_table(records).count("\n| base |") == 1  # the methods start from one, in whatever order runs end
    main = [r for r in records.values() if "error" not in r and r["stage"] == "main"]
    for setting in {r["setting"] for r in main}:
        section = PAGE.read_text().split(f"\n## {setting.capitalize()}: the reward")[1].partition("\n## ")[0]
        in_20_steps = tables(section.partition("\n### In four steps")[0])
        shown = [r for r in main if r["setting"] == setting and METHODS[r["label"]].steps == 20]
        budget = equal_budget(shown, "seconds")
        for label in {r["label"] for r in shown}:
            each = [at(r, "seconds", budget, 20)["checker_accuracy"] for r in shown if r["label"] == label]
            row = in_20_steps[f"At equal seconds of training ({budget:.0f})"][label]
            assert re.match(rf"{statistics.mean(each):.1f}( \(|$)", row[1])
