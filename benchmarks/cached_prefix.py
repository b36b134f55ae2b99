"""What a cached prefix saves: the work until held-out checker accuracy has risen by ten points, with and without it.

    python benchmarks/cached_prefix.py [--seeds 0 1 2] [--updates 80] [--out docs/tables/cached_prefix.md]

Truncated adjoint matching of the last 3 steps on shapes trains on the CLIP reward; the checker, which it never sees,
judges held-out prompts, one picture each with fixed seeds, after every few updates. All settings run in one process
and take turns, update by update, so that a drift in the machine's speed affects all alike.

Work is counted in forward equivalents of a batch: a call of the network is 1, and 2 where its gradient is taken, as
the backward pass through frozen weights costs about as much again. CPU seconds are those of this process. Both include
the draws of the pool, and neither the evaluations.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from tqdm import tqdm

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.sampling.prompt_groups import Example
from flowrl_trainers.shapes import check, load_pipeline, prompts

BATCH, RISE = 16, 0.10
HELD_OUT = list(prompts("held_out")["prompt"])


@dataclass
class Point:
    """One evaluation: the updates before it, what they took, and the checker's accuracy."""

    updates: int
    equivalents: float
    seconds: float
    accuracy: float


@dataclass
class Run:
    """A trainer that is driven by hand, and what it has taken.

    Args:
        pool: The size of the pool; None for a run without one.
        seed: That of the run.
        ratio: `control_to_velocity_ratio`.
        steps: Of the sampler.
        learning_rate: That of the run.
    """

    pool: int | None
    seed: int
    ratio: float
    steps: int
    learning_rate: float
    equivalents: float = 0.0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    each: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = AdjointMatchingConfig(
            output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, adjoint_steps=3,
            prefix_pool_size=self.pool, control_to_velocity_ratio=self.ratio, reward_gradient_clip_quantile=0.9,
            learning_rate=self.learning_rate, guidance_scale=1.0, max_sequence_length=8, seed=self.seed, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", num_inference_steps=self.steps,
        )  # fmt: skip
        lora = LoraConfig(r=16, lora_alpha=32)
        self.trainer = AdjointMatchingTrainer(
            load_pipeline(), "shapes", config, prompts("train"), prompts("held_out"), peft_config=lora
        )
        self.trainer.current_gradient_accumulation_steps = 1
        self.optimizer = self.trainer.create_optimizer()
        self.batches = self._batches()
        self.trainer.flow.transformer.register_forward_hook(self._count)

    def _batches(self) -> Iterator[list[Example]]:
        for epoch in count():
            self.trainer.sampler.set_epoch(epoch)
            yield from self.trainer.get_train_dataloader()

    def _count(self, module: Any, inputs: Any, output: tuple[Tensor]) -> None:
        self.equivalents += len(output[0]) / BATCH * (2 if output[0].requires_grad else 1)

    def update(self) -> None:
        """One update, whose work is counted."""
        start, before = process_time(), (self.equivalents, self.seconds)
        self.trainer.training_step(self.trainer.model, next(self.batches))
        torch.nn.utils.clip_grad_norm_(self.trainer.trained_parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += process_time() - start
        self.each.append((self.equivalents - before[0], self.seconds - before[1]))

    @torch.no_grad()
    def evaluate(self, updates: int) -> None:
        """Add the accuracy on the held-out prompts to the curve."""
        flow, equivalents, right = self.trainer.flow, self.equivalents, list[bool]()
        self.trainer.model.eval()
        for start in range(0, len(HELD_OUT), 64):
            part = HELD_OUT[start : start + 64]
            generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
            pictures = flow.sample(part, self.steps, generators)
            right += check(pictures, part)
        self.equivalents = equivalents
        self.curve.append(Point(updates, self.equivalents, self.seconds, sum(right) / len(right)))

    def first_above(self, accuracy: float) -> Point | None:
        """The first evaluation that is as good."""
        return next((point for point in self.curve if point.accuracy >= accuracy), None)


def main() -> None:
    """Print the tables in Markdown, and write them to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="The seeds.")
    parser.add_argument("--updates", type=int, default=80, help="The updates of each run.")
    parser.add_argument("--every", type=int, default=20, help="The updates from one evaluation to the next.")
    pools = "The sizes of the pools that are compared; 0 is a run without one."
    parser.add_argument("--pools", type=int, nargs="+", default=[0, 16 * BATCH], help=pools)
    parser.add_argument("--ratio", type=float, default=1.0, help="`control_to_velocity_ratio` of all.")
    parser.add_argument("--steps", type=int, default=50, help="The steps of the sampler, of which 3 are controlled.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="That of all.")
    parser.add_argument("--threads", type=int, default=1, help="The number of CPU threads.")
    parser.add_argument("--minutes", type=float, default=None, help="Stop after so many minutes of each seed.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    names = {pool or None: f"pool of {pool}" if pool else "no pool" for pool in args.pools}
    found: dict[int | None, list[Point | None]] = {pool: [] for pool in names}
    curves = ["| seed | run | updates: checker accuracy |", "|---:|---|---|"]
    last: dict[int | None, list[Point]] = {pool: [] for pool in names}
    each: dict[int | None, list[tuple[float, float]]] = {pool: [] for pool in names}
    for seed in args.seeds:
        runs = {pool: Run(pool, seed, args.ratio, args.steps, args.learning_rate) for pool in names}
        started = perf_counter()
        for updates in tqdm(range(args.updates + 1), desc=f"seed {seed}"):
            for run in runs.values():
                if updates:
                    run.update()
                if updates % args.every == 0:
                    run.evaluate(updates)
            if args.minutes is not None and perf_counter() - started > 60 * args.minutes:
                for run in runs.values():
                    run.evaluate(updates)
                break
        for pool, run in runs.items():
            found[pool].append(run.first_above(run.curve[0].accuracy + RISE))
            last[pool].append(run.curve[-1])
            each[pool] += run.each
            shown = ", ".join(f"{point.updates}: {100 * point.accuracy:.1f}" for point in run.curve)
            curves.append(f"| {seed} | {names[pool]} | {shown} |")
            print(curves[-1])
    lines = [
        f"| run | seeds that rose by {100 * RISE:.0f} points | updates | forward equivalents | CPU seconds "
        "| accuracy at the end | median equivalents of an update | median CPU seconds of an update |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for pool, name in names.items():
        points = [point for point in found[pool] if point is not None]
        cells = [
            f"{len(points)} of {len(args.seeds)}",
            *(
                _spread([getattr(point, what) for point in points], ".0f")
                for what in ("updates", "equivalents", "seconds")
            ),
            _spread([100 * point.accuracy for point in last[pool]], ".1f"),
            f"{statistics.median(equivalents for equivalents, _ in each[pool]):.1f}",
            f"{statistics.median(seconds for _, seconds in each[pool]):.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Mean and range over seeds {', '.join(map(str, args.seeds))}, up to the first evaluation that is "
        f"{100 * RISE:.0f} points above the base model's, of the seeds that have one; {args.steps} steps, "
        f"{len(HELD_OUT)} held-out pictures every "
        f"{args.every} updates of {BATCH}, control_to_velocity_ratio {args.ratio:g}, "
        f"learning rate {args.learning_rate:g}; {args.threads} CPU thread, torch {torch.__version__}.",
        "",
        *curves,
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


def _spread(values: list[float], form: str) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
