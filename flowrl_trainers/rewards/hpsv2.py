"""HPSv2.1, from its official checkpoint in the layout of open_clip."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .clip import CLIPReward
from .loading import find_file, load_tokenizer, model_of
from .preprocessing import resize_and_pad

WEIGHTS = "HPS_v2.1_compressed.pt"


def vit_h_14() -> CLIPConfig:
    """The architecture that open_clip calls ViT-H-14: 986 million parameters."""
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    vision |= {"patch_size": 14}
    shared = {"projection_dim": 1024, "hidden_act": "gelu"}
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=1024)


class HPSv2(CLIPReward):
    """Human Preference Score v2.1 (arXiv 2306.09341): a CLIP ViT-H/14 that learned which pictures people prefer.

    score = cos(picture, prompt): -1 to 1, mostly 0.2 to 0.35; its authors print 100 times as much

    Differentiable. Fooled by oversaturated, smooth, centred pictures; it tolerates wrong counts and places.

    Pictures keep their proportions: the longer side is resized to the model's size and the rest is black, as in
    `hpsv2.score`. That function antialiases from torchvision 0.17 on, but not before; this class always does.

    Args:
        checkpoint: A folder or a repository of the Hub with `HPS_v2.1_compressed.pt`.
        tokenizer: A folder or a repository of the Hub with the tokenizer of ViT-H-14.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        tokenizer_revision: Branch, tag or commit of the tokenizer on the Hub.
        dtype: The precision of the weights.
        distinct_prompts: Whether a prompt that a batch holds several times is encoded once: faster, and the same but
            for rounding.
        architecture: The architecture of the checkpoint. None: ViT-H-14, the only one that was released.

    Raises:
        ValueError: If the checkpoint or the tokenizer cannot be loaded, or the checkpoint has another architecture.
    """

    name = "hpsv2"

    def __init__(
        self,
        checkpoint: str | Path = "xswu/HPSv2",
        tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        distinct_prompts: bool = False,
        architecture: CLIPConfig | None = None,
    ) -> None:
        tensors = _read(find_file(checkpoint, WEIGHTS, revision))
        model = model_of(CLIPModel, architecture or vit_h_14(), from_open_clip(tensors), dtype, "HPSv2", WEIGHTS)
        read = load_tokenizer(tokenizer, tokenizer_revision)
        super().__init__(model, read, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, distinct_prompts=distinct_prompts)

    def pixels(self, images: Tensor) -> Tensor:
        """The input of the vision tower (B, 3, S, S) for images (B, 3, H, W), nominally in [0, 1]."""
        return (resize_and_pad(images, self.model.config.vision_config.image_size) - self.mean) / self.std


def from_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of open_clip's `CLIP` under the names and in the layout of transformers' `CLIPModel`.

    Attention: one matrix (3 D, D) for queries, keys and values becomes three. Projections: open_clip computes `x @ P`,
    and `nn.Linear` multiplies by the transpose of its weight, so the weight is P^T. Unknown tensors keep their names,
    so that `model_of` refuses them by name.
    """
    converted = {}
    for name, tensor in tensors.items():
        tower = "vision_model" if name.startswith("visual.") else "text_model"
        rest = name.removeprefix("visual.")
        if name in _TOP:
            converted[_TOP[name]] = tensor if name == "logit_scale" else tensor.T.contiguous()
        elif rest in _OUTSIDE_LAYERS:
            converted[f"{tower}.{_OUTSIDE_LAYERS[rest]}"] = tensor
        elif rest.startswith("transformer.resblocks."):
            converted |= _layer(tower, rest.removeprefix("transformer.resblocks."), tensor)
        else:
            converted[name] = tensor
    return converted


_TOP = {
    "logit_scale": "logit_scale",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_OUTSIDE_LAYERS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_IN_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def _layer(tower: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The renamed tensor of a layer, or three for queries, keys and values.

    Args:
        tower: `vision_model` or `text_model`.
        name: The number of the layer and the name inside it: `3.attn.in_proj_weight` or `3.ln_1.bias`.
        tensor: The tensor.
    """
    number, inside = name.split(".", 1)
    prefix = f"{tower}.encoder.layers.{number}"
    if inside.startswith("attn.in_proj_"):
        kind = inside.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{part}_proj.{kind}": t.clone() for part, t in parts}
    module, kind = inside.rsplit(".", 1)
    return {f"{prefix}.{_IN_LAYERS.get(module, module)}.{kind}": tensor}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # a damaged file can make an unpickler raise any exception
        raise ValueError(
            f"{str(path)!r} holds no `state_dict` of plain tensors: download {WEIGHTS} again from xswu/HPSv2."
        ) from error
