"""A tiny random checkpoint in ImageReward's official layout, and its official computation in plain torch functions."""

import math
import string
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertTokenizer, BlipConfig

Tensors = dict[str, torch.Tensor]

SIZE, HEADS = 28, 4
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ",",
    *string.ascii_lowercase,
    *(f"##{c}" for c in string.ascii_lowercase),
]


def tiny_blip() -> BlipConfig:
    """Different widths for picture and text, and as many heads in both."""
    vision = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": HEADS}
    vision |= {"image_size": SIZE, "patch_size": 7, "layer_norm_eps": 1e-6}
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text |= {
        "vocab_size": len(VOCABULARY) + 2,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
        "bos_token_id": None,
        "sep_token_id": 3,
    }
    return BlipConfig(vision_config=vision, text_config=text)


def write_tokenizer(folder: Path) -> None:
    """BERT's, whose pieces are letters."""
    BertTokenizer(vocab={piece: number for number, piece in enumerate(VOCABULARY)}).save_pretrained(folder)


def official_shapes(config: BlipConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of `ImageReward.pt`, by the official code: timm's names for the picture, BERT's for the text, what
    is unused too.
    """
    vision, text = config.vision_config, config.text_config
    d, m, patch, e, n = (
        vision.hidden_size,
        vision.intermediate_size,
        vision.patch_size,
        text.hidden_size,
        text.intermediate_size,
    )
    see, read = "blip.visual_encoder", "blip.text_encoder"
    modules: dict[str, tuple[int, ...]] = {  # with a bias as long as the first dimension
        f"{see}.patch_embed.proj": (d, 3, patch, patch),
        f"{see}.norm": (d,),
        f"{read}.embeddings.LayerNorm": (e,),
        "blip.vision_proj": (256, d),
        "blip.text_proj": (256, e),
    }
    for i in range(vision.num_hidden_layers):
        block = f"{see}.blocks.{i}"
        modules |= {f"{block}.norm1": (d,), f"{block}.attn.qkv": (3 * d, d), f"{block}.attn.proj": (d, d)}
        modules |= {f"{block}.norm2": (d,), f"{block}.mlp.fc1": (m, d), f"{block}.mlp.fc2": (d, m)}
    for i in range(text.num_hidden_layers):
        layer = f"{read}.encoder.layer.{i}"
        for attention, width in ((f"{layer}.attention", e), (f"{layer}.crossattention", d)):
            modules |= {
                f"{attention}.self.query": (e, e),
                f"{attention}.self.key": (e, width),
                f"{attention}.self.value": (e, width),
            }
            modules |= {f"{attention}.output.dense": (e, e), f"{attention}.output.LayerNorm": (e,)}
        modules |= {
            f"{layer}.intermediate.dense": (n, e),
            f"{layer}.output.dense": (e, n),
            f"{layer}.output.LayerNorm": (e,),
        }
    for number, (a, b) in zip((0, 2, 4, 6, 7), pairwise([e, 1024, 128, 64, 16, 1]), strict=True):
        modules[f"mlp.layers.{number}"] = (b, a)
    return {
        f"{see}.cls_token": (1, 1, d),
        f"{see}.pos_embed": (1, 1 + (vision.image_size // patch) ** 2, d),
        f"{read}.embeddings.position_ids": (1, text.max_position_embeddings),
        f"{read}.embeddings.word_embeddings.weight": (text.vocab_size, e),
        f"{read}.embeddings.position_embeddings.weight": (text.max_position_embeddings, e),
        **{
            f"{name}.{kind}": shape
            for name, shape in modules.items()
            for kind, shape in (("weight", shape), ("bias", shape[:1]))
        },
    }


def official_checkpoint() -> Tensors:
    """Random weights of `tiny_blip`; no bias is 0 and no norm is 1, which would hide that they were mixed up."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, shape in official_shapes(tiny_blip()).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1])[None]
        elif len(shape) == 1:
            tensors[name] = 0.3 * noise + (1 if name.endswith("weight") else 0)
        else:
            tensors[name] = 2 * noise / math.sqrt(math.prod(shape[1:]))
    return tensors


# ---- the official code: one picture, one prompt ---------------------------------------------------------------------


def official_score(t: Tensors, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Score () of one normalised picture (3, 28, 28) and the N tokens (N,) of its prompt, unpadded, so that nothing
    needs a mask.
    """
    x = read(t, ids, see(t, pixels))
    for number in (0, 2, 4, 6, 7):
        x = linear(t, f"mlp.layers.{number}", x)
    return (x[0] - 0.16717362830052426) / 1.0333394966054072


def see(t: Tensors, pixels: torch.Tensor) -> torch.Tensor:
    """(3, 28, 28) to (17, 48): 16 patches after a first state for all."""
    patches = pixels.unfold(1, 7, 7).unfold(2, 7, 7).permute(1, 2, 0, 3, 4).reshape(16, 147)
    kernel, bias = (t[f"blip.visual_encoder.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = (
        torch.cat([t["blip.visual_encoder.cls_token"][0], patches @ kernel.flatten(1).T + bias])
        + t["blip.visual_encoder.pos_embed"][0]
    )
    for i in range(3):
        block = f"blip.visual_encoder.blocks.{i}"
        q, k, v = linear(t, f"{block}.attn.qkv", norm(t, f"{block}.norm1", x, 1e-6)).chunk(3, dim=1)
        x = x + linear(t, f"{block}.attn.proj", attend(q, k, v))
        x = x + linear(
            t, f"{block}.mlp.fc2", F.gelu(linear(t, f"{block}.mlp.fc1", norm(t, f"{block}.norm2", x, 1e-6)))
        )
    return norm(t, "blip.visual_encoder.norm", x, 1e-6)


def read(t: Tensors, ids: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """N tokens and (17, 48) to (32,), the state of the first token."""
    words, places = (t[f"blip.text_encoder.embeddings.{part}_embeddings.weight"] for part in ("word", "position"))
    x = norm(t, "blip.text_encoder.embeddings.LayerNorm", words[ids] + places[: len(ids)], 1e-12)
    for i in range(2):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention in ("attention", "crossattention"):
            name, context = f"{layer}.{attention}", x if attention == "attention" else picture
            y = attend(
                *(
                    linear(t, f"{name}.self.{part}", s)
                    for part, s in (("query", x), ("key", context), ("value", context))
                )
            )
            x = norm(t, f"{name}.output.LayerNorm", x + linear(t, f"{name}.output.dense", y), 1e-12)
        y = linear(t, f"{layer}.output.dense", F.gelu(linear(t, f"{layer}.intermediate.dense", x)))
        x = norm(t, f"{layer}.output.LayerNorm", x + y, 1e-12)
    return x[0]


def linear(t: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def norm(t: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt() * t[
        f"{name}.weight"
    ] + t[f"{name}.bias"]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """(N, D) of queries, (M, D) of keys and values: (N, D)."""
    q, k, v = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (q, k, v))
    return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v).transpose(0, 1).flatten(1)
