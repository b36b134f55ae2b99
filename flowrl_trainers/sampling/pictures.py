"""`Pictures`: what a sheet shows."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .draws import ImageKey, keyed_seed


def picture_seed(seed: int, row: int) -> int:
    """The seed of the picture of an evaluation row: a generator with this seed draws its initial latents."""
    return keyed_seed(seed, ImageKey(row, 0, 0), "evaluation")


@dataclass
class Pictures:
    """Pictures with what is known of them.

    Attributes:
        prompts: B of them.
        seeds: B of them, from which the initial latents were drawn.
        images: (B, 3, H, W) in [0, 1].
        scores: Name of a reward -> B scores, None where it returned None.
        extra: What rewards noted by `log_extra`.
        checker: What the reward is called that is a `CheckerReward`; None if there is none.
    """

    prompts: list[str]
    seeds: list[int]
    images: Tensor
    scores: dict[str, list[float | None]]
    extra: dict[str, Any] = field(default_factory=dict)
    checker: str | None = None

    @property
    def right(self) -> list[bool] | None:
        """Which pictures the checker accepts; None where it was not asked."""
        return None if self.checker is None else [score == 1 for score in self.scores[self.checker]]
