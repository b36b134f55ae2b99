"""`Placement`: which networks are on the device in which phase of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..rewards import Reward
from .flow_model import FlowModel
from .sharding import is_sharded

CPU = torch.device("cpu")


class Placement:
    """Keeps the network that draws and learns and those that judge on the device, together or one after the other.

    Args:
        model: The network, its frozen copy and the decoders of its pipeline.
        device: Where all compute.
        apart: Whether the network leaves while pictures are decoded and scored, and decoders and rewards at all other
            times.
    """

    def __init__(self, model: FlowModel, device: torch.device, apart: bool) -> None:
        self.model, self.device, self.apart = model, device, apart
        self._network_is_away = False

    @property
    def of_judges(self) -> torch.device:
        """Where decoders and rewards are while the network draws and learns."""
        return CPU if self.apart else self.device

    @contextmanager
    def network_away(self) -> Iterator[None]:
        """Inside, the network leaves room on the device for others, where phases are kept apart."""
        if not self.apart or self._network_is_away:
            yield
            return
        # FSDP takes up the moved weights where the module moves that it was told to shard.
        network = self.model if is_sharded(self.model) else self.model.transformer
        networks = [network] if self.model.frozen is None else [network, self.model.frozen]
        try:
            self._network_is_away = True
            for network in networks:
                network.to(CPU)
            yield
        finally:
            self._network_is_away = False
            for network in networks:
                network.to(self.device)

    @contextmanager
    def judging(self, rewards: list[Reward]) -> Iterator[None]:
        """Inside, decoders and these rewards are on the device; without the network, where phases are kept apart."""
        if not self.apart:
            yield
            return
        judges: list[nn.Module | Reward] = [*self.model.flow.decoders(), *rewards]
        with self.network_away():
            try:
                for judge in judges:
                    judge.to(self.device)
                yield
            finally:
                for judge in judges:
                    judge.to(CPU)
