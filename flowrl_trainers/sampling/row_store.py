"""`RowStore`: a long list of tensors, in memory or on disk."""

from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch import Tensor

from .progress import without_bars_of_datasets

FEATURES = Features({"data": Value("large_binary"), "shape": List(Value("int64")), "dtype": Value("string")})


class RowStore:
    """Tensors on the CPU by their number; equal neighbours, such as one negative prompt for all, are kept once.

    What `spill` writes is an Arrow file, of which the rows that are asked for are read.
    """

    def __init__(self) -> None:
        self.places: list[int] = []  # where the tensor of each row is, among those on disk and then those in memory
        self.in_memory: list[Tensor] = []
        self.on_disk: Dataset | None = None
        self.last: Tensor | None = None

    def append(self, row: Tensor) -> None:
        """Keep a tensor as the next row."""
        if self.last is None or not torch.equal(row, self.last):
            self.last = row.clone()
            self.in_memory.append(self.last)
        self.places.append(self._count_on_disk + len(self.in_memory) - 1)

    def __getitem__(self, row: int) -> Tensor:
        place = self.places[row]
        if place >= self._count_on_disk:
            return self.in_memory[place - self._count_on_disk]
        assert self.on_disk is not None
        found = self.on_disk[place]
        dtype = getattr(torch, found["dtype"])
        return torch.frombuffer(bytearray(found["data"]), dtype=dtype).reshape(found["shape"])

    @property
    def _count_on_disk(self) -> int:
        return 0 if self.on_disk is None else len(self.on_disk)

    @property
    def bytes_in_memory(self) -> int:
        """Those of the tensors that are not on disk."""
        return sum(row.nbytes for row in self.in_memory)

    def spill(self, folder: Path) -> None:
        """Move the tensors in memory into a folder that is new for every call."""
        columns = {
            "data": [row.contiguous().flatten().view(torch.uint8).numpy().tobytes() for row in self.in_memory],
            "shape": [list(row.shape) for row in self.in_memory],
            "dtype": [str(row.dtype).removeprefix("torch.") for row in self.in_memory],
        }
        with without_bars_of_datasets():
            Dataset.from_dict(columns, features=FEATURES).save_to_disk(folder)
            written = Dataset.load_from_disk(folder)  # mapped from the file, not read
        self.on_disk = written if self.on_disk is None else concatenate_datasets([self.on_disk, written])
        self.in_memory = []
