"""The table of the embedded base model: how often it draws what a held-out prompt says, by guidance scale and sampler.

    python benchmarks/base_table.py --out docs/tables/base_model.md --sheet docs/images/base_grid.png

Guidance cannot correct the words that the model learned wrong.
"""

import argparse
import itertools
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flowrl_trainers import FlowPipeline
from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.flow import renoise
from flowrl_trainers.metrics import diversity
from flowrl_trainers.pipelines import Conditioning
from flowrl_trainers.rewards import ShapesReward
from flowrl_trainers.run_folder import before_after
from flowrl_trainers.shapes import WEIGHTS, check, load_pipeline, parse, prompts

SAMPLERS = ("ODE, 20 steps", "ODE, 4 steps", "ODE, 4 uniform steps", "re-noising, 4 uniform steps")
BATCH = 55


@torch.no_grad()
def sample(
    flow: FlowPipeline, sampler: str, latents: Tensor, conditioning: Conditioning, generator: torch.Generator
) -> Tensor:
    """Final latents by one of the samplers.

    Args:
        flow: The model.
        sampler: One of `SAMPLERS`.
        latents: The initial noise (B, C, h, w).
        conditioning: The encoded prompts.
        generator: The generator of the noise that re-noising adds.
    """
    sigmas = flow.sigmas(20 if "20" in sampler else 4, "uniform" if "uniform" in sampler else "pipeline")
    if sampler.startswith("ODE"):
        return flow.sample_latents(flow.transformer, conditioning, latents, sigmas)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        levels = sigma.expand(len(latents)), sigma_next.expand(len(latents))
        velocity = flow.velocity(flow.transformer, latents, levels[0], conditioning, guidance=True)
        mean, std = renoise(latents, velocity, *levels, eta=1.0)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
    return latents


def main() -> None:
    """Print the table in Markdown, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = "A folder of `examples/train_shapes.py`. Default: the shipped weights."
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help=weights)
    parser.add_argument("--pictures", type=int, default=4, help="The number of pictures per held-out prompt.")
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file to write.")
    parser.add_argument("--sheet", type=Path, default=None, help="A picture to write: 64 pictures of the first row.")
    args = parser.parse_args()

    keep_freed_memory()
    pipeline = load_pipeline(args.weights)
    asked = list(prompts("held_out")["prompt"]) * args.pictures
    two = torch.tensor([len(parse(p)) == 2 for p in asked])
    reward = ShapesReward()
    lines = [
        "| guidance | sampler | right, all | right, one object | right, two objects | shapes reward | diversity |",
        "|---|---|---|---|---|---|---|",
    ]
    jobs = [(scale, sampler) for scale in (1.0, 3.0, 5.0, 7.0) for sampler in SAMPLERS]
    for scale, sampler in tqdm(jobs, desc="rows"):
        flow = FlowPipeline.from_pipeline(pipeline, guidance_scale=scale, max_sequence_length=8)
        generator, images = torch.Generator().manual_seed(0), []
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            latents = flow.initial_latents(len(part), generator)
            with torch.no_grad():
                images += [flow.images(sample(flow, sampler, latents, flow.encode_prompts(part), generator))]
        pictures = torch.cat(images)
        right = torch.tensor(check(pictures, asked), dtype=torch.float32)
        if args.sheet is not None and (scale, sampler) == jobs[0]:
            marks = {"base": right[:64].bool().tolist()}
            sheet, _ = before_after(asked[:64], {"base": pictures[:64]}, marks, columns=8)
            sheet.save(args.sheet)
        parts = enumerate(pictures.split(BATCH))
        with torch.no_grad():
            score = torch.cat([reward(p, asked[i * BATCH : (i + 1) * BATCH]) for i, p in parts]).mean()
        shares = " | ".join(f"{100 * r.mean():.1f} %" for r in (right, right[~two], right[two]))
        variety = diversity(pictures, asked, right.bool().tolist())
        lines.append(f"| {scale:g} | {sampler} | {shares} | {score:.3f} | {variety:.3f} |")
    lines += [
        "",
        f"{len(asked)} pictures a row, of {len(asked) // args.pictures} held-out prompts. torch {torch.__version__}, "
        "CPU, seed 0.",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
