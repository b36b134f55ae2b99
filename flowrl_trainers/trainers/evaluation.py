"""Held-out prompts and fixed seeds: what a model is worth."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from ..metrics import colour_entropy, edge_density, mean_distance
from ..pipelines import Conditioning, FlowPipeline
from ..rewards import CheckerReward, Reward
from ..sampling.conditioning import ConditioningCache
from ..sampling.draws import keyed_seed
from ..sampling.prompt_groups import Example, ImageKey, PromptDataset
from ..sampling.scoring import call_rewards, decoded
from .base_config import FlowRLConfig

Sampler = Callable[[nn.Module, torch.Tensor, Conditioning, list[torch.Generator]], torch.Tensor]
"""Called with a transformer, initial latents (B, ...), their conditioning and one generator per image; returns final latents (B, ...)."""


def picture_seed(seed: int, row: int) -> int:
    """The seed of the picture of an evaluation row: `torch.Generator().manual_seed` of it draws its initial latents."""
    return keyed_seed(seed, row, 0, 0, "evaluation")


@dataclass
class Pictures:
    """Pictures (B, 3, H, W) in [0, 1] with what is known of them; scores: name of a reward -> B scores, None where it said None."""

    prompts: list[str]
    seeds: list[int]
    images: torch.Tensor
    scores: dict[str, list[float | None]]
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def right(base: "Pictures", tuned: "Pictures") -> dict[str, list[bool]] | None:
        """For base and tuned, which pictures the checker accepts; None where it was not asked."""
        name = CheckerReward.name
        if name not in tuned.scores:
            return None
        return {label: [score == 1 for score in p.scores[name]] for label, p in (("base", base), ("tuned", tuned))}


@torch.no_grad()
def _draw(
    flow: FlowPipeline,
    transformer: nn.Module,
    conditioning: ConditioningCache,
    examples: list[Example],
    sampler: Sampler,
    args: FlowRLConfig,
    accelerator: Accelerator,
    label: str | None,
) -> Iterator[tuple[list[Example], torch.Tensor]]:
    """The pictures (B, 3, H, W) in [0, 1] of evaluation rows, batch by batch; label: of the progress bar, None for none."""
    size = args.per_device_eval_batch_size
    hidden = args.disable_tqdm or label is None or not accelerator.is_main_process
    for start in tqdm(range(0, len(examples), size), desc=f"Drawing with the {label} model", disable=hidden):
        part = examples[start : start + size]
        generators = [torch.Generator().manual_seed(picture_seed(args.seed, e.key.row)) for e in part]
        latents = flow.initial_latents(len(part), generators).to(args.device)
        with accelerator.autocast():
            latents = sampler(transformer, latents, conditioning([e.prompt for e in part], args.device), generators)
        at_a_time = args.decode_batch_size or len(part)
        for first in range(0, len(part), at_a_time):
            yield part[first : first + at_a_time], decoded(flow, latents[first : first + at_a_time])


def _examples(dataset: Dataset) -> list[Example]:
    rows = PromptDataset(dataset)
    return [rows[ImageKey(row, 0, 0)] for row in range(len(rows))]


@torch.no_grad()
def draw_rows(
    flow: FlowPipeline,
    transformer: nn.Module,
    conditioning: ConditioningCache,
    dataset: Dataset,
    count: int,
    rewards: list[Reward],
    sampler: Sampler,
    args: FlowRLConfig,
    accelerator: Accelerator,
    context: dict[str, Any],
) -> Pictures:
    """Pictures of `count` rows with different prompts, evenly spaced so that nobody chose them, as the evaluation draws them."""
    first = list({e.prompt: e for e in reversed(_examples(dataset))}.values())[::-1]
    count = min(count, len(first))
    shown = [first[i * len(first) // count] for i in range(count)]
    extra: dict[str, Any] = {}
    context = context | {"log_extra": lambda name, values: extra.setdefault(name, []).extend(values)}
    drawn = _draw(flow, transformer, conditioning, shown, sampler, args, accelerator, None)
    parts = [(images.cpu(), call_rewards(rewards, images, part, **context)) for part, images in drawn]
    images, scores = torch.cat([images for images, _ in parts]), torch.cat([values for _, values in parts])
    return Pictures(
        prompts=[e.prompt for e in shown],
        seeds=[picture_seed(args.seed, e.key.row) for e in shown],
        images=images,
        scores={r.name: [float(v) if v.isfinite() else None for v in c] for r, c in zip(rewards, scores.unbind(dim=1), strict=True)},
        extra=extra,
    )


@torch.no_grad()
def evaluation_row(
    flow: FlowPipeline,
    transformer: nn.Module,
    conditioning: ConditioningCache,
    dataset: Dataset,
    rewards: list[Reward],
    sampler: Sampler,
    args: FlowRLConfig,
    accelerator: Accelerator,
    label: str,
    context: dict[str, Any],
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """`reward/<name>`, the mean over all rows of the dataset, `diversity`, and of pictures `edge_density` and `colour_entropy`.

    And the scores of every reward, (N,) for N rows in an order that is always the same, NaN where it said None.

    Over all processes, each of which draws the rows of its own prompts. Diversity counts the pictures that the checker accepts where it
    is among the rewards, else all; without two such pictures of any prompt it is left out. The checker's mean also stands as
    `checker_accuracy`.
    """
    rows_of: dict[str, list[Example]] = {}
    for e in _examples(dataset):
        rows_of.setdefault(e.prompt, []).append(e)
    # Prompt by prompt, so that only the pictures of one are kept.
    own = [e for prompt in list(rows_of)[accelerator.process_index :: accelerator.num_processes] for e in rows_of[prompt]]
    checker = next((i for i, reward in enumerate(rewards) if isinstance(reward, CheckerReward)), None)
    scores: list[list[float]] = []
    statistics: list[list[float]] = []
    kept: dict[str, list[torch.Tensor]] = {}  # only what diversity compares
    distances: list[float] = []
    for part, images in _draw(flow, transformer, conditioning, own, sampler, args, accelerator, label):
        values = call_rewards(rewards, images, part, **context).tolist()
        for image, e, v in zip(images.cpu(), part, values, strict=True):
            if len(rows_of[e.prompt]) > 1 and (checker is None or v[checker] == 1):
                kept.setdefault(e.prompt, []).append(image)
        done = [prompt for prompt in kept if prompt != part[-1].prompt or part[-1] is own[-1]]
        distances += [mean_distance(group) for group in map(kept.pop, done) if len(group) > 1]
        scores += values
        if images.dim() == 4:  # a model of vectors has no edges
            statistics += torch.stack([edge_density(images), colour_entropy(images)], dim=1).tolist()
    everything = torch.tensor(gather_object(scores), dtype=torch.float64)
    everything = torch.where(everything.isfinite(), everything, torch.nan)
    by_reward = {reward.name: column for reward, column in zip(rewards, everything.unbind(dim=1), strict=True)}
    row = {f"reward/{name}": float(column.nanmean()) for name, column in by_reward.items()}
    if checker is not None:
        row["checker_accuracy"] = row[f"reward/{rewards[checker].name}"]
    found = gather_object(statistics)
    if found:
        row["edge_density"], row["colour_entropy"] = (sum(column) / len(column) for column in zip(*found, strict=True))
    values = gather_object(distances)
    return row | ({"diversity": sum(values) / len(values)} if values else {}), by_reward
