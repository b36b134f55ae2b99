"""Converts the official checkpoint of ImageReward (github.com/THUDM/ImageReward) for the reward `image_reward`."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import BlipConfig

from .image_reward import FOLDER, ImageRewardModel
from .loading import model_of, read_tensors

WEIGHTS = "ImageReward.pt"

# Projections that only BLIP's pretraining needed, and position numbers, which are the integers 0 to 511.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")

# Parts of official names and what replaces them, in this order.
RENAMED = {
    "blip.visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "blip.visual_encoder.blocks.": "vision_model.encoder.layers.",
    "blip.visual_encoder.norm.": "vision_model.post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "blip.text_encoder.": "text_encoder.",
    "mlp.layers.": "layers.",
}


def blip_large() -> BlipConfig:
    """The architecture of ImageReward v1.0: ViT-L/16 at 224 pixels and BERT-base with cross attention.

    It has 446 million parameters. The values of layer_norm_eps are those of the official code. The defaults of
    transformers differ: 1e-5 for pictures, and 8 heads for text.
    """
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 224, "patch_size": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text |= {"vocab_size": 30524, "max_position_embeddings": 512}
    return BlipConfig(vision_config=vision | {"layer_norm_eps": 1e-6}, text_config=text | {"layer_norm_eps": 1e-12})


def convert_checkpoint(
    checkpoint: str | Path, out: str | Path = FOLDER, architecture: BlipConfig | None = None
) -> ImageRewardModel:
    """Write the official checkpoint as config.json and model.safetensors, in float32, and return the model.

    Args:
        checkpoint: The file `ImageReward.pt`; nothing in it is executed.
        out: The folder to write.
        architecture: The architecture of the checkpoint. None: ImageReward v1.0, the only one that was released.

    Raises:
        ValueError: If the file is missing, holds more than tensors, or has another architecture.
    """
    tensors = from_official(_read(Path(checkpoint)))
    model = model_of(ImageRewardModel, architecture or blip_large(), tensors, torch.float32, "ImageReward", WEIGHTS)
    model.save_pretrained(out)
    return model


def from_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of `ImageRewardModel`; their layouts are the same.

    Unknown tensors keep their names, so that `model_of` refuses them by name.
    """
    converted = {}
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            continue
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        converted[name] = tensor
    return converted


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"The checkpoint {str(path)!r} is no file: pass the {WEIGHTS} of THUDM/ImageReward on the Hugging Face "
            "Hub."
        )
    return read_tensors(path, f"download {WEIGHTS} again from THUDM/ImageReward")
