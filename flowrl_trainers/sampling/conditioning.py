"""Prompts are encoded once, before training."""

import itertools
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..pipelines import Conditioning, FlowPipeline
from .progress import bar
from .row_store import RowStore

GIB = 2**30


class ConditioningCache:
    """What the network reads of every prompt of a run, in the memory of the host or on its disk.

    Args:
        flow: Encodes prompts.
        batch_size: The prompts encoded at a time.
        most_in_memory: The GiB that are kept in memory; None for all.
    """

    def __init__(self, flow: FlowPipeline, batch_size: int = 16, most_in_memory: float | None = None) -> None:
        self.flow, self.batch_size, self.most_in_memory = flow, batch_size, most_in_memory
        self.index: dict[str, int] = {}
        self.stored: dict[str, RowStore] = {}
        self._numbers = itertools.count()

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
                kept = self.stored.setdefault(name, RowStore())
                for row in value.to("cpu"):
                    kept.append(row)
            self._spill()
            self.index |= {prompt: len(self.index) + i for i, prompt in enumerate(batch)}
        for module in self.flow.text_encoders():
            module.to("cpu")

    def _spill(self) -> None:
        """Write what is in memory to disk once it is more than it may be; the file goes with this cache."""
        if self.most_in_memory is None:
            return
        if sum(rows.bytes_in_memory for rows in self.stored.values()) > self.most_in_memory * GIB:
            for rows in self.stored.values():
                if rows.in_memory:
                    rows.spill(Path(self._folder.name, str(next(self._numbers))))

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="flowrl-prompts-")

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
