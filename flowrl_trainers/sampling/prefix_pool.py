"""`PrefixPool`: the states that open the controlled window, drawn once and used again."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .draws import ImageKey

MEMORY = 2 * 2**30  # bytes of states that one process keeps in memory; a larger pool goes to a file


class PrefixPool:
    """The states of the frozen base model at one noise level, one for every (prompt, noise) pair of a pool.

    A pair is an `ImageKey` whatever its rollout. Pairs are drawn in fixed batches of neighbours, as soon as one of a
    batch is asked for. So a state depends, to the last bit, on the seed, the pool and the size of the batches alone:
    not on when it is drawn nor in which process, and a resumed run, which starts with an empty pool, draws it again.

    Args:
        keys: Of the pairs, in the order of the pool.
        batch_size: How many neighbours are drawn together.
        draw: Draws the states (B, ...) of B pairs.
        memory: The bytes up to which states are kept in memory; those of a larger pool are kept in a file in the
            folder for temporary files, which is deleted with the pool.
    """

    def __init__(
        self,
        keys: Sequence[ImageKey],
        batch_size: int,
        draw: Callable[[list[ImageKey]], Tensor],
        memory: int = MEMORY,
    ) -> None:
        self.keys, self.batch_size, self.draw, self.memory = list(keys), batch_size, draw, memory
        self._slots = {replace(key, rollout=0): slot for slot, key in enumerate(self.keys)}
        self._drawn: set[int] = set()  # numbers of batches
        self._states: Tensor | None = None  # (P, ...) float32, on the CPU

    def states(self, keys: Sequence[ImageKey], device: torch.device) -> Tensor:
        """The states (B, ...) of B pairs, drawn where they are not known yet."""
        slots = [self._slots[replace(key, rollout=0)] for key in keys]
        for batch in sorted({slot // self.batch_size for slot in slots} - self._drawn):
            start = batch * self.batch_size
            found = self.draw(self.keys[start : start + self.batch_size])
            if self._states is None:
                self._states = _room((len(self.keys), *found.shape[1:]), self.memory)
            self._states[start : start + len(found)] = found.cpu()
            self._drawn.add(batch)
        assert self._states is not None
        return self._states[slots].to(device)


def _room(shape: Sequence[int], memory: int) -> Tensor:
    """A float32 tensor on the CPU: in memory, or mapped from a file where it takes more bytes than `memory`."""
    count = torch.Size(shape).numel()
    if 4 * count <= memory:
        return torch.empty(*shape)
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * count)  # else a full disk would kill the process later
        except OSError as error:
            raise ValueError(
                f"`prefix_pool_size` ({shape[0]}) takes {4 * count / 2**30:.1f} GiB in {tempfile.gettempdir()}, which "
                f"has no room for it ({error.strerror}): take a smaller pool, or set TMPDIR to a folder on a larger "
                "disk."
            ) from error
        return torch.from_file(file.name, shared=True, size=count).view(*shape)  # stays mapped without its name
