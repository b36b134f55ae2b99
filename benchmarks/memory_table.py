"""What `flowrl estimate` says that training takes of each GPU: five models, three ways to train, one to eight GPUs.

    python benchmarks/memory_table.py --out docs/tables/memory.md
    python benchmarks/memory_table.py --recipes examples/recipes --out docs/tables/recipes.md

The second estimates the files of a folder, each as the command in its first line starts it.

Nothing is loaded, and no GPU is needed: these are estimates, of AC-Flow with a PickScore, at 512 pixels, one picture
at a time, with activation checkpointing, in bfloat16. Half an hour on a busy core.
"""

import argparse
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tqdm import tqdm

from flowrl_trainers import ACFlowConfig
from flowrl_trainers.cli import main as main_of_flowrl
from flowrl_trainers.cli.estimate import read_anywhere
from flowrl_trainers.cost.estimate import ENCODE, Estimate
from flowrl_trainers.cost.rewards import blank_reward
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
    parser.add_argument("--recipes", type=Path, default=None, help="A folder of YAML files to estimate instead.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    args = parser.parse_args()
    if args.recipes is not None:
        write_recipes(sorted(args.recipes.glob("*.yaml")), args.out)
        return
    lines = [
        "| model | trained | while prompts are encoded | 1 GPU | 2, FSDP2 | 8, FSDP2 | measured |",
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
    return estimates_of_run(
        config, model, settings, lora, [blank_reward("pickscore")], [], evaluates=False, shared_by=GPUS
    )


def row(model: str, way: str, found: list[Estimate]) -> str:
    """One line of the table; arguments as in `estimates`, and what these are."""
    encoding = found[0].phases[ENCODE].peak / 2**30
    peaks = [max(cost.peak for name, cost in one.phases.items() if name != ENCODE) / 2**30 for one in found]
    cells = [model.split("/")[-1], way, *(f"{gib:.1f}" for gib in (encoding, *peaks)), "not measured"]
    return f"| {' | '.join(cells)} |"


def write_recipes(files: list[Path], out: Path | None) -> None:
    """Print what the command in the first line of each file needs, and write it to `out` after every row."""
    lines = ["| file | GPUs | GiB of each | in the phase |", "|---|---|---:|---|"]
    for file in tqdm(files, unit="file"):
        command = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# flowrl ").split()
        printed = io.StringIO()
        with redirect_stdout(printed):
            if main_of_flowrl(["estimate", *command, "--json"]) != 0:
                raise SystemExit(f"{file} cannot be estimated.")
        found = json.loads(printed.getvalue())
        processes = command[command.index("--num_processes") + 1] if "--num_processes" in command else "1"
        gpus = f"{processes} of {file.name.split('_')[0]} GB"
        lines.append(f"| `{file.as_posix()}` | {gpus} | {found['peak_gib']:.1f} | {found['peak_phase']} |")
        if out is not None:
            out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
