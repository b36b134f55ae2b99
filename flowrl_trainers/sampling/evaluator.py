"""`Evaluator`: what a model is worth on held-out prompts with fixed seeds."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Generator, Tensor

from ..flow import euler_steps
from ..pipelines import Conditioning, FlowPipeline
from ..rewards import Reward
from ..rewards.shapes import checker_among
from .conditioning import ConditioningCache
from .draws import ImageKey
from .flow_model import FlowModel
from .meters import DiversityMeter, Meter, RewardMeter, StatisticsMeter
from .pictures import Pictures, picture_seed
from .progress import bar
from .prompt_groups import Example, PromptDataset
from .scoring import Judging, call_rewards, decoded, leave_in_place

Sampler = Callable[[FlowModel, Tensor, Conditioning, list[Generator]], Tensor]
"""Maps model, initial latents (B, ...), conditioning and one generator per image to final latents (B, ...)."""


def ode_sampler(sigmas: Tensor) -> Sampler:
    """The Euler ODE with guidance on a grid from 1 to 0, on the latents' device."""

    @torch.no_grad()
    def sample(model: FlowModel, latents: Tensor, conditioning: Conditioning, generators: list[Generator]) -> Tensor:
        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            return model(x, sigma, conditioning, guidance=True)

        *_, (_, _, final) = euler_steps(velocity, latents, sigmas)
        return final

    return sample


