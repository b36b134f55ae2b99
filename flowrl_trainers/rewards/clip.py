"""The agreement of a picture with its prompt under a CLIP of transformers."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from .base import Reward


class CLIPScore(Reward):
    """Cosine similarity of picture and prompt in a CLIP's embedding space: -1 to 1, differentiable.

    Pictures are resized (shorter side, bicubic with antialiasing), cropped at the centre and normalised as the checkpoint's
    preprocessor says, in torch, so that gradients reach the pixels. Prompts are cut to the tokenizer's length. Fooled by
    textures and by text drawn into the picture; it tolerates wrong counts and places.
    """

    name = "clip_score"
    differentiable = True

    def __init__(self, id_or_folder: str | Path, name: str | None = None) -> None:
        self.model = CLIPModel.from_pretrained(id_or_folder, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(id_or_folder)
        preprocessing, _ = CLIPImageProcessor.get_image_processor_dict(id_or_folder)
        self.mean = torch.tensor(preprocessing["image_mean"])[:, None, None]
        self.std = torch.tensor(preprocessing["image_std"])[:, None, None]
        self.name = name or self.name

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: torch.Tensor, prompts: list[str], **columns: Any) -> torch.Tensor:
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(images.device)
        out = self.model(tokens.input_ids, self.pixels(images), tokens.attention_mask)
        return (out.image_embeds * out.text_embeds).sum(dim=-1)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """What the vision tower reads of images (B, 3, H, W) in [0, 1]."""
        target = self.model.config.vision_config.image_size
        height, width = images.shape[-2:]
        if (height, width) != (target, target):
            scale = target / min(height, width)
            size = (max(target, round(height * scale)), max(target, round(width * scale)))
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
            top, left = (size[0] - target) // 2, (size[1] - target) // 2
            images = images[..., top : top + target, left : left + target]
        return (images - self.mean) / self.std
