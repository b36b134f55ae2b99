"""What each setting that makes calls fewer, larger or cheaper saves of an update, one by one and together.

    python benchmarks/savings.py [--repeats 9] [--micro_batch 4] [--out docs/tables/savings.md]

For every trainer, on the embedded pipeline: the images per second of whole updates of 16 images with a setting,
divided by those without, in CPU time. The updates of one trainer's variants take turns in one process with one thread.
Then what a second run saves that finds on the disk what the first one computed. What only a GPU can show is not here.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.utils import _cache_assets
from stepped import SteppedRun, make_trainer
from tqdm import tqdm

from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.shapes import prompts

IMAGES = 16
WARM_UP = 3  # updates that are not counted: the scale of the reward, caches, and the graphs of compiled blocks
ADJOINT = {"control_to_velocity_ratio": 0.3, "adjoint_steps": 3}
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdjointMatching": ("AdjointMatching", ADJOINT),
    "AdjointMatching, guided": ("AdjointMatching", ADJOINT | {"guidance_scale": 3.0}),
    "VGGFlow": ("VGGFlow", {"control_to_velocity_ratio": 0.3}),
    "ACFlow": ("ACFlow", {"critic": "convolutional", "critic_warmup_max_steps": 0, "num_generations": 8}),
    "DiffusionNFT": ("DiffusionNFT", {"num_generations": 8}),
    "TAFSGRPO": ("TAFSGRPO", {"num_generations": 4}),
}
COMPILED = "larger rollouts, compiled"
ALL = "all of these"
CHECKPOINT = "a checkpoint after each update"
HELD_OUT = 64  # prompts of an evaluation


def variants(name: str, micro_batch: int) -> dict[str, dict[str, Any]]:
    """The settings of each variant of a row of `TRAINERS`, the first without any."""
    larger, compiled = {"rollout_batch_size": 4 * micro_batch}, {"compile_blocks": True}
    one_call = {"guidance_in_one_call": True}
    if name.endswith("guided"):
        return {"before": {}, "`guidance_in_one_call`": one_call}
    found: dict[str, dict[str, Any]] = {
        "before": {},
        "`rollout_batch_size`": larger,
        "`compile_blocks`": compiled,
        COMPILED: larger | compiled,
    }
    everything = larger | compiled
    if name != "TAFSGRPO":
        found["`merge_adapter`"] = {"merge_adapter": True}
        everything = everything | {"merge_adapter": True}
    if name == "ACFlow":
        found["`critic_bins_in_one_call`"] = {"critic_bins_in_one_call": True}
        everything = everything | {"critic_bins_in_one_call": True}
    if name == "AdjointMatching":
        found["`prefix_pool_size`, once the pool is drawn"] = {"prefix_pool_size": IMAGES}
        everything = everything | {"prefix_pool_size": IMAGES}
    found[ALL] = everything
    if name == "AdjointMatching":
        found[CHECKPOINT] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    if name == "DiffusionNFT":
        found["`decoder_dtype`: bfloat16"] = {"decoder_dtype": "bfloat16"}
    return found


def measure(row: str, repeats: int, micro_batch: int) -> dict[str, list[float]]:
    """The CPU seconds of the updates of every variant."""
    method, shared = TRAINERS[row]
    accumulation = {"gradient_accumulation_steps": IMAGES // micro_batch}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, settings in variants(row, micro_batch).items():
            place = f"{folder}/{len(runs)}"
            together = shared | accumulation | settings
            runs[name] = SteppedRun(make_trainer(method, place, repeats + WARM_UP, micro_batch, **together))
        found: dict[str, list[float]] = {name: [] for name in runs}
        for turn in tqdm(range(repeats + WARM_UP), desc=row):
            for name, run in runs.items():
                seconds = run.update()
                if turn >= WARM_UP:
                    found[name].append(seconds)
        for run in runs.values():
            run.close()
    return found


def kept_on_disk(repeats: int) -> list[str]:
    """A table of what a second run saves of what the first one left on the disk, of ACFlow's."""
    held_out = prompts("held_out")["prompt"][:HELD_OUT]
    parts: dict[str, tuple[str, Callable[[str, dict[str, Any]], float]]] = {
        "`cache_encoded_prompts`": ("making the trainer", lambda place, kept: _of_making(place, kept)[1]),
        "`cache_base_pictures`": (
            f"an evaluation of {HELD_OUT} prompts",
            lambda place, kept: _seconds(lambda: _of_making(place, kept)[0].evaluate(held_out)),
        ),
    }
    lines = [
        "| setting | CPU seconds of | without | the run that finds them | ÷ without |",
        "|---|---|---:|---:|---:|",
    ]
    for setting, (what, measured) in parts.items():
        with tempfile.TemporaryDirectory() as folder, patch.object(_cache_assets, "HF_ASSETS_CACHE", f"{folder}/kept"):
            kept = {setting.strip("`"): True}
            measured(f"{folder}/first", kept)
            without, found = list[float](), list[float]()
            for turn in range(repeats):
                without.append(measured(f"{folder}/without {turn}", {}))
                found.append(measured(f"{folder}/found {turn}", kept))
        ratio = statistics.median(second / first for first, second in zip(without, found, strict=True))
        seconds = f"{statistics.median(without):.1f} | {statistics.median(found):.1f}"
        lines.append(f"| {setting} | {what} | {seconds} | {ratio:.2f} |")
    return lines


def _of_making(place: str, settings: dict[str, Any]) -> tuple[FlowRLTrainer, float]:
    made: list[FlowRLTrainer] = []
    shared = {"num_train_epochs": 1, "num_generations": 8}
    seconds = _seconds(lambda: made.append(make_trainer("ACFlow", place, -1, IMAGES, **shared | settings)))
    return made[0], seconds


def _seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


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
    for row in args.trainers:
        found = measure(row, args.repeats, args.micro_batch)
        before = found["before"]
        for name, seconds in found.items():
            ratios = [first / second for first, second in zip(before, seconds, strict=True)]
            low, middle, high = (
                statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
            )
            speed = IMAGES / statistics.median(seconds)
            lines.append(f"| {row} | {name} | {speed:.2f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
            print(lines[-1], file=sys.stderr)
    lines += [
        "",
        *kept_on_disk(args.repeats),
        "",
        f"Whole updates of {IMAGES} images of the embedded pipeline in micro-batches of {args.micro_batch}, without "
        f"guidance but in the rows that say so; {args.repeats} updates of every variant, in turn, after {WARM_UP} "
        f"that are not counted; as many runs that find what was kept. One CPU thread, torch {torch.__version__}.",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
