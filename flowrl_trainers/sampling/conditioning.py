"""Prompts are encoded once, before training."""

import itertools
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..pipelines import Conditioning, FlowPipeline
from .kept_tensors import KeptTensors
from .progress import bar
from .row_store import RowStore

GIB = 2**30


class ConditioningCache:
    """What the network reads of every prompt of a run, in the memory of the host or on its disk.

    Args:
        flow: Encodes prompts.
        batch_size: The prompts encoded at a time.
        most_in_memory: The GiB that are kept in memory; None for all.
        facts: All that the encoded prompts follow from beside the prompts, plain types alone: batches that another run
            with the same facts encoded are read from the disk. None to encode all and keep nothing.
    """

    def __init__(
        self,
        flow: FlowPipeline,
        batch_size: int = 16,
        most_in_memory: float | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.flow, self.batch_size, self.most_in_memory = flow, batch_size, most_in_memory
        self.kept = None if facts is None else KeptTensors("encoded_prompts", facts)
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
        batches = [new[i : i + self.batch_size] for i in range(0, len(new), self.batch_size)]
        for batch in bar(batches, "Encoding prompts", show_progress):
            for name, value in self._encoded(batch, device).items():
                rows = self.stored.setdefault(name, RowStore())
                for row in value.to("cpu"):
                    rows.append(row)
            self.index |= {prompt: len(self.index) + i for i, prompt in enumerate(batch)}
            self._spill()  # which may fail, as on a full disk: what was encoded stays known
        for module in self.flow.text_encoders():
            module.to("cpu")

    def _encoded(self, batch: list[str], device: torch.device) -> Conditioning:
        """What the network reads of a batch of prompts, newly encoded or read; text encoders move where they must."""

        def encode() -> Conditioning:
            for module in self.flow.text_encoders():
                module.to(device)
            return self.flow.encode_prompts(batch)

        if self.kept is None:
            return encode()

        def rows() -> Conditioning:  # one where all are alike, as those of a negative prompt
            return {name: v[:1] if bool((v == v[:1]).all()) else v for name, v in encode().items()}

        found = self.kept.get(rows, device, facts={"prompts": batch})
        return {name: value.expand(len(batch), *value.shape[1:]) for name, value in found.items()}

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
    def _together(rows: list[Tensor]) -> Tensor:
        """Prompts that were encoded in different batches may be padded to different lengths; masks come with them."""
        if all(row.shape == rows[0].shape for row in rows):
            return torch.stack(rows)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
