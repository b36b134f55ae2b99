"""`KeptTensors`: what frozen networks computed, kept on disk for the next run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

NOTHING: Mapping[str, Tensor] = {}


class KeptTensors:
    """Tensors that are computed once, in whatever run they are asked for.

    They are known by all that they follow from: facts, the tensors they were computed from, and the machine. They are
    kept among the assets of `huggingface_hub`, below `HF_ASSETS_CACHE`; delete the folder to be rid of them.

    Args:
        name: Of their folder.
        facts: What all of them follow from, plain types alone.
    """

    def __init__(self, name: str, facts: dict[str, Any]) -> None:
        self.facts = facts | {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        self.folder = cached_assets_path("flowrl_trainers", name)

    def get(
        self,
        compute: Callable[[], dict[str, Tensor]],
        device: torch.device,
        facts: dict[str, Any],
        tensors: Mapping[str, Tensor] = NOTHING,
    ) -> dict[str, Tensor]:
        """What `compute` returned when it was called with the same facts and tensors; else what it returns, kept.

        Args:
            compute: Called where nothing is kept.
            device: Where it computes.
            facts: What these tensors follow from beside the facts of all.
            tensors: Those they are computed from, by name.

        Returns:
            Tensors by name: those of `compute` as they are, those that were kept on the CPU.
        """
        file = self.folder / f"{self._key(device, facts, tensors)}.safetensors"
        if file.exists():
            try:
                return load_file(file)
            except (SafetensorError, OSError):
                pass  # a damaged file is written again
        found = compute()
        _write(found, file)
        return found

    def _key(self, device: torch.device, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        key = hashlib.sha256(json.dumps([self.facts, facts, place], sort_keys=True).encode())
        for name, tensor in tensors.items():
            key.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            key.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return key.hexdigest()


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    """Under another name first, so that no other process reads half a file."""
    handle, name = tempfile.mkstemp(dir=file.parent)
    os.close(handle)
    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, name)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
