"""`Call`: one kind of work on one batch, and how often a rollout and its updates need it.

Each `*_config.py` of `trainers/` derives the calls of its method by hand from the equations in the docstring of its
trainer. They are counted for one process, over one rollout and all updates that use it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is called. The first five are calls of the transformer."""

    FORWARD = "forward"
    """The current model, without gradients."""
    BASE = "base_forward"
    """The frozen base (the adapter off, or a frozen copy), without gradients."""
    BASE_PRODUCT = "base_product"
    """A vector-Jacobian product of the base: a forward pass, and a backward pass to the latents alone."""
    PRODUCT = "product"
    """The same of the current model."""
    TRAIN = "forward_backward"
    """The current model with the backward pass to the trained parameters."""
    HEAD = "head_forward"
    """The value network or critic, without gradients."""
    HEAD_TRAIN = "head_forward_backward"
    """The value network or critic with the backward pass to its parameters."""
    DECODE = "decode"
    """The autoencoder's decoder, without gradients."""
    REWARD = "reward"
    """All rewards, without gradients."""
    REWARD_GRADIENT = "decode_and_reward_gradient"
    """Decoder and rewards with the backward pass to the latents; the decoder is that of `reward_decoder`, if any."""
    OWN_REWARD_GRADIENT = "own_decode_and_reward_gradient"
    """The same through the model's own decoder, beside that of `reward_decoder`."""


class Phase(StrEnum):
    """When it is called."""

    ROLLOUT = "rollout"
    REWARD = "decode and reward"
    TARGET = "adjoint"
    """Adjoints, anchors, consistency: what is computed once per rollout for the loss."""
    UPDATE = "update"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Call:
    """So many calls of one kind, each on so many images.

    Attributes:
        kind: What is called.
        batch: The images of one call.
        count: How often it is called.
        phase: When.
        needed: Whether the method's equations need it; False for what is computed twice today, or for the log alone.
        guided: Whether every call of the transformer comes with a second one, of the negative branch. In a loss that
            one has no gradient, as weights learn through the conditional branch alone.
    """

    kind: Kind
    batch: int
    count: int
    phase: Phase
    needed: bool = True
    guided: bool = False


@dataclass(frozen=True)
class Drawing:
    """What the number of calls depends on beside the settings of a method.

    Attributes:
        guided: Whether a guided velocity takes two calls of the network.
        decoded_together: The pictures that are decoded at a time where no setting says so: a megapixel's.
        branches_in_one_call: Whether both branches of guidance are one call of twice the batch, but in a loss.
        decodes: Whether a reward of training sees pictures; else rollouts are not decoded.
    """

    guided: bool
    decoded_together: int
    branches_in_one_call: bool = False
    decodes: bool = True

    def velocity(
        self, kind: Kind, batch: int, count: int, phase: Phase, *, guidance: bool = True, needed: bool = True
    ) -> list[Call]:
        """`count` velocities.

        Args:
            kind: One of the transformer's.
            batch: The images of one velocity.
            count: The number of velocities.
            phase: When.
            guidance: Whether the velocity is the guided one.
            needed: See `Call`.
        """
        guided = guidance and self.guided
        if guided and self.branches_in_one_call and kind != Kind.TRAIN:
            return [Call(kind, 2 * batch, count, phase, needed)]
        return [Call(kind, batch, count, phase, needed, guided)]

    def velocities(
        self, kind: Kind, images: int, at_once: int, count: int, phase: Phase, *, guidance: bool = True
    ) -> list[Call]:
        """`count` velocities of each of some images, which are given to the network `at_once` at a time."""
        split = parts(images, at_once).items()
        return [c for size, n in split for c in self.velocity(kind, size, count * n, phase, guidance=guidance)]

    def scores(self, pictures: int, at_a_time: int, *, needed: bool = True) -> list[Call]:
        """Decode and score without gradients, as `Scorer.score` does.

        Args:
            pictures: Their number.
            at_a_time: The pictures that the rewards see at a time; they are decoded a megapixel at a time.
            needed: See `Call`.
        """
        calls = []
        for size, count in parts(pictures, at_a_time).items():
            calls.append(Call(Kind.REWARD, size, count, Phase.REWARD, needed))
            decoded = parts(size, min(size, self.decoded_together)) if self.decodes else Counter[int]()
            calls += [Call(Kind.DECODE, part, count * n, Phase.REWARD, needed) for part, n in decoded.items()]
        return calls

    def reward_gradients(self, pictures: int, count: int, at_a_time: int | None, at_most: int) -> list[Call]:
        """Decode, score and differentiate `count` times, as `Scorer.score_with_gradient` does.

        Args:
            pictures: The pictures of each time.
            count: How often.
            at_a_time: `decode_batch_size`; None for `at_most`, and of decoded pictures a megapixel's.
            at_most: `rollout_batch_size`, or its default.
        """
        together = at_a_time or (min(at_most, self.decoded_together) if self.decodes else at_most)
        sizes = parts(pictures, together).items()
        return [Call(Kind.REWARD_GRADIENT, size, count * n, Phase.REWARD) for size, n in sizes]


def parts(number: int, size: int) -> Counter[int]:
    """The sizes of the parts into which so many images are split, and how many parts have each size."""
    whole, rest = divmod(number, size)
    return Counter({part: count for part, count in ((size, whole), (rest, int(rest > 0))) if part and count})


def counted(calls: Iterable[Call]) -> Counter[tuple[Kind, int]]:
    """How often each kind is called on each batch size, with both branches of guided velocities."""
    total: Counter[tuple[Kind, int]] = Counter()
    for call in calls:
        total[call.kind, call.batch] += call.count
        if call.guided:
            total[Kind.FORWARD if call.kind == Kind.TRAIN else call.kind, call.batch] += call.count
    return +total
