"""Of several processes, the one that fails says why to the others, which see no more than a broken connection, or
nothing at all.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=3)  # a process that failed says so before its connections close
LOOK_EVERY = 2.0  # seconds
ALARMS = count()  # their numbers
GRACE = 20.0  # seconds in which a process may find out by itself, and keep what it has learned


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error is what torch raises where another process is gone."""
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(s in str(error) for s in signs)
    )


class Alarm:
    """What processes that run together know of each other's errors.

    Args:
        number: Of those that this process has made; the processes make them together, so that what one of them said in
            an earlier run is not heard in this one.
    """

    def __init__(self, number: int) -> None:
        self.key = f"flowrl_trainers/error/{number}"

    def ring(self, error: BaseException) -> None:
        """Leave an error of this process where the others look."""
        rank, first_line = dist.get_rank(), str(error).partition("\n")[0]
        try:
            _get_default_store().set(self.key, f"process {rank} failed ({type(error).__name__}: {first_line})")
        except RuntimeError:  # the process that keeps the store is gone, and has said why
            return

    def cause(self) -> str:
        """What another process left before this one lost its connection to it."""
        store = _get_default_store()
        try:
            store.wait([self.key], PATIENCE)
            return store.get(self.key).decode()
        except RuntimeError:
            return "another process ended without a word, as one that is killed or runs out of memory does"

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, this process ends within half a minute of another one's error, also where it waits for that one.

        NCCL waits for half an hour, and so does gloo for a process that failed but lives on, as in a notebook. A
        launcher that ends all processes with the first is sooner.
        """
        left = threading.Event()
        listener = threading.Thread(target=self._listen, args=(left,), daemon=True)
        listener.start()
        try:
            yield
        finally:
            left.set()
            listener.join()

    def _listen(self, left: threading.Event) -> None:
        """left: set where the process goes on without the others."""
        store = _get_default_store()
        while not left.wait(LOOK_EVERY):
            try:
                if not store.check([self.key]):
                    continue
            except RuntimeError:  # the process that keeps the store is gone
                pass
            if left.wait(GRACE):
                return
            logger.error(
                "Process %d ends, as %s, and it waits for that one in vain: look at what that process printed.",
                dist.get_rank(),
                self.cause(),
            )
            logging.shutdown()
            os._exit(1)  # the main thread is inside a collective, which nothing else ends
