"""Of several processes, the one that fails says why to the others, which see no more than a broken connection."""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

KEY = "flowrl_trainers/error"
PATIENCE = timedelta(seconds=3)  # a process that failed says so before its connections close


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error is what torch raises where another process is gone."""
    signs = ("gloo", "NCCL", "Connection closed", "Connection reset")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(s in str(error) for s in signs)
    )


def tell_others(error: BaseException) -> None:
    """Leave an error of this process where the others look (`cause_elsewhere`)."""
    rank, first_line = dist.get_rank(), str(error).partition("\n")[0]
    try:
        _get_default_store().set(KEY, f"process {rank} failed ({type(error).__name__}: {first_line})")
    except RuntimeError:  # the process that keeps the store is gone, and has said why
        return


def cause_elsewhere() -> str:
    """What another process left before this one lost its connection to it."""
    store = _get_default_store()
    try:
        store.wait([KEY], PATIENCE)
        return store.get(KEY).decode()
    except RuntimeError:
        return "another process ended without a word, as one that is killed or runs out of memory does"
