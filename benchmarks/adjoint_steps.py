"""Measures what truncation saves: seconds per update, by phase, for 3 and for 20 of 20 steps.

    python benchmarks/adjoint_steps.py [--updates 8] [--images 24] [--out docs/tables/adjoint_steps.md]

Both settings run in one process on the same batches and take turns, so that a drift in the machine's speed affects
both alike. The table shows medians.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm

from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.shapes import load_pipeline, prompts

PHASES = ("rollout", "reward_gradient", "adjoint", "micro_step")  # an update has one micro-step


def make(adjoint_steps: int, updates: int, images: int) -> AdjointMatchingTrainer:
    """A trainer whose update takes one micro-step.

    Args:
        adjoint_steps: The length of the window.
        updates: Of the run.
        images: Of an update.
    """
    config = AdjointMatchingConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=images, adjoint_steps=adjoint_steps,
        control_to_velocity_ratio=0.3, guidance_scale=1.0, max_sequence_length=8, max_steps=updates, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32)
    return AdjointMatchingTrainer(load_pipeline(), "shapes", config, prompts("train"), peft_config=lora)


def count_call(calls: dict[int, int], steps: int, *hook_arguments: Any) -> None:
    """Count one forward pass of the transformer of the trainer with `steps` adjoint steps."""
    calls[steps] += 1


def main() -> None:
    """Print the table in Markdown, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    updates = "The counted updates of each setting, after one that is not counted."
    parser.add_argument("--updates", type=int, default=8, help=updates)
    parser.add_argument("--images", type=int, default=24, help="The images of an update.")
    parser.add_argument("--threads", type=int, default=2, help="The number of CPU threads.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(args.threads)
    trainers = {steps: make(steps, args.updates + 1, args.images) for steps in (3, 20)}
    calls = dict.fromkeys(trainers, 0)
    for steps, trainer in trainers.items():
        trainer.flow.transformer.register_forward_hook(partial(count_call, calls, steps))
    batches = {steps: list(trainer.get_train_dataloader()) for steps, trainer in trainers.items()}
    seconds: dict[int, dict[str, list[float]]] = {steps: {phase: [] for phase in PHASES} for steps in trainers}
    for number in tqdm(range(args.updates + 1), desc="updates"):
        for steps, trainer in trainers.items():
            trainer.metrics.clear()
            calls[steps] = 0
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(trainer.model, batches[steps][number])
            trainer.model.zero_grad()
            if number:
                for phase in PHASES:
                    seconds[steps][phase].append(trainer.metrics.noted[f"seconds/{phase}"][0])
    lines = [
        "| `adjoint_steps` | " + " | ".join(PHASES) + f" | total | transformer calls of {args.images} images |",
        "|---|" + "---:|" * (len(PHASES) + 2),
    ]
    for steps in trainers:
        medians = [statistics.median(seconds[steps][phase]) for phase in PHASES]
        cells = [f"{steps} of 20", *(f"{m:.2f} s" for m in [*medians, sum(medians)]), f"{calls[steps]}"]
        lines.append(f"| {' | '.join(cells)} |")
    totals = [sum(statistics.median(seconds[steps][phase]) for phase in PHASES) for steps in trainers]
    lines += [
        "",
        f"Medians of {args.updates} updates of {args.images} pictures each, taken in turn in one process; "
        f"{args.threads} CPU threads, torch {torch.__version__}. "
        f"All 20 steps take {totals[1] / totals[0]:.1f} times as long as 3.",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
