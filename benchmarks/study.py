"""The study: all methods on the embedded model, at equal time, reward calls and updates; then the page is written.

    python benchmarks/study.py --plan              # what it would run, and for how long
    python benchmarks/study.py --jobs 2            # all that is missing in the results file, a core for each run
    python benchmarks/study.py --only AC-Flow RAM --stages grid main --seeds 0
    python benchmarks/study.py --quick --results quick.json --page quick.md

The results file is written after every run, so that the study can be stopped and spread; a run whose settings changed
is run again. The methods, and how long each run is, stand in `study_plan.py`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from study_measures import Record, best_factor
from study_plan import GRID, STAGES, Run, plan
from study_report import write_page
from tqdm import tqdm

from flowrl_trainers.run_folder.text_files import write_json

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "study.json", ROOT / "docs" / "study.md"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # so that seconds of the processor are comparable
Measure = Callable[[Run, float], Record]


def read(file: Path) -> dict[str, Record]:
    """The records of a results file by the names of their runs; none without the file."""
    return json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}


def factor_of(run: Run, records: dict[str, Record], runs: list[Run]) -> float | None:
    """The factor on a run's learning rate; None while the grid that decides it is not complete.

    Args:
        run: The run.
        records: What has been run.
        runs: The whole plan.
    """
    if run.factor is not None:
        return run.factor
    grid = [r for r in runs if (r.stage, r.label) == ("grid", run.label)]
    found = [records[r.name] for r in grid if is_done(r, records, runs)]
    return best_factor(found, run.method.steps) if len(found) == len(GRID) else None


def is_done(run: Run, records: dict[str, Record], runs: list[Run]) -> bool:
    """Whether a run is among the records, finished and with today's settings. Arguments as in `factor_of`."""
    record, factor = records.get(run.name), factor_of(run, records, runs)
    if record is None or "error" in record or factor is None:
        return False
    return record["settings"] == json.loads(json.dumps(run.settings(factor)))


def study(asked: list[Run], runs: list[Run], results: Path, measure: Measure, jobs: int = 1) -> dict[str, Record]:
    """Run what is missing, write the results file after each, and return all records.

    Args:
        asked: The runs to see to, in their order.
        runs: The whole plan.
        results: The results file.
        measure: Makes the record of a run with a factor on its learning rate.
        jobs: The runs at the same time.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    records, waiting = read(results), list(asked)
    running: dict[Future[Record], Run] = {}
    bar, pool = tqdm(total=len(asked)), ThreadPoolExecutor(jobs)
    try:
        while True:
            for run, factor in [(r, f) for r in waiting if (f := factor_of(r, records, runs)) is not None]:
                waiting.remove(run)
                if is_done(run, records, runs):
                    bar.update()
                else:
                    running[pool.submit(measure, run, factor)] = run
            if not running:
                break
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(ended)
                records[run.name] = ended.result()
                write_json(results, {"runs": records})
                bar.set_description(run.name)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    for run in waiting:
        print(f"{run.name} waits for the grid of its method.")
    return records


def measured_apart(folder: Path, quick: bool) -> Measure:
    """Measures a run in a process of its own; a run that fails is recorded with the last line of its error.

    Args:
        folder: Of the runs.
        quick: Whether the runs are those of the quick study.
    """

    def measure(run: Run, factor: float) -> Record:
        place = folder / run.name
        script = [sys.executable, str(Path(__file__).with_name("study_run.py")), run.name, str(factor), str(place)]
        done = subprocess.run(
            script + ["--quick"] * quick, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
        )
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            tqdm.write(f"{run.name} failed: {error}")
            return {"stage": run.stage, "setting": run.setting, "label": run.label, "seed": run.seed, "error": error}
        return json.loads((place / "record.json").read_text(encoding="utf-8"))

    return measure


def plan_table(asked: list[Run], runs: list[Run], records: dict[str, Record]) -> str:
    """How many runs of each stage there are, how many are done, and how long the others will take one core.

    Arguments as in `study`, with what has been run.
    """
    parts = {stage: [run for run in asked if run.stage == stage] for stage in dict.fromkeys(r.stage for r in asked)}
    lines = []
    for stage, of_stage in (parts | {"together": asked}).items():
        left = [run for run in of_stage if not is_done(run, records, runs)]
        minutes = sum(run.estimated_seconds for run in left) / 60
        lines.append(
            f"{stage}: {len(of_stage)} runs, {len(of_stage) - len(left)} done, about {minutes:.0f} core-minutes left"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--plan", action="store_true", help="Say what would run, and stop.")
    found.add_argument("--quick", action="store_true", help="Minutes: one seed of one method of each trainer.")
    found.add_argument("--only", nargs="+", help="The methods, by their names in the table. Default: all.")
    found.add_argument("--stages", nargs="+", help=f"Of {', '.join(STAGES)}. Default: all.")
    found.add_argument("--seeds", type=int, nargs="+", help="Of the runs behind the grid. Default: all.")
    found.add_argument("--jobs", type=int, default=1, help="The runs at the same time, a core for each.")
    found.add_argument("--folder", type=Path, default=Path("study"), help="The folder of the runs.")
    found.add_argument("--results", type=Path, default=RESULTS, help="The results file.")
    found.add_argument("--page", type=Path, default=PAGE, help="The page, with its pictures in `images/` beside it.")
    return found


def asked_for(runs: list[Run], args: Any) -> list[Run]:
    """The runs that the arguments name. Raises `ValueError` for a name that no run has."""
    chosen = runs
    for argument, names in (("only", args.only), ("stages", args.stages)):
        attribute = {"only": "label", "stages": "stage"}[argument]
        known = {getattr(run, attribute) for run in runs}
        unknown = [name for name in names or [] if name not in known]
        if unknown:
            raise ValueError(f"`--{argument}` names {unknown[0]!r}: choose of {', '.join(sorted(known))}.")
        chosen = [run for run in chosen if names is None or getattr(run, attribute) in names]
    return [run for run in chosen if args.seeds is None or run.stage == "grid" or run.seed in args.seeds]


def main() -> None:
    """Print the plan, run what is missing, and write the page."""
    args = parser().parse_args()
    runs = plan(args.quick)
    asked = asked_for(runs, args)
    print(plan_table(asked, runs, read(args.results)), flush=True)
    if args.plan:
        return
    study(asked, runs, args.results, measured_apart(args.folder, args.quick), args.jobs)
    write_page(args.results, args.page, quick=args.quick)


if __name__ == "__main__":
    main()
