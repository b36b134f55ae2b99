"""FSDP2 on two processes without a GPU: accelerate's own path, which it takes on GPUs alone."""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from . import forked
from .runs import free_port

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip
"""What `accelerate launch` makes of the file of `--accelerate_config fsdp2`."""


def on_two_processes(
    function: Callable[..., Any], *arguments: Any, first_ended: Path | None = None, **environment: str
) -> list[subprocess.CompletedProcess]:
    """Call a function of a module in two processes with gloo, and wait for both.

    Args:
        function: See `forked.call`.
        arguments: Of it.
        first_ended: A file that is made when the first process has ended.
        environment: More variables.
    """
    shared = {k: v for k, v in os.environ.items() if k != "CI"} | environment | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip

    def call(rank: str) -> subprocess.CompletedProcess:
        ended = forked.call(function, *arguments, environment=shared | {"RANK": rank, "LOCAL_RANK": rank})
        if rank == "0" and first_ended is not None:
            first_ended.touch()
        return ended

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(call, ("0", "1")))


def pretend_gpus() -> None:
    """Let accelerate shard in this process, over gloo; to be called before it looks at the devices."""
    backend = ("gloo", DistributedType.MULTI_GPU)
    patch.object(PartialState, "_prepare_backend", lambda self, *arguments, **more: backend).start()
    patch.object(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu"))).start()
    patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True).start()
