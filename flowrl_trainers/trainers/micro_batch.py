"""`MicroBatch`: what a rollout leaves for one micro-step."""

from dataclasses import dataclass

import torch

from .prompt_groups import Example


@dataclass
class MicroBatch:
    """The images of one micro-step and what an algorithm keeps of them; every tensor has the image as its first dimension.

    good: (B,), False for images that are left out of the loss because something about them was not finite.
    """

    examples: list[Example]
    tensors: dict[str, torch.Tensor]
    good: torch.Tensor
