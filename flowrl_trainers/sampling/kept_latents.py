"""`KeptLatents`: what the base model drew for an evaluation, kept on disk for the next run."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor

from ..pipelines import Conditioning
from .evaluator import Sampler
from .flow_model import FlowModel


class KeptLatents:
    """A sampler of the frozen base model that draws each batch once, in whatever run it is asked for.

    A batch is known by all that its latents follow from: the numbers it starts from (noise, conditioning, state of the
    generators), and the facts of the model, the sampler and the machine. It is kept among the assets of
    `huggingface_hub`, below `HF_ASSETS_CACHE`; delete the folder to be rid of it.

    Args:
        sampler: Draws.
        facts: Of the model, the sampler and the precision, plain types alone.
    """

    def __init__(self, sampler: Sampler, facts: dict[str, Any]) -> None:
        self.sampler = sampler
        self.facts = facts | {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
        self.folder = cached_assets_path("flowrl_trainers", "base_latents")

    def __call__(
        self, model: FlowModel, latents: Tensor, conditioning: Conditioning, generators: list[Generator]
    ) -> Tensor:
        """See `Sampler`."""
        file = self.folder / f"{self._key(latents, conditioning, generators)}.safetensors"
        if file.exists():
            try:
                return load_file(file)["latents"].to(latents.device)
            except (SafetensorError, KeyError, OSError):
                pass  # a damaged file is written again
        found = self.sampler(model, latents, conditioning, generators)
        _write(found, file)
        return found

    def _key(self, latents: Tensor, conditioning: Conditioning, generators: list[Generator]) -> str:
        place = torch.cuda.get_device_name(latents.device) if latents.is_cuda else "cpu"
        key = hashlib.sha256(json.dumps(self.facts | {"device": place}, sort_keys=True).encode())
        states = {f"generator {number}": g.get_state() for number, g in enumerate(generators)}
        for name, tensor in ({"latents": latents} | conditioning | states).items():
            key.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            key.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return key.hexdigest()


def _write(latents: Tensor, file: Path) -> None:
    """Under another name first, so that no other process reads half a file."""
    handle, name = tempfile.mkstemp(dir=file.parent)
    os.close(handle)
    try:
        save_file({"latents": latents.contiguous().cpu()}, name)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
