"""Tiny random checkpoints of the CLIP family, laid out as the published ones, and the pictures that they score."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from flowrl_trainers.shapes.models import new_tokenizer

SIZE, CONTEXT, WIDTH, VISION_WIDTH, JOINT = 28, 10, 32, 48, 24
LEVEL = 1 / 255
PROMPTS = [
    "a red circle",
    "a blue square and a green cross",
    "a circle that is red, large, round, lonely and much too long a story",
]
SIZES = [(28, 28), (50, 71), (71, 50), (64, 64), (20, 25)]  # as it is, landscape, portrait, square, too small


def waves(size: tuple[int, int], amplitude: float = 0.3) -> torch.Tensor:
    """Three pictures (3, 3, H, W) of waves, in whole levels of 255, within 0.5 ± amplitude."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    sines = [torch.sin(5 * (1 + c) * x + 7 * (1 + b) * y + b * c) for b in range(3) for c in range(3)]
    return ((0.5 + amplitude * torch.stack(sines).reshape(3, 3, *size)) * 255).round() / 255


def to_pillow(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for x in images]


def resized_by_pillow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow's bicubic kernel on floats, which it neither rounds nor clips."""
    channels = [
        Image.fromarray(c.numpy()).resize((width, height), Image.Resampling.BICUBIC) for x in images for c in x
    ]
    return torch.from_numpy(np.stack(channels)).reshape(len(images), 3, height, width)


def vision_settings(hidden_act: str) -> dict:
    return {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 7,
        "projection_dim": JOINT,
        "hidden_act": hidden_act,
    }


def clip_config(hidden_act: str = "quick_gelu") -> CLIPConfig:
    tokenizer = new_tokenizer()
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": JOINT,
        "hidden_act": hidden_act,
    }
    return CLIPConfig(text_config=text, vision_config=vision_settings(hidden_act), projection_dim=JOINT)


def write_processor(folder: Path) -> None:
    new_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
        folder
    )


def write_clip(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    CLIPModel(clip_config()).save_pretrained(folder)
    write_processor(folder)
    return folder


class Block(nn.Module):
    """One layer of open_clip's transformers, whose parameters carry open_clip's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, VISION_WIDTH, 7, stride=7, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(VISION_WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, VISION_WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(VISION_WIDTH), nn.LayerNorm(VISION_WIDTH)
        self.transformer = Transformer(VISION_WIDTH, heads=4, layers=3)
        self.proj = nn.Parameter(torch.randn(VISION_WIDTH, JOINT))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """open_clip's `CLIP`, by its published description: pre-norm transformers, GELU, causal text read at its end
    token.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.transformer = Transformer(WIDTH, heads=2, layers=2)
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, JOINT))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, tokens):
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection
