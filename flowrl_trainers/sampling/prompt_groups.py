"""Which prompts a rollout takes, in which order, and how its images are dealt to processes and micro-steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from .draws import ImageKey, keyed_generator


@dataclass
class Example:
    """An `ImageKey` with its prompt and the other columns of its row."""

    key: ImageKey
    prompt: str
    columns: dict[str, Any]


class PromptDataset(torch.utils.data.Dataset):
    """The rows of a `datasets.Dataset`, asked for by `ImageKey`."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: ImageKey) -> Example:
        columns = dict(self.dataset[key.row])
        return Example(key, columns.pop("prompt"), columns)


class PromptGroupSampler(Sampler[ImageKey]):
    """Groups of `num_generations` images per prompt, as rollouts of `updates_per_rollout` updates each.

    The groups of an update do not depend on how its images are spread over processes and micro-steps: with U images
    per update and P processes, process p takes the p-th of P equal parts of every update. A data loader whose batch is
    one process's share of a rollout deals them out. The order of the prompts is a function of (seed, epoch); prompts
    that do not fill a rollout at the end of an epoch are left for other epochs.

    Args:
        num_prompts: The rows of the dataset.
        num_generations: The images per prompt.
        images_per_update: Over all processes and micro-steps.
        updates_per_rollout: Those of one pass over a rollout.
        repeats: How many micro-steps use each rollout; the sampler repeats it for every one.
        num_processes: Among which every update is dealt.
        seed: That of the run.
    """

    def __init__(
        self,
        num_prompts: int,
        num_generations: int,
        images_per_update: int,
        updates_per_rollout: int,
        repeats: int,
        num_processes: int,
        seed: int,
    ) -> None:
        self.num_prompts, self.num_generations = num_prompts, num_generations
        self.images_per_update, self.updates_per_rollout = images_per_update, updates_per_rollout
        self.repeats, self.num_processes, self.seed = repeats, num_processes, seed
        self.prompts_per_rollout = images_per_update * updates_per_rollout // num_generations
        self.rollouts_per_epoch = num_prompts // self.prompts_per_rollout
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rollouts_per_epoch * self.images_per_update * self.updates_per_rollout * self.repeats

    def __iter__(self) -> Iterator[ImageKey]:
        order = self._order(self.epoch)
        for number in range(self.rollouts_per_epoch):
            rows = order[number * self.prompts_per_rollout : (number + 1) * self.prompts_per_rollout]
            rollout = self.epoch * self.rollouts_per_epoch + number
            images = [ImageKey(row, image, rollout) for row in rows for image in range(self.num_generations)]
            dealt = self._deal(images)
            for _ in range(self.repeats):
                yield from dealt

    def rows_of(self, rollouts: int) -> list[int]:
        """The rows that the first so many rollouts ask for."""
        rows: dict[int, None] = {}
        for epoch in range(-(-rollouts // self.rollouts_per_epoch)):
            count = min(rollouts - epoch * self.rollouts_per_epoch, self.rollouts_per_epoch) * self.prompts_per_rollout
            rows |= dict.fromkeys(self._order(epoch)[:count])
        return list(rows)

    def _order(self, epoch: int) -> list[int]:
        generator = keyed_generator(self.seed, ImageKey(0, 0, epoch), "prompt order")
        return torch.randperm(self.num_prompts, generator=generator).tolist()

    def _deal(self, images: list[ImageKey]) -> list[ImageKey]:
        share = self.images_per_update // self.num_processes
        return [
            images[update * self.images_per_update + process * share + i]
            for process in range(self.num_processes)
            for update in range(self.updates_per_rollout)
            for i in range(share)
        ]
