"""`GroupScores`: groupwise rewards see the pictures of a prompt side by side, also those of other processes."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from .prompt_groups import Example

Ask = Callable[[list[Tensor], list[Example]], Callable[[], Tensor]]
"""Asks R rewards about G images, of which it gets several views (G, ...); what it returns waits for scores (G, R)."""


@dataclass(frozen=True)
class GroupKey:
    """A group of images: the row of its prompt, its number among the groups of the row, and which state of its images
    it shows, where a rollout scores several of each.
    """

    row: int
    number: int
    state: int


@dataclass(frozen=True)
class Place:
    """Where an image of a group is: its number in the group, its process, and its index among the process's images."""

    image: int
    process: int
    index: int


def groups_of(examples: list[Example], size: int) -> dict[GroupKey, list[Place]]:
    """The groups that the images of all processes form, each in the order of its images. All processes must call it.

    Args:
        examples: Those of this process.
        size: The images of a group.

    Raises:
        ValueError: For a group of another size, on all processes alike.
    """
    seen: dict[tuple[int, int], int] = {}
    mine: list[tuple[int, int, int]] = []
    for key in (example.key for example in examples):
        state = seen.setdefault((key.row, key.image), 0)
        seen[key.row, key.image] += 1
        mine.append((key.row, key.image, state))
    groups: dict[GroupKey, list[Place]] = {}
    for process, images in enumerate(gather_object([mine])):
        for index, (row, image, state) in enumerate(images):
            places = groups.setdefault(GroupKey(row, image // size, state), [])
            places.append(Place(image, process, index))
    for group, places in groups.items():
        if len(places) != size:
            raise ValueError(
                f"`examples` has {len(places)} pictures of the prompt in row {group.row}, but a groupwise reward "
                f"compares groups of {size} (`num_generations`): score all images of a rollout in one call."
            )
        places.sort(key=lambda place: place.image)
    return groups


class GroupScores:
    """The scores of groupwise rewards for the images that all processes score together.

    A group that is whole on this process is scored as soon as its last picture comes; a group that is spread over
    processes at the end, by the process of its first picture, to which the others send theirs.

    Args:
        ask: Asks the rewards about one group.
        examples: B of this process's images.
        size: The images of a group.

    Raises:
        ValueError: For groups of another size.
    """

    def __init__(self, ask: Ask, examples: list[Example], size: int) -> None:
        self.ask, self.examples = ask, examples
        self.here = PartialState().process_index
        groups = groups_of(examples, size)
        self.whole: list[list[Place]] = []
        self.spread: list[list[Place]] = []  # in the same order on all processes
        for key in sorted(groups, key=astuple):
            processes = {place.process for place in groups[key]}
            if len(processes) > 1:
                self.spread.append(groups[key])
            elif processes == {self.here}:
                self.whole.append(groups[key])
        self.kept: dict[int, list[Tensor]] = {}  # views of an image
        self.asked: list[tuple[list[Place], Callable[[], Tensor]]] = []
        self.found: list[tuple[int, int, list[float]]] = []  # process, index, R scores

    def add(self, start: int, views: list[Tensor]) -> None:
        """Take views (M, ...) of the images from index `start` on, and ask about the groups that are whole now.

        The scores of groups that were asked about before are waited for first.
        """
        self._settle()
        self.empty = [torch.empty_like(view[0]) for view in views]
        self.kept |= {start + i: [view[i] for view in views] for i in range(len(views[0]))}
        ready = [group for group in self.whole if all(place.index in self.kept for place in group)]
        self.whole = [group for group in self.whole if group not in ready]
        for group in ready:
            self._ask(group, [self.kept.pop(place.index) for place in group])

    def scores(self) -> Tensor:
        """The scores (B, R) as in `call_rewards`, on the images' device. All processes call it, after their last
        `add`.
        """
        for group in self.spread:
            images = [self._sent(place) for place in group]
            self._settle()
            if group[0].process == self.here:
                self._ask(group, images)
        self._settle()
        everyone = gather_object(self.found) if self.spread else self.found
        mine = {index: scores for process, index, scores in everyone if process == self.here}
        rows = [mine[index] for index in range(len(self.examples))]
        return torch.tensor(rows, dtype=torch.float32, device=self.empty[0].device)

    def _ask(self, group: list[Place], images: list[list[Tensor]]) -> None:
        """Ask about a group by its images' views; one of them is here, and all have its prompt and columns."""
        example = next(self.examples[place.index] for place in group if place.process == self.here)
        views = [torch.stack(view) for view in zip(*images, strict=True)]
        self.asked.append((group, self.ask(views, [example] * len(group))))

    def _sent(self, place: Place) -> list[Tensor]:
        """The views of the image of a place, on all processes."""
        here = place.process == self.here
        views = self.kept.pop(place.index) if here else [torch.empty_like(view) for view in self.empty]
        return [broadcast(view.contiguous(), from_process=place.process) for view in views]

    def _settle(self) -> None:
        for group, answer in self.asked:
            scores = answer().tolist()
            self.found += [(p.process, p.index, row) for p, row in zip(group, scores, strict=True)]
        self.asked = []
