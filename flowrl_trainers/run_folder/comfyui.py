"""The adapter of a run as ComfyUI's loader reads it.

ComfyUI maps diffusers' names of layers to its own in some families (`comfy/lora.py`: Stable Diffusion 3, FLUX.1,
FLUX.2, Chroma, AuraFlow, Qwen-Image, Z-Image), but it does not read the metadata in which diffusers keeps alpha: it
takes alpha from a tensor beside each layer, and without one it applies the adapter as if alpha were the rank.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

PREFIX = "transformer."
_PROJECTION = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out"
_LAYERS = re.compile(
    r"((joint_|single_)?transformer_blocks\.\d+\."
    rf"(attn2?\.({_PROJECTION}|to_qkv_mlp_proj|to_out)|norm(1|1_context)?\.linear|(img|txt)_mod\.1|proj_(mlp|out)"
    r"|(ff|ff_context|img_mlp|txt_mlp)\.(net\.0\.proj|net\.2|linear_(1|2|in|out)|out_projection)))"
    rf"|((layers|context_refiner|noise_refiner)\.\d+\.(attention\.({_PROJECTION})|feed_forward\.w[123]"
    r"|adaLN_modulation\.0))"
)
"""The layers that ComfyUI knows under diffusers' names, of all these families together."""


def comfyui_adapter(file: Path) -> dict[str, Tensor]:
    """The tensors of an adapter that diffusers saved, with an alpha beside each layer.

    ComfyUI adds `alpha / rank * B A` to a weight, where peft adds `scale * B A` with a scale of `lora_alpha / rank`,
    or with `use_rslora` of `lora_alpha / sqrt(rank)`: so alpha is `scale * rank`.

    Args:
        file: `pytorch_lora_weights.safetensors` with the metadata of `FlowPipeline.save_lora`.

    Raises:
        ValueError: For a file that cannot be read, an adapter that is no plain LoRA, and a layer that ComfyUI does not
            know.
    """
    tensors, metadata = _read(file)
    config = {name.removeprefix(PREFIX): value for name, value in metadata.items()}
    alphas: dict[str, Tensor] = {}
    for key, value in tensors.items():
        layer, _, part = key.removeprefix(PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{file} holds {key!r}, but ComfyUI is given plain LoRAs alone, without DoRA or biases: load this one "
                "with diffusers, as its card says."
            )
        if not _LAYERS.fullmatch(layer):
            raise ValueError(
                f"{file} adapts {layer!r}, which ComfyUI does not know under that name: load the adapter with "
                "diffusers, as its card says."
            )
        if part == "A.weight":
            rank, patterns = len(value), config["alpha_pattern"]
            alpha = float(patterns.get(get_pattern_key(patterns, layer), config["lora_alpha"]))
            alphas[f"{PREFIX}{layer}.alpha"] = torch.tensor(alpha * rank**0.5 if config["use_rslora"] else alpha)
    return tensors | alphas


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter and the fields of its `LoraConfig`."""
    try:
        with safe_open(file, "pt") as opened:
            return (
                {key: opened.get_tensor(key) for key in opened.keys()},  # noqa: SIM118  # it is no dictionary
                json.loads(opened.metadata()["lora_adapter_metadata"]),
            )
    except (OSError, SafetensorError, KeyError, TypeError) as error:  # TypeError: there is no metadata
        raise ValueError(f"{file} is no adapter of a run ({error!r}): name the `output_dir` of a run.") from error