class Evaluator:
    """Draws one picture per row of a dataset, with seeds that are the row's own, and measures them.

    Args:
        flow: Draws and decodes.
        conditioning: Knows the prompts.
        rewards: Those that training sees, and those that it never does.
        accelerator: Of the run; the processes share the work.
        seed: That of the run, from which those of the rows follow; see `picture_seed`.
        batch_size: The pictures drawn at a time.
        decode_batch_size: The pictures decoded and scored at a time; None for a batch.
        show_progress: Whether the main process shows a bar.
        judging: A context in which decoders and rewards are on the device; see `Placement`.
    """

    def __init__(
        self,
        flow: FlowPipeline,
        conditioning: ConditioningCache,
        rewards: list[Reward],
        accelerator: Accelerator,
        *,
        seed: int,
        batch_size: int,
        decode_batch_size: int | None = None,
        show_progress: bool = True,
        judging: Judging = leave_in_place,
    ) -> None:
        self.flow, self.conditioning, self.rewards, self.accelerator = flow, conditioning, rewards, accelerator
        self.seed, self.batch_size, self.decode_batch_size = seed, batch_size, decode_batch_size
        self.show_progress, self.judging = show_progress, judging

    def initial_latents(self, rows: list[int]) -> tuple[Tensor, list[Generator]]:
        """The noise (B, ...) from which the pictures of rows start, on the device, and the generators that drew it."""
        generators = [Generator().manual_seed(picture_seed(self.seed, row)) for row in rows]
        return self.flow.initial_latents(len(rows), generators).to(self.accelerator.device), generators

    @torch.no_grad()
    def _latents(self, model: FlowModel, examples: list[Example], sampler: Sampler) -> Tensor:
        """The final latents (B, ...) of B rows."""
        latents, generators = self.initial_latents([e.key.row for e in examples])
        conditioning = self.conditioning([e.prompt for e in examples], self.accelerator.device)
        with self.accelerator.autocast():
            return sampler(model, latents, conditioning, generators)

    @torch.no_grad()
    def _draw(
        self, model: FlowModel, examples: list[Example], sampler: Sampler, label: str | None = None
    ) -> Iterator[tuple[list[Example], Tensor, Tensor]]:
        """Rows with their final latents (B, ...) and pictures (B, 3, H, W) in [0, 1], batch by batch.

        label: Of the progress bar, None for none.

        They are decoded once all are drawn, as the network may have to leave the device for that.
        """
        shown = self.show_progress and label is not None and self.accelerator.is_main_process
        starts = range(0, len(examples), self.batch_size)
        drawn = []
        for start in bar(starts, f"Drawing with the {label} model", shown):
            part = examples[start : start + self.batch_size]
            drawn.append((part, self._latents(model, part, sampler)))
        with self.judging(self.rewards):
            for part, latents in drawn:
                at_a_time = self.decode_batch_size or len(part)
                for first in range(0, len(part), at_a_time):
                    some = latents[first : first + at_a_time]
                    yield part[first : first + at_a_time], some, decoded(self.flow, some)

    def drawn(
        self, model: FlowModel, dataset: Dataset, sampler: Sampler, label: str
    ) -> Iterator[tuple[list[Example], Tensor]]:
        """Rows with their pictures (B, 3, H, W) in [0, 1], batch by batch. Arguments as in `row`."""
        return ((part, images) for part, _, images in self._draw(model, _examples(dataset), sampler, label))

    @torch.no_grad()
    def row(
        self, model: FlowModel, dataset: Dataset, sampler: Sampler, label: str, context: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """What the meters say of the pictures of all rows, and the scores of every reward.

        Every process draws the rows of a share of the prompts, prompt by prompt. With a sharded model, a process whose
        share is smaller draws one row again for as long as others draw theirs, and forgets it.

        Args:
            model: Draws.
            dataset: With the column `prompt`.
            sampler: How it is drawn.
            label: Of the progress bar.
            context: What rewards are called with beside images, prompts and columns.

        Returns:
            `reward/<name>`, `checker_accuracy`, `edge_density`, `colour_entropy` and `diversity`, see `meters`; and
            for each reward (N,) scores of the N rows in an order that is always the same, NaN where it returned None.
        """
        rows_of: dict[str, list[Example]] = {}
        for example in _examples(dataset):
            rows_of.setdefault(example.prompt, []).append(example)
        processes, groups = self.accelerator.num_processes, list(rows_of.values())
        shares = [[example for group in groups[first::processes] for example in group] for first in range(processes)]
        mine = shares[self.accelerator.process_index]
        scores = RewardMeter(self.rewards)
        meters: list[Meter] = [scores, StatisticsMeter(), DiversityMeter(self.rewards, mine)]
        for part, latents, images in self._draw(model, mine, sampler, label):
            values = call_rewards(self.rewards, images, part, latents, **context)
            for meter in meters:
                meter.add(part, images, values)
        if model.is_sharded:
            batches = [math.ceil(len(share) / self.batch_size) for share in shares]
            for _ in range(max(batches) - batches[self.accelerator.process_index]):
                self._latents(model, groups[0][:1], sampler)
        row: dict[str, float] = {}
        for meter in meters:
            row |= meter.row()
        return row, scores.by_reward

    @torch.no_grad()
    def pictures(
        self, model: FlowModel, dataset: Dataset, sampler: Sampler, count: int, context: dict[str, Any]
    ) -> Pictures:
        """Pictures of `count` rows with different prompts, as `row` draws them, all of them on this process.

        The rows are evenly spaced, so that nobody chose them. Arguments as in `row`.
        """
        first = list({e.prompt: e for e in reversed(_examples(dataset))}.values())[::-1]
        count = min(count, len(first))
        shown = [first[i * len(first) // count] for i in range(count)]
        extra: dict[str, list[Any]] = {}
        parts: list[tuple[Tensor, Tensor]] = []

        def keep(name: str, values: list[Any]) -> None:
            column = extra.setdefault(name, [None] * len(shown))
            before = sum(len(images) for images, _ in parts)
            for row, value in enumerate(values, before):  # None for a picture that the reward was not shown
                column[row] = column[row] if value is None else value

        context = context | {"log_extra": keep}
        for part, latents, images in self._draw(model, shown, sampler):
            parts.append((images.cpu(), call_rewards(self.rewards, images, part, latents, **context)))
        images, scores = torch.cat([images for images, _ in parts]), torch.cat([values for _, values in parts])
        columns = zip(self.rewards, scores.unbind(dim=1), strict=True)
        return Pictures(
            prompts=[e.prompt for e in shown],
            seeds=[picture_seed(self.seed, e.key.row) for e in shown],
            images=images,
            scores={reward.name: [float(v) if v.isfinite() else None for v in column] for reward, column in columns},
            extra=extra,
            checker=checker_among(self.rewards),
        )


@contextmanager
def rewards_at_hand(judges: list[Reward], trained: list[Reward], device: torch.device) -> Iterator[None]:
    """Inside, the rewards that training never sees are on the device; outside, their memory is free for training.

    Args:
        judges: Those that training never sees.
        trained: Those that it does; they may share a network with a judge, and are on the device afterwards.
        device: Where training is.
    """
    for judge in judges:
        judge.to(device)
    try:
        yield
    finally:
        for judge in judges:
            judge.to(torch.device("cpu"))
        for reward in trained:
            reward.to(device)


def _examples(dataset: Dataset) -> list[Example]:
    rows = PromptDataset(dataset)
    return [rows[ImageKey(row, 0, 0)] for row in range(len(rows))]
