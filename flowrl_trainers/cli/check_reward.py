"""`flowrl check_reward NAME --model MODEL`: say before a run what a reward is good for."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from ..pipelines import FlowPipeline
from ..rewards import as_rewards
from ..rewards.named import refuse_all_but_pictures
from ..run_folder.gallery import to_pillow
from ..run_folder.score_sheets import SHOWN, picture_rows
from ..run_folder.text_files import write_json, write_text
from ..sampling.evaluator import Evaluator, ode_sampler
from ..sampling.flow_model import FlowModel
from ..sampling.prompt_groups import Example
from ..sampling.prompt_sources import is_prompt_file
from ..sampling.reward_trial import Trial, try_reward
from ..trainers.input_checks import check_columns, check_dataset, writable_folder
from .evaluate import CONTEXT, DTYPES, ready_to_draw
from .named_reward import named_reward
from .reward_report import report_of
from .run import EMBEDDED, load_model, load_prompts

WRITTEN = "check.md, check.json and pictures.png"
MEGABYTE = 10**6


def check_reward(arguments: list[str]) -> None:
    """Draw pictures, score them in every way, print the report and write the files.

    Raises `ValueError` if an argument is wrong, or if no picture has a score.
    """
    args = _parser().parse_args(arguments)
    for name in ("prompts", "pictures", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` ({getattr(args, name)}) must be at least 1.")
    rows = _rows(args)
    accelerator = Accelerator(cpu=args.use_cpu)
    before = _megabytes(accelerator.device)
    (reward,) = as_rewards(named_reward(args.NAME), "NAME")
    refuse_all_but_pictures([reward], "NAME")
    check_columns([reward], rows, "dataset")
    folder = writable_folder(args.out, "out")
    reward.to(accelerator.device)
    loaded = _megabytes(accelerator.device) - before
    examples, images = _draw(args, rows, accelerator)
    if accelerator.device.type == "cuda":  # else the peak would be that of drawing
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    before = _megabytes(accelerator.device)
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand((min(SHOWN, args.prompts), *images.shape[1:]), generator=generator)
    trial, hacked = try_reward(reward, images, examples, args.pictures, noise.to(images.device), CONTEXT)
    memory = loaded + _megabytes(accelerator.device) - before
    drawn = f"{args.pictures} pictures of each of {args.prompts} prompts, drawn by {args.model}"
    report = report_of(reward.name, trial, memory, drawn)
    write_text(folder / "check.md", report + "\n")
    write_json(folder / "check.json", asdict(trial) | {"megabytes": memory})
    _save_pictures(folder / "pictures.png", trial, examples, images, hacked)
    print(f"\n{report}\n\n{WRITTEN} are in {folder}/.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flowrl check_reward", description=__doc__.split(": ", 1)[1], allow_abbrev=False)
    parser.add_argument("NAME", help="A known reward such as 'ocr', or a function as 'module.function'.")
    parser.add_argument(
        "--model", default="shapes", help="The pipeline that draws: a Hub id, a folder, or 'shapes', the default."
    )
    parser.add_argument("--dataset", help="The prompts: a file, a data set of the Hub, or 'shapes', the model's own.")
    parser.add_argument("--split", help="The split of the prompts. Default: 'held_out', and the whole of a file.")
    parser.add_argument("--prompt_column", default="prompt", help="The column with the prompts. Default: 'prompt'.")
    parser.add_argument("--prompts", type=int, default=8, help="The number of prompts. Default: 8.")
    parser.add_argument("--pictures", type=int, default=4, help="The pictures of each prompt. Default: 4.")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="The sampler steps. Default: 20.")
    parser.add_argument("--guidance_scale", type=float, help="The guidance scale. Default: the pipeline's own.")
    parser.add_argument("--height", type=int, help="Pixels. Default: the pipeline's own.")
    parser.add_argument("--width", type=int, help="Pixels. Default: the pipeline's own.")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="The precision of the pipeline.")
    parser.add_argument("--batch_size", type=int, default=8, help="The pictures drawn at a time. Default: 8.")
    parser.add_argument("--use_cpu", action="store_true", help="Stay on the CPU where there is a GPU.")
    parser.add_argument("--seed", type=int, default=42, help="The seed of all pictures. Default: 42.")
    parser.add_argument("--out", default="flowrl-check", help=f"The folder for {WRITTEN}.")
    return parser


def _rows(args: argparse.Namespace) -> Dataset:
    """The rows that are drawn: evenly spaced among those of different prompts, each `pictures` times."""
    source = args.dataset or ("shapes" if args.model in EMBEDDED else None)
    if source is None:
        raise ValueError(f"`dataset` is missing: name prompts for {args.model!r}, such as a text file.")
    split = args.split or ("train" if is_prompt_file(source) else "held_out")
    dataset = check_dataset(load_prompts(source, None, split, args.prompt_column), "dataset")
    first = {prompt: row for row, prompt in reversed(list(enumerate(dataset["prompt"])))}
    different = sorted(first.values())
    if len(different) < args.prompts:
        raise ValueError(f"`prompts` ({args.prompts}) is more than the {len(different)} prompts of `dataset`.")
    chosen = [different[i * len(different) // args.prompts] for i in range(args.prompts)]
    return dataset.select([row for row in chosen for _ in range(args.pictures)])


def _draw(args: argparse.Namespace, rows: Dataset, accelerator: Accelerator) -> tuple[list[Example], Tensor]:
    """The rows with their pictures (N, 3, H, W), on the device."""
    settings = {name: getattr(args, name) for name in ("guidance_scale", "height", "width")}
    flow = FlowPipeline.from_pipeline(load_model(args.model, DTYPES[args.dtype]), **settings)
    cache = ready_to_draw(flow, list(rows["prompt"]), accelerator.device)
    evaluator = Evaluator(
        flow,
        cache,
        [],
        accelerator,
        seed=args.seed,
        batch_size=args.batch_size,
        show_progress=sys.stderr.isatty(),
    )
    sampler = ode_sampler(flow.sigmas(args.num_inference_steps).to(accelerator.device))
    model = FlowModel(flow, has_adapter=True).eval().to(accelerator.device)  # or none, which is no adapter either
    parts = list(evaluator.drawn(model, rows, sampler, "base"))
    return [example for part, _ in parts for example in part], torch.cat([images for _, images in parts])


def _megabytes(device: torch.device) -> float:
    """What this process holds: of the GPU at its peak, else of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    return psutil.Process().memory_info().rss / MEGABYTE


def _save_pictures(path: Path, trial: Trial, examples: list[Example], images: Tensor, hacked: Tensor | None) -> None:
    """A sheet: the best and the worst pictures, and those that gradient ascent made of noise."""
    scores = trial.flat
    order = sorted((i for i in range(len(scores)) if abs(scores[i]) < float("inf")), key=lambda i: -scores[i])
    rows = {
        label: [(to_pillow(images[i]), f"{scores[i]:.4g}: {examples[i].prompt}") for i in chosen]
        for label, chosen in (("best", order[:SHOWN]), ("worst", order[::-1][:SHOWN]))
    }
    if hacked is not None and trial.ascent is not None:
        prompts = [example.prompt for example in examples[:: len(trial.scores[0])]][: len(hacked)]
        after = zip(hacked, prompts, trial.ascent[1], strict=True)
        rows["ascent from noise"] = [(to_pillow(image), f"{score:.4g}: {prompt}") for image, prompt, score in after]
    picture_rows(rows).save(path)
