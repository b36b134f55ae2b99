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

    With a pool, every epoch asks for the same images: the first in the order of the pool, later ones in orders that
    are functions of (seed, epoch). An image of the pool has the same `row` and `image` in all rollouts. The pool takes
    the prompts in their order of epoch 0, then, if it is larger than one group of each, with further images in their
    order of epoch 1, and so on.

    Args:
        num_prompts: The rows of the dataset.
        num_generations: The images per prompt.
        images_per_update: Over all processes and micro-steps.
        updates_per_rollout: Those of one pass over a rollout.
        repeats: How many micro-steps use each rollout; the sampler repeats it for every one.
        num_processes: Among which every update is dealt.
        seed: That of the run.
        pool_size: The images of the pool, a multiple of those of a rollout; None without a pool.
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
        pool_size: int | None = None,
    ) -> None:
        self.num_prompts, self.num_generations = num_prompts, num_generations
        self.images_per_update, self.updates_per_rollout = images_per_update, updates_per_rollout
        self.repeats, self.num_processes, self.seed = repeats, num_processes, seed
        self.prompts_per_rollout = images_per_update * updates_per_rollout // num_generations
        self.pool_groups = None if pool_size is None else pool_size // num_generations
        self.rollouts_per_epoch = (self.pool_groups or num_prompts) // self.prompts_per_rollout
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rollouts_per_epoch * self.images_per_update * self.updates_per_rollout * self.repeats

    def __iter__(self) -> Iterator[ImageKey]:
        groups = self._groups(self.epoch)
        for number in range(self.rollouts_per_epoch):
            taken = groups[number * self.prompts_per_rollout : (number + 1) * self.prompts_per_rollout]
            rollout = self.epoch * self.rollouts_per_epoch + number
            images = [ImageKey(row, first + i, rollout) for row, first in taken for i in range(self.num_generations)]
            dealt = self._deal(images)
            for _ in range(self.repeats):
                yield from dealt

    def rows_of(self, rollouts: int) -> list[int]:
        """The rows that the first so many rollouts ask for."""
        rows: dict[int, None] = {}
        for epoch in range(-(-rollouts // self.rollouts_per_epoch)):
            count = min(rollouts - epoch * self.rollouts_per_epoch, self.rollouts_per_epoch) * self.prompts_per_rollout
            rows |= dict.fromkeys(row for row, _ in self._groups(epoch)[:count])
        return list(rows)

    def pool(self) -> list[ImageKey]:
        """The images of the pool in order, as of rollout 0."""
        groups = self._groups(0) if self.pool_groups else []
        return [ImageKey(row, first + i, 0) for row, first in groups for i in range(self.num_generations)]

    def _groups(self, epoch: int) -> list[tuple[int, int]]:
        """The prompt groups of an epoch in their order: the row of the prompt, and the number of the first image."""
        if self.pool_groups is None:
            return [(row, 0) for row in self._permutation(self.num_prompts, epoch, "prompt order")]
        groups = [
            (row, repeat * self.num_generations)
            for repeat in range(-(-self.pool_groups // self.num_prompts))
            for row in self._permutation(self.num_prompts, repeat, "prompt order")
        ][: self.pool_groups]
        if epoch == 0:
            return groups
        return [groups[number] for number in self._permutation(len(groups), epoch, "pool order")]

    def _permutation(self, count: int, epoch: int, purpose: str) -> list[int]:
        generator = keyed_generator(self.seed, ImageKey(0, 0, epoch), purpose)
        return torch.randperm(count, generator=generator).tolist()

    def _deal(self, images: list[ImageKey]) -> list[ImageKey]:
        share = self.images_per_update // self.num_processes
        return [
            images[update * self.images_per_update + process * share + i]
            for process in range(self.num_processes)
            for update in range(self.updates_per_rollout)
            for i in range(share)
        ]
