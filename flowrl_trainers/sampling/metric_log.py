"""`MetricLog`: numbers that are noted during updates and logged as means."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor


class MetricLog:
    """Numbers noted since the last log, under their names; what is logged is the mean over all notes of all processes.

    Numbers on a GPU stay there until they are logged or saved, so that no note waits for it.

    Args:
        device: Where work is timed; that of a GPU is waited for.
    """

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 (a constant)
        self.device = device
        self._kept: dict[str, list[float | Tensor]] = defaultdict(list)
        self._maybe_unknown: set[str] = set()

    def note(self, name: str, value: float | Tensor, *, unless_nan: bool = False) -> None:
        """Keep a number until the next log.

        Args:
            name: Under which it is logged.
            value: A number, or a tensor that holds one.
            unless_nan: Whether NaN under this name says that there is no number, and is left out.
        """
        if unless_nan:
            self._maybe_unknown.add(name)
        # A copy, as the tensor may be changed in place before it is read.
        self._kept[name].append(value.detach().reshape(()).clone() if isinstance(value, Tensor) else float(value))

    @property
    def noted(self) -> dict[str, list[float]]:
        """The numbers since the last log; those on a GPU are fetched together."""
        tensors: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for value in (value for values in self._kept.values() for value in values):
            if isinstance(value, Tensor):
                tensors[value.dtype, value.device].append(value)
        fetched = {kind: iter(torch.stack(values).tolist()) for kind, values in tensors.items()}
        found: dict[str, list[float]] = {}
        for name, values in self._kept.items():
            numbers = [float(next(fetched[v.dtype, v.device])) if isinstance(v, Tensor) else v for v in values]
            known = [n for n in numbers if not (name in self._maybe_unknown and math.isnan(n))]
            if known:
                found[name] = known
        return found

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
        everywhere = gather_object([self.noted])  # one per process
        names = dict.fromkeys(name for part in everywhere for name in part)
        values = {name: [value for part in everywhere for value in part.get(name, [])] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def clear(self) -> None:
        """Forget all that was noted."""
        self._kept.clear()

    def state_dict(self) -> dict[str, list[float]]:
        """What was noted since the last log."""
        return self.noted

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on from what `state_dict` returned."""
        self._kept.clear()
        self._kept.update({name: list(values) for name, values in state.items()})
