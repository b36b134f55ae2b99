"""What an update costs beside the calls of networks that its equations need.

    python benchmarks/overhead.py [--repeats 15] [--images 16] [--out docs/tables/overhead.md]
        [--json benchmarks/results/overhead.json] [--steps 10 50]

For every trainer, on the embedded pipeline: the CPU seconds of an update of its own loop, divided by the sum over the
needed calls of the seconds of such a call, made by itself. Updates and calls of all trainers take turns in one process
with one thread. Beside it, what truncation saves against what the counts say, and the memory of an update with few and
with many steps. The script fails where a trainer makes other calls than its configuration states.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from stepped import Calls, PeakMemory, SteppedRun, counting, make_trainer, one_call, seconds_of
from tqdm import tqdm
from transformers import TrainerCallback

from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.cost import Drawing, Kind, counted

RATIO = {"control_to_velocity_ratio": 0.3}
ALL_STEPS = "adjoint_matching, all 20 steps"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "adjoint_matching": ("AdjointMatching", RATIO),
    ALL_STEPS: ("AdjointMatching", RATIO | {"adjoint_steps": 20}),
    "vgg_flow": ("VGGFlow", RATIO),
    "ac_flow": ("ACFlow", {"critic": "convolutional", "critic_warmup_max_steps": 0}),
    "ac_flow, fixed target": ("ACFlow", {"target": "fixed"}),
    "diffusion_nft": ("DiffusionNFT", {}),
    "tafs_grpo": ("TAFSGRPO", {}),
}
MEMORY_IMAGES = 4
WARM_UP = 2  # updates that are not counted: the first finds the scale of the reward, both fill caches


NAMES = {
    Kind.FORWARD: "forward", Kind.BASE: "base", Kind.BASE_PRODUCT: "product", Kind.PRODUCT: "product",
    Kind.TRAIN: "train", Kind.HEAD: "head", Kind.HEAD_TRAIN: "head_train", Kind.DECODE: "score",
    Kind.REWARD_GRADIENT: "score_gradient",
}  # fmt: skip
"""Kinds of calls as `counting` names them; pictures are scored where they are decoded."""


def stated_calls(trainer: FlowRLTrainer, needed: bool) -> Calls:
    """The calls of one update on one rollout of one micro-step, as the trainer's configuration derives them.

    Args:
        trainer: Of a pipeline whose pictures are so small that a micro-batch of them is decoded together.
        needed: Whether only those count that the method's equations need, and not those for the log.
    """
    drawing = Drawing(trainer.flow.guided, decoded_together=trainer.args.images_at_once)
    stated = [call for call in trainer.args.calls(drawing) if call.needed or not needed]
    found: Calls = Counter()
    for (kind, images), count in counted(stated).items():
        if kind != Kind.REWARD:
            found[NAMES[kind], images] += count
    return found


class SecondUpdate(TrainerCallback):
    """Measures the memory of the second update of a run."""

    def __init__(self, memory: PeakMemory) -> None:
        self.memory = memory

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Forget what came before."""
        self.memory.restart()


