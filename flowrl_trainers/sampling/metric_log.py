"""`MetricLog`: numbers that are noted during updates and logged as means."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor


class MetricLog:
    """Numbers noted since the last log, under their names; what is logged is the mean over all notes of all processes.

    Args:
        device: Where work is timed; that of a GPU is waited for.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 (a constant)
        self.device = device
        self.noted: dict[str, list[float]] = defaultdict(list)

    def note(self, name: str, value: float | Tensor) -> None:
        """Keep a number until the next log."""
        self.noted[name].append(float(value))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note how many seconds a phase took, as `seconds/PHASE`."""
        self._finish_device_work()
        start = time.perf_counter()
        yield
        self._finish_device_work()
        self.note(f"seconds/{phase}", time.perf_counter() - start)

    def _finish_device_work(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def means(self) -> dict[str, float]:
        """The mean of what all processes noted under each name; all of them must call this."""
        everywhere = gather_object([dict(self.noted)])  # one per process
        names = dict.fromkeys(name for part in everywhere for name in part)
        values = {name: [value for part in everywhere for value in part.get(name, [])] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def clear(self) -> None:
        """Forget all that was noted."""
        self.noted.clear()

    def state_dict(self) -> dict[str, list[float]]:
        """What was noted since the last log."""
        return {name: list(values) for name, values in self.noted.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on from what `state_dict` returned."""
        self.noted.clear()
        self.noted.update(state)
