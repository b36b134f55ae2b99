"""`MicroBatch`: what a rollout leaves for one micro-step."""

from dataclasses import dataclass

import torch

from ..flow import expand_like
from .prompt_groups import Example


@dataclass
class MicroBatch:
    """The images of one micro-step and what an algorithm keeps of them; every tensor has the image as its first dimension.

    good: (B,), False for images that are left out of the loss because something about them was not finite.
    """

    examples: list[Example]
    tensors: dict[str, torch.Tensor]
    good: torch.Tensor

    def leave_out_what_is_not_finite(self) -> None:
        """Mark images with anything that is not finite, and zero them, as zero times infinity would still reach the weights."""
        for value in self.tensors.values():
            self.good &= value.reshape(len(value), -1).isfinite().all(dim=1)
        for name, value in self.tensors.items():
            self.tensors[name] = torch.where(expand_like(self.good, value), value, 0.0)
