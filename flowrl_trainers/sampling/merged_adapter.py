"""`MergedAdapter`: an adapter that is added to the weights for a while, so that no path runs beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class MergedAdapter:
    """The weights of a network with its adapter added.

    The weights of the base are set aside, so that they come back to the last bit, which subtracting would not do. Both
    are in memory meanwhile.

    Args:
        network: With an adapter.
    """

    def __init__(self, network: nn.Module) -> None:
        self.layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self.base: list[list[Tensor]] | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the adapter is added to the weights."""
        self.base = self._weights()
        try:
            for layer in self.layers:
                layer.merge(safe_merge=True)  # into new tensors, where it would add in place
            yield
        finally:
            self._put(self.base, merged=False)
            self.base = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, the weights are the base's again, for what is computed with the adapter off."""
        if self.base is None:
            yield
            return
        merged = self._weights()
        self._put(self.base, merged=False)
        try:
            yield
        finally:
            self._put(merged, merged=True)

    def _weights(self) -> list[list[Tensor]]:
        return [[parameter.data for parameter in _own(layer)] for layer in self.layers]

    def _put(self, weights: list[list[Tensor]], *, merged: bool) -> None:
        for layer, tensors in zip(self.layers, weights, strict=True):
            for parameter, tensor in zip(_own(layer), tensors, strict=True):
                parameter.data = tensor
            layer.merged_adapters[:] = list(layer.active_adapters) if merged else []


def _own(layer: BaseTunerLayer) -> list[nn.Parameter]:
    return list(layer.get_base_layer().parameters(recurse=False))
