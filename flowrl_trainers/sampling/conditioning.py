"""Prompts are encoded once, before training."""

import torch

from ..pipelines import Conditioning, FlowPipeline
from .progress import bar


class ConditioningCache:
    """What the network reads of every prompt of a run, in the memory of the host."""

    def __init__(self, flow: FlowPipeline, batch_size: int = 16) -> None:
        self.flow, self.batch_size = flow, batch_size
        self.index: dict[str, int] = {}
        self.stored: dict[str, list[torch.Tensor]] = {}

    def encode(self, prompts: list[str], device: torch.device, show_progress: bool) -> None:
        """Encode the prompts that are not yet known.

        Args:
            prompts: Strings.
            device: Where the text encoders are meanwhile; afterwards they are on the CPU.
            show_progress: Whether to show a bar.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self.index]
        if not new:
            return
        for module in self.flow.text_encoders():
            module.to(device)
        batches = [new[i : i + self.batch_size] for i in range(0, len(new), self.batch_size)]
        for batch in bar(batches, "Encoding prompts", show_progress):
            for name, value in self.flow.encode_prompts(batch).items():
                kept = self.stored.setdefault(name, [])
                for row in value.to("cpu"):  # what all prompts share, such as a negative prompt, is kept once
                    kept.append(kept[-1] if kept and torch.equal(row, kept[-1]) else row.clone())
            self.index |= {prompt: len(self.index) + i for i, prompt in enumerate(batch)}
        for module in self.flow.text_encoders():
            module.to("cpu")

    def __call__(self, prompts: list[str], device: torch.device) -> Conditioning:
        """The conditioning of prompts that `encode` has seen, on a device."""
        rows = [self.index[p] for p in prompts]
        return {name: self._together([values[r] for r in rows]).to(device) for name, values in self.stored.items()}

    @staticmethod
    def _together(rows: list[torch.Tensor]) -> torch.Tensor:
        """Prompts that were encoded in different batches may be padded to different lengths; masks come with them."""
        if all(row.shape == rows[0].shape for row in rows):
            return torch.stack(rows)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