def peak_mebibytes(method: str, settings: dict[str, Any], steps: int, images: int) -> float:
    """The peak memory of an update beside the weights."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(method, folder, 2, images, num_inference_steps=steps, **settings)
        memory = PeakMemory()
        trainer.add_callback(SecondUpdate(memory))
        with memory:
            trainer.train()
    return memory.peak / 2**20


def settings_of(name: str, images: int) -> tuple[str, dict[str, Any]]:
    """Method and settings of a run; the images of a prompt are at most those of the update."""
    method, settings = RUNS[name]
    groups = {"ACFlow": min(8, images), "DiffusionNFT": min(8, images), "TAFSGRPO": images}
    return method, settings | ({"num_generations": groups[method]} if method in groups else {})


def measure(repeats: int, images: int) -> dict[str, dict[str, Any]]:
    """For every run: the CPU seconds of updates and of their needed calls, two lists; and the calls, needed, stated
    and made.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name in RUNS:
            method, settings = settings_of(name, images)
            trainer = make_trainer(method, f"{folder}/{name}", repeats + WARM_UP, images, **settings)
            runs[name] = SteppedRun(trainer)
        for name, run in runs.items():
            for _ in range(WARM_UP):
                run.update()
            found[name] = {"updates": [], "calls": [], "needed": stated_calls(run.trainer, needed=True)}
            found[name]["stated"] = stated_calls(run.trainer, needed=False)
        for _ in tqdm(range(repeats), desc="repeats"):
            for name, run in runs.items():
                with counting(run.trainer) as made:
                    found[name]["updates"].append(run.update())
                found[name]["made"] = made
                run.trainer.model.eval()
                of_calls = 0.0
                for call, count in found[name]["needed"].items():
                    times = max(1, count // 5)
                    of_calls += count * seconds_of(one_call(run.trainer, *call), times)
                found[name]["calls"].append(of_calls)
                run.trainer.model.zero_grad()
        for run in runs.values():
            run.close()
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def shown(calls: Calls) -> str:
    """The calls in words."""
    return ", ".join(f"{count} {kind} of {images}" for (kind, images), count in sorted(calls.items()))


def main() -> None:
    """Print the tables in Markdown, and write them to `--out` and their numbers to `--json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="The counted updates of each trainer.")
    parser.add_argument("--images", type=int, default=16, help="The images of an update, a multiple of 8.")
    steps = "The sampler steps at which memory is compared."
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 50), help=steps)
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    parser.add_argument("--json", type=Path, default=None, help="A JSON file to write.")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(1)
    found = measure(args.repeats, args.images)
    report: dict[str, dict[str, float]] = {}
    lines = ["| trainer | update ÷ needed calls | quartiles | CPU seconds of an update | needed calls |"]
    lines += ["|---|---:|---:|---:|---|"]
    others, notes = list[str](), list[str]()
    for name, run in found.items():
        ratios = [update / calls for update, calls in zip(run["updates"], run["calls"], strict=True)]
        low, middle, high = quartiles(ratios)
        report[name] = {"overhead_ratio": round(middle, 4), "lower_quartile": round(low, 4)}
        report[name] |= {"upper_quartile": round(high, 4), "seconds": round(statistics.median(run["updates"]), 4)}
        cells = [name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{report[name]['seconds']:.2f}"]
        lines.append(f"| {' | '.join([*cells, shown(run['needed'])])} |")
        if run["made"] != run["stated"]:
            others.append(f"{name} makes {shown(run['made'])}, and its configuration states {shown(run['stated'])}")
        logged = run["stated"] - run["needed"]
        notes += [f" Beside its needed calls {name} makes {shown(logged)}, for its log."] if logged else []
    short, whole = found["adjoint_matching"], found[ALL_STEPS]
    measured, counted = (
        statistics.median(b / a for a, b in zip(short[key], whole[key], strict=True)) for key in ("updates", "calls")
    )
    report["truncation"] = {"measured": round(measured, 4), "counted": round(counted, 4)}
    lines += ["", f"All 20 adjoint steps take {measured:.2f} times as long as 3; the calls say {counted:.2f}.", ""]
    lines += ["| trainer | " + " | ".join(f"peak MiB of an update, {steps} steps" for steps in args.steps)]
    lines[-1] += " | ratio |"
    lines += ["|---|---:|---:|---:|"]
    at_once = min(MEMORY_IMAGES, args.images)
    for name in RUNS:
        if name in (ALL_STEPS, "tafs_grpo"):  # they keep all states, and TAFS-GRPO refuses 50 steps
            continue
        method, settings = settings_of(name, at_once)
        few, many = (peak_mebibytes(method, settings, steps, at_once) for steps in args.steps)
        peaks = zip(args.steps, (few, many), strict=True)
        report[name] |= {f"peak_mib_{steps}": round(peak, 2) for steps, peak in peaks}
        lines.append(f"| {name} | {few:.1f} | {many:.1f} | {many / few:.3f} |")
    lines += [
        "",
        f"{args.repeats} updates of {args.images} images of the embedded pipeline, after {WARM_UP} that are not "
        f"counted, and the calls, in turn in one process; one CPU thread, torch {torch.__version__}. Memory beside "
        f"the weights: tensors that an update of {at_once} images made and still uses.{''.join(notes)}",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if others:
        sys.exit("\n".join(others))


if __name__ == "__main__":
    main()
