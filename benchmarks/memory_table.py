"""What `flowrl estimate` says that training takes of each GPU: five models, three ways to train, one to eight GPUs.

    python benchmarks/memory_table.py --out docs/tables/memory.md

Nothing is loaded, and no GPU is needed: these are estimates, of AC-Flow with a PickScore, at 512 pixels, one picture
at a time, with activation checkpointing, in bfloat16. Half an hour on a busy core.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm

from flowrl_trainers import ACFlowConfig
from flowrl_trainers.cli.estimate import read_anywhere
from flowrl_trainers.cost.estimate import ENCODE, Estimate
from flowrl_trainers.cost.run import estimates_of_run

MODELS = [
    "stabilityai/stable-diffusion-3.5-medium",
    "black-forest-labs/FLUX.2-klein-4B",
    "black-forest-labs/FLUX.1-dev",
    "Qwen/Qwen-Image",
    "black-forest-labs/FLUX.2-dev",
]
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, nf4": {"quantization": "nf4", "text_encoder_quantization": "nf4"},
    "LoRA, bf16": {},
    "all weights": {"frozen_copy": "as_loaded"},
}
GPUS = (1, 2, 8)
SIZE, RANK = 512, 32


def main() -> None:
    """Print the table in Markdown, and write it to `--out` after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="Names that `flowrl estimate` knows.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()
    lines = [
        "| model | trained | text encoders, before | 1 GPU | 2, FSDP2 | 8, FSDP2 | measured |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for model, way in tqdm([(model, way) for model in args.models for way in WAYS], unit="row"):
        lines.append(row(model, way, estimates(model, way)))
        text = "\n".join([*lines, "", NOTE]) + "\n"
        if args.out is not None:
            args.out.write_text(text, encoding="utf-8")
    print(text)


NOTE = (
    "**Estimates** by `flowrl estimate ac_flow`, GiB of each GPU, in the phase that needs most after the prompts are "
    f"encoded: {SIZE} pixels, one picture at a time, activation checkpointing, bfloat16, a PickScore in float32, LoRA "
    f"of rank {RANK}, AdamW in float32, torch {torch.__version__}. `python benchmarks/memory_table.py` makes them."
)


def estimates(model: str, way: str) -> list[Estimate]:
    """Those of one row, by the number of GPUs.

    Args:
        model: A name that `flowrl estimate` knows.
        way: A key of `WAYS`.
    """
    settings: dict[str, Any] = {"height": SIZE, "width": SIZE}
    config = read_anywhere(ACFlowConfig, 1)(
        output_dir="unused", bf16=True, per_device_train_batch_size=1, gradient_accumulation_steps=8,
        num_generations=8, activation_checkpointing=True, **settings, **WAYS[way],
    )  # fmt: skip
    lora = None if way == "all weights" else LoraConfig(r=RANK, lora_alpha=2 * RANK)
    return estimates_of_run(config, model, settings, lora, ["pickscore"], [], evaluates=False, shared_by=GPUS)


def row(model: str, way: str, found: list[Estimate]) -> str:
    """One line of the table; arguments as in `estimates`, and what these are."""
    encoding = found[0].phases[ENCODE].peak / 2**30
    peaks = [max(cost.peak for name, cost in one.phases.items() if name != ENCODE) / 2**30 for one in found]
    cells = [model.split("/")[-1], way, *(f"{gib:.1f}" for gib in (encoding, *peaks)), "not measured"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
