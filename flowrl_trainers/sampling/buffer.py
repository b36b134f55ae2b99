"""`RolloutBuffer`: the rollout in use, and the records that a method keeps of its images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar, get_args, get_type_hints

from torch import Tensor

from ..flow import expand_like
from .draws import ImageKey
from .prompt_groups import Example


@dataclass(frozen=True)
class Record:
    """What a method keeps of the images of a micro-batch: a frozen dataclass derived from this one.

    Every field is a tensor whose first dimension is the image, another record, or None where the method does not need
    it.
    """

    def tensors(self) -> list[Tensor]:
        """All tensors, those of inner records included."""
        found: list[Tensor] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                found += value.tensors() if isinstance(value, Record) else [value]
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The record with every tensor changed."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Record):
                changed[field.name] = value.map(change)
            elif value is not None:
                changed[field.name] = change(value)
        return replace(self, **changed)

    def of_images(self, images: slice) -> Self:
        """The record of some of the images."""
        return self.map(lambda value: value[images])

    def to_dict(self) -> dict[str, Any]:
        """Tensors, inner dictionaries and None under the names of the fields, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.to_dict() if isinstance(value, Record) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_dict` made into a dictionary."""
        inner = {
            name: [t for t in (kind, *get_args(kind)) if isinstance(t, type)]
            for name, kind in get_type_hints(cls).items()
        }
        found = dict(values)
        for name, value in values.items():
            if isinstance(value, dict):
                (kind,) = (t for t in inner[name] if issubclass(t, Record))
                found[name] = kind.from_dict(value)
        return cls(**found)


RecordT = TypeVar("RecordT", bound=Record)
OtherRecordT = TypeVar("OtherRecordT", bound=Record)


@dataclass(frozen=True)
class MicroBatch(Generic[RecordT]):
    """The images of one micro-step: who they are, what the method keeps of them, and which of them count.

    Attributes:
        examples: B images.
        record: What the method keeps of them, every tensor (B, ...).
        good: (B,), False for images that are left out of the loss because something about them was not finite.
    """

    examples: list[Example]
    record: RecordT
    good: Tensor

    @property
    def keys(self) -> list[ImageKey]:
        """Those of the images, from which random draws are made."""
        return [example.key for example in self.examples]

    def with_record(self, record: OtherRecordT, good: Tensor | None = None) -> "MicroBatch[OtherRecordT]":
        """The same images with another record; those that are not `good` (B,) are left out from now on."""
        return MicroBatch(self.examples, record, self.good if good is None else self.good & good)

    def keeping(self, good: Tensor) -> Self:
        """Leave out the images that are not `good` (B,), too."""
        return replace(self, good=self.good & good)

    def zero_not_finite(self) -> Self:
        """Leave out images with anything not finite, and zero them, as zero times infinity would reach the weights."""
        good = self.good
        for value in self.record.tensors():
            good = good & value.reshape(len(value), -1).isfinite().all(dim=1)
        return replace(
            self, record=self.record.map(lambda value: value.masked_fill(~expand_like(good, value), 0)), good=good
        )


class RolloutBuffer(Generic[RecordT]):
    """The micro-batches of the rollout in use, and how far they have been used.

    Args:
        record_class: That of the micro-batches' records.
        micro_steps: How many micro-batches one rollout fills.
        passes: How many times each rollout is used.
    """

    def __init__(self, record_class: type[RecordT], micro_steps: int, passes: int) -> None:
        self.record_class, self.micro_steps, self.passes = record_class, micro_steps, passes
        self.batches: list[MicroBatch[RecordT]] = []  # empty where nothing is learned from the rollout
        self.step = 0  # of all micro-steps since training began

    @property
    def needs_rollout(self) -> bool:
        """Whether the next micro-step needs a new rollout."""
        return self.step % (self.micro_steps * self.passes) == 0

    @property
    def is_at_first(self) -> bool:
        """Whether the micro-batch that was taken last is the first of its rollout."""
        return (self.step - 1) % (self.micro_steps * self.passes) == 0

    def reset(self) -> None:
        """Empty, as before training."""
        self.batches, self.step = [], 0

    def take(self) -> MicroBatch[RecordT] | None:
        """The micro-batch of the next micro-step; None where nothing is learned from the rollout."""
        batch = self.batches[self.step % self.micro_steps] if self.batches else None
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, and the micro-batches, while any is still to be used."""
        kept = [] if self.needs_rollout else self.batches
        return {
            "step": self.step,
            "batches": [
                {"keys": [[k.row, k.image, k.rollout] for k in b.keys], "record": b.record.to_dict(), "good": b.good}
                for b in kept
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], example: Callable[[ImageKey], Example]) -> None:
        """Go on from what `state_dict` returned; example: finds prompt and columns of an image."""
        self.step = state["step"]
        self.batches = [
            MicroBatch(
                [example(ImageKey(*key)) for key in part["keys"]],
                self.record_class.from_dict(part["record"]),
                part["good"],
            )
            for part in state["batches"]
        ]
