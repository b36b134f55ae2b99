"""What each setting that makes calls fewer, larger or cheaper saves of an update, one by one and together.

    python benchmarks/savings.py [--repeats 9] [--micro_batch 4] [--out docs/tables/savings.md]

For every trainer, on the embedded pipeline: the images per second of whole updates of 16 images with a setting,
divided by those without, in CPU time. The updates of one trainer's variants take turns in one process with one thread.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from stepped import SteppedRun, make_trainer
from tqdm import tqdm

from flowrl_trainers.cli.memory import keep_freed_memory

IMAGES = 16
WARM_UP = 3  # updates that are not counted: the scale of the reward, caches, and the graphs of compiled blocks
TRAINERS: dict[str, dict[str, Any]] = {
    "AdjointMatching": {"control_to_velocity_ratio": 0.3, "adjoint_steps": 3},
    "VGGFlow": {"control_to_velocity_ratio": 0.3},
    "ACFlow": {"critic_warmup_max_steps": 0, "num_generations": 8},
    "DiffusionNFT": {"num_generations": 8},
    "TAFSGRPO": {"num_generations": 4},
}
COMPILED = "larger rollouts, compiled"
ALL = "all of these"


def variants(method: str, micro_batch: int) -> dict[str, dict[str, Any]]:
    """The settings of each variant of a method, the first without any."""
    larger, compiled = {"rollout_batch_size": 4 * micro_batch}, {"compile_blocks": True}
    merged = {"merge_adapter": True}
    found: dict[str, dict[str, Any]] = {
        "before": {},
        "`rollout_batch_size`": larger,
        "`compile_blocks`": compiled,
        COMPILED: larger | compiled,
    }
    everything = larger | compiled
    if method != "TAFSGRPO":
        found["`merge_adapter`"] = merged
        everything = everything | merged
    if method == "ACFlow":
        found["`critic_bins_in_one_call`"] = {"critic_bins_in_one_call": True}
        everything = everything | {"critic_bins_in_one_call": True}
    if method == "AdjointMatching":
        found["`prefix_pool_size`, once the pool is drawn"] = {"prefix_pool_size": IMAGES}
        everything = everything | {"prefix_pool_size": IMAGES}
    return found | {ALL: everything}


def measure(method: str, repeats: int, micro_batch: int) -> dict[str, list[float]]:
    """The CPU seconds of the updates of every variant."""
    accumulation = {"gradient_accumulation_steps": IMAGES // micro_batch}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, settings in variants(method, micro_batch).items():
            place = f"{folder}/{len(runs)}"
            together = TRAINERS[method] | accumulation | settings
            runs[name] = SteppedRun(make_trainer(method, place, repeats + WARM_UP, micro_batch, **together))
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in tqdm(range(repeats + WARM_UP), desc=method):
            for name, run in runs.items():
                seconds = run.update()
                if turn >= WARM_UP:
                    found[name].append(seconds)
        for run in runs.values():
            run.close()
    return found


def main() -> None:
    """Print the table in Markdown, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="The counted updates of each variant.")
    size = "The images of a micro-batch, a divisor of 16 whose fourfold is one too, and a multiple of 4."
    parser.add_argument("--micro_batch", type=int, default=4, help=size)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="Those to measure.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    lines = ["| trainer | setting | images per CPU second | ÷ before | quartiles |", "|---|---|---:|---:|---:|"]
    for method in args.trainers:
        found = measure(method, args.repeats, args.micro_batch)
        before = found["before"]
        for name, seconds in found.items():
            ratios = [first / second for first, second in zip(before, seconds, strict=True)]
            low, middle, high = (
                statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
            )
            speed = IMAGES / statistics.median(seconds)
            lines.append(f"| {method} | {name} | {speed:.2f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
            print(lines[-1], file=sys.stderr)
    lines += [
        "",
        f"Whole updates of {IMAGES} images of the embedded pipeline in micro-batches of {args.micro_batch}, without "
        f"guidance; {args.repeats} updates of every variant, in turn, after {WARM_UP} that are not counted; one CPU "
        f"thread, torch {torch.__version__}.",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
