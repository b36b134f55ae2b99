"""`MovingAverage`: the average of the trained weights, which is evaluated and saved in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel
from torch import nn

from ..sampling.sharding import own_part


class MovingAverage:
    """diffusers' `EMAModel` of parameters that come to exist later, or nothing where no average is asked for.

    Args:
        decay: Of the average; None for none.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.parameters: list[nn.Parameter] = []
        self.average: EMAModel | None = None
        self._in_place = False

    def start(self, parameters: list[nn.Parameter]) -> None:
        """Average these from now on."""
        self.parameters = parameters
        self.average = None if self.decay is None else EMAModel(parameters, decay=self.decay)

    def step(self) -> None:
        """Take in the parameters after one more update."""
        if self.average is not None:
            self.average.step(self.parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters are the average, where one is kept; one inside another changes nothing."""
        if self.average is None or self._in_place:
            yield
            return
        self._in_place = True
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)
            self._in_place = False

    def state_dict(self) -> dict[str, Any] | None:
        """That of `EMAModel`, with this process's part of averages that are sharded; None without an average."""
        if self.average is None:
            return None
        state = self.average.state_dict()
        return state | {"shadow_params": [own_part(average) for average in state["shadow_params"]]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state_dict` returned."""
        if self.average is not None and state is not None:
            averages = self.average.shadow_params
            self.average.load_state_dict(state)
            for average, saved in zip(averages, self.average.shadow_params, strict=True):
                own_part(average).copy_(saved)
            self.average.shadow_params = averages
