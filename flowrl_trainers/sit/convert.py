"""Converts checkpoints of SiT's original code (github.com/willisma/SiT) to a `SiTPipeline`.

The tensors do not show how the model was trained. The conversion assumes what holds for the published models: the
linear path, velocity prediction, and a last row of the class embedding that stands for no class. It refuses tensors of
other codes that have the same names but another layout.
"""

import argparse
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .pipeline import SiTPipeline
from .transformer import SiTTransformer2DModel

Tensors = dict[str, Tensor]

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by the width D of the official sizes S, B, L and XL; the tensors show only the width."""

VAE = "stabilityai/sd-vae-ft-mse"
"""The autoencoder with which the original code samples."""

# Original names and the names in `SiTTransformer2DModel`; `_renamed` treats qkv and the final modulation separately.
MODEL_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_embedder.linear_1",
    "t_embedder.mlp.2": "time_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
BLOCK_NAMES = {
    "attn.proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}


def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    vae: str | Path = VAE,
    class_names: list[str] | None = None,
    num_attention_heads: int | None = None,
) -> SiTPipeline:
    """Write a checkpoint of the original code as the folder of a `SiTPipeline`, and return the pipeline.

    Args:
        checkpoint: A `.safetensors` or `.pt` file, as for `load_transformer`.
        out: The folder to write.
        vae: A folder or Hub id of the autoencoder.
        class_names: One name per class, in the order of their numbers. None: classes have no names.
        num_attention_heads: The attention heads, as for `load_transformer`.

    Raises:
        ValueError: If the checkpoint cannot be converted, or the autoencoder or the names do not fit it.
    """
    transformer = load_transformer(checkpoint, num_attention_heads)
    classes = transformer.config.num_classes
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"`class_names` has {len(class_names)} names, but {str(checkpoint)!r} has {classes} classes: name each."
        )
    try:
        autoencoder = AutoencoderKL.from_pretrained(vae)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"The autoencoder {str(vae)!r} cannot be loaded: pass a folder or a Hub id that holds an AutoencoderKL."
        ) from error
    if autoencoder.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"The autoencoder {str(vae)!r} has latents of {autoencoder.config.latent_channels} channels, but the "
            f"checkpoint reads {transformer.config.in_channels}: pass the one that it was trained with."
        )
    names = dict(enumerate(class_names)) if class_names is not None else None
    pipeline = SiTPipeline(transformer, autoencoder, FlowMatchEulerDiscreteScheduler(shift=1.0), names)
    pipeline.save_pretrained(out)
    return pipeline


def load_transformer(checkpoint: str | Path, num_attention_heads: int | None = None) -> SiTTransformer2DModel:
    """The network of a checkpoint of the original code, in float32 and evaluation mode.

    checkpoint: a `.safetensors` file, or a `.pt` file of tensors. The file holds a state dict, or what training saved:
    then the moving average "ema" is taken, or "model" if there is none. num_attention_heads: needed only if the width
    is not that of an official size. Raises `ValueError` if the file is missing, holds more than tensors, or does not
    have SiT's layout.
    """
    tensors, refusal = _read(Path(checkpoint)), f"{str(checkpoint)!r} is not a checkpoint of SiT"
    try:
        config = _config(tensors, num_attention_heads)
        renamed = _renamed(tensors, config)
    except KeyError as error:
        raise ValueError(f"{refusal}: it has no tensor {error}.") from error
    model = SiTTransformer2DModel(**config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, value in renamed.items():
        if name not in expected:
            raise ValueError(f"{refusal}: it has a tensor {name!r}, which SiT does not have.")
        if tuple(value.shape) != expected[name]:
            raise ValueError(
                f"{refusal}: the tensor for {name!r} is {tuple(value.shape)} where SiT has {expected[name]}."
            )
    model.load_state_dict(renamed)
    return model.eval()


def _read(path: Path) -> Tensors:
    """The tensors of a file by their original names, float32. Nothing in the file is executed."""
    if not path.is_file():
        raise ValueError(f"The checkpoint {str(path)!r} is no file: pass a `.pt` or `.safetensors` file.")
    stored: Any
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            # Training saves its arguments beside the tensors, as a plain record.
            with torch.serialization.safe_globals([argparse.Namespace]):
                stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} is no file of tensors alone, and reading what else is in it could run code, so it is "
            "refused: if you trust it, load it in the code that wrote it and save its tensors, "
            "`torch.save(model.state_dict(), path)`."
        ) from error
    except Exception as error:  # a damaged file can make an unpickler raise any exception
        raise ValueError(f"The checkpoint {str(path)!r} is damaged or no file of tensors ({error}).") from error
    if isinstance(stored, dict):
        stored = stored.get("ema", stored.get("model", stored))
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"{str(path)!r} is not a checkpoint of SiT: it holds no dictionary of tensors.")
    return {name: value.float() for name, value in stored.items()}


def _config(tensors: Tensors, num_attention_heads: int | None) -> dict[str, int]:
    """The configuration that follows from the shapes of the tensors. Raises `KeyError` for a missing tensor."""
    patches = tensors["x_embedder.proj.weight"]
    if patches.dim() != 4:
        raise ValueError(
            f"The checkpoint is not of SiT: 'x_embedder.proj.weight' is {tuple(patches.shape)}, but SiT "
            "has a convolution."
        )
    dim, in_channels, patch_size, _ = patches.shape
    heads = num_attention_heads or HEADS.get(dim)
    if heads is None or dim % heads:
        raise ValueError(
            f"`num_attention_heads` is {num_attention_heads}, but a network of width {dim} needs a divisor of it: "
            "pass the number of heads that the model was trained with; its tensors do not show it."
        )
    return {
        "sample_size": patch_size * math.isqrt(tensors["pos_embed"].shape[1]),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "mlp_dim": len(tensors["blocks.0.mlp.fc1.weight"]),
        "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
    }


def _renamed(tensors: Tensors, config: dict[str, int]) -> Tensors:
    """The tensors under the names of `SiTTransformer2DModel`; tensors without a counterpart keep their names."""
    tensors, renamed = dict(tensors), {}
    renamed["pos_embed.pos_embed"] = tensors.pop("pos_embed")
    renamed["class_embedder.weight"] = tensors.pop("y_embedder.embedding_table.weight")
    for kind in ("weight", "bias"):
        for i in range(config["num_layers"]):
            qkv = tensors.pop(f"blocks.{i}.attn.qkv.{kind}")
            for name, part in zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True):
                renamed[f"transformer_blocks.{i}.attn.{name}.{kind}"] = part
            for old, new in BLOCK_NAMES.items():
                renamed[f"transformer_blocks.{i}.{new}.{kind}"] = tensors.pop(f"blocks.{i}.{old}.{kind}")
        for old, new in MODEL_NAMES.items():
            renamed[f"{new}.{kind}"] = tensors.pop(f"{old}.{kind}")
        # The original modulates by (shift, scale), the layer of diffusers by (scale, shift).
        shift, scale = renamed[f"norm_out.linear.{kind}"].chunk(2)
        renamed[f"norm_out.linear.{kind}"] = torch.cat([scale, shift])
        renamed[f"proj_out.{kind}"] = _without_learned_sigma(renamed[f"proj_out.{kind}"], config)
    return renamed | tensors


def _without_learned_sigma(rows: Tensor, config: dict[str, int]) -> Tensor:
    """The rows (p p C, ...) of the output layer that predict the velocity.

    Models with `learn_sigma` have 2 C channels per pixel, and nothing reads the second half.
    """
    pixels = config["patch_size"] ** 2
    if len(rows) != 2 * pixels * config["in_channels"]:
        return rows
    return rows.unflatten(0, (pixels, -1))[:, : config["in_channels"]].flatten(0, 1)
