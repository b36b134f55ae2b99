"""Compares a method on shapes with variants of it, over several seeds.

    python benchmarks/variants.py tafs_grpo --equal_time --out docs/tables/tafs_grpo_against_flow_grpo.md
    python benchmarks/variants.py ac_flow --out docs/tables/ac_flow_ablations.md

Every run is `flowrl demo` with the checker as its reward, in a separate folder below `--folder`; finished runs are not
repeated. With `--equal_time` every variant trains for as many seconds as the first one.
"""

import argparse
import statistics
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

import torch
from demo_runs import run_demo
from tqdm import tqdm

# AC-Flow with signed weights, where its demo has the fixed target.
LINEAR: dict[str, Any] = {
    "timestep_sampling": "pipeline", "weighting": "linear", "normalize_weights": False,
    "wasserstein_coefficient": 0.5, "critic_warmup_max_steps": 3,
}  # fmt: skip
# What all variants of a method change in its demo, and then the settings in which each differs from that.
BASES: dict[str, dict[str, Any]] = {
    "tafs_grpo": {},
    "ac_flow": LINEAR | {"target": "weighted", "advantage_clip": 1.0, "critic": "convolutional"},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "tafs_grpo": {
        "TAFS-GRPO": {},
        "Flow-GRPO": {
            "kernel": "flow_grpo", "eta": 0.7, "credit_rule": "final", "log_prob_form": "gaussian", "epsilon": 1e-4,
            "share_initial_noise": False,
        },
    },
    "ac_flow": {
        "AC-Flow": {},
        "no clipping of advantages": {"advantage_clip": 1e6},
        "no warm-up of the critic": {"critic_warmup_max_steps": 0},
        "no critic": {"critic": "none"},
        "anchor of 0.01 for 0.5": {"wasserstein_coefficient": 0.01},  # signed weights are refused without one
    },
}  # fmt: skip


def run(method: str, changes: dict[str, Any], seed: int, updates: int, folder: Path) -> dict[str, Any]:
    """Run a demo, unless the folder has one with the same settings, and return its report.

    Args:
        method: The method.
        changes: The settings in which the variant differs from `BASES`.
        seed: The seed.
        updates: The number of updates.
        folder: The folder of the run.
    """
    settings = (
        BASES[method]
        | changes
        | {
            "seed": seed,
            "max_steps": updates,
            "reward_funcs": "checker",
            "eval_reward_funcs": "shapes",
        }
    )
    return run_demo(method, settings, folder)


def main() -> None:
    """Run the missing demos, print the table in Markdown, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=VARIANTS, help="The method.")
    parser.add_argument("--seeds", type=int, default=3, help="The number of seeds.")
    parser.add_argument("--updates", type=int, default=30, help="The updates of the first variant.")
    equal_time = "Give the others as many updates as fit into the first one's seconds."
    parser.add_argument("--equal_time", action="store_true", help=equal_time)
    jobs = "The number of runs at the same time; give each its share of OMP_NUM_THREADS."
    parser.add_argument("--jobs", type=int, default=1, help=jobs)
    parser.add_argument("--folder", type=Path, default=Path("variants"), help="The folder of the runs.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()
    runs: dict[str, list[Future[dict[str, Any]]]] = {}
    pool = ThreadPoolExecutor(args.jobs)
    updates = dict.fromkeys(VARIANTS[args.method], args.updates)
    first = next(iter(updates))
    for label, changes in VARIANTS[args.method].items():
        if args.equal_time and label != first:
            wait([r for earlier in runs.values() for r in earlier])  # the probe measures time, so it runs alone
            probe = run(args.method, changes, 0, 4, args.folder / args.method / f"{label}, probe")
            each = probe["seconds"]["training"] / 4
            updates[label] = round(statistics.mean(r.result()["seconds"]["training"] for r in runs[first]) / each)
        place = args.folder / args.method / label
        runs[label] = [
            pool.submit(run, args.method, changes, seed, updates[label], place / f"seed {seed}")
            for seed in range(args.seeds)
        ]
    every = [r for each in runs.values() for r in each]
    for finished in tqdm(as_completed(every), desc=args.method, total=len(every)):
        finished.result()  # raises as soon as a run has failed
    reports = {label: [r.result() for r in each] for label, each in runs.items()}

    lines = [
        "| variant | checker accuracy | rise, points | shapes reward | diversity, share of base | updates "
        "| seconds of training |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, rows in reports.items():
        figures = [
            spread([100 * r["tuned"]["checker_accuracy"] for r in rows], ".1f"),
            spread([100 * (r["tuned"]["checker_accuracy"] - r["base"]["checker_accuracy"]) for r in rows], "+.1f"),
            spread([r["tuned"]["reward/shapes"] for r in rows], ".3f"),
            spread([r["tuned"]["diversity"] / r["base"]["diversity"] for r in rows], ".2f"),
            str(updates[label]),
            spread([r["seconds"]["training"] for r in rows], ".0f"),
        ]
        lines.append(f"| {label} | " + " | ".join(figures) + " |")
    lines += ["", f"Mean and range over {args.seeds} seeds; reward: the checker; on a CPU, torch {torch.__version__}."]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def spread(values: list[float], form: str) -> str:
    """Mean and range of values in a format such as '.2f'; the mean alone where both ends read the same."""
    mean, low, high = (f"{value:{form}}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
