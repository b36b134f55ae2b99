"""`LaggedWeights`: an earlier policy, kept as tensors beside the trained parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..sampling.sharding import own_part


class LaggedWeights:
    """The weights of the old policy, which follow the trained ones and can take their place.

    There is no second adapter and no second model: inside `standing_in` the parameters and the old weights exchange
    their storage, which costs neither memory nor time. Of sharded parameters, this process's parts exchange their
    values, as FSDP gathers from a storage of its own.

    Args:
        parameters: The trained parameters, by name; the old weights start as their copies.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.values = {name: own_part(parameter.detach()).clone() for name, parameter in parameters.items()}
        self._exchanged = False

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """`old <- decay old + (1 - decay) present`, each factor of a LoRA for itself; 0 is an exact copy."""
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(own_part(parameter.detach()), 1 - decay)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, the parameters hold the old weights.

        Nothing that is computed inside may be differentiated after leaving it. Autocast keeps the 16-bit copy of a
        parameter until its outermost region ends, and would go on with the weights of before: the copies are dropped.
        """
        if self._exchanged:
            raise RuntimeError("The old weights already stand in: leave the first `standing_in()` before the next.")
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            part = own_part(parameter)
            if part is parameter:
                parameter.data, self.values[name] = self.values[name], parameter.data
            else:
                present = part.clone()
                part.copy_(self.values[name])
                self.values[name].copy_(present)
        self._exchanged = not self._exchanged
        torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Tensor]:
        """The old weights, by name."""
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        for name, value in self.values.items():
            value.copy_(state[name])
