"""Rewards that compare a picture with its prompt in the embedding space of a CLIP: CLIP score and PickScore."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from .base import Reward
from .loading import load_model, load_normalisation, load_tokenizer
from .preprocessing import resize_and_crop


class CLIPReward(Reward):
    """The base class of rewards over a CLIP of transformers: the cosine of picture and prompt.

    Differentiable. Pictures are resized to the model's size (shorter side, bicubic with antialiasing), cropped at the
    centre and normalised, all in torch and without clipping. Prompts are cut to the model's context.

    Args:
        model: A frozen `CLIPModel`.
        tokenizer: The tokenizer of its prompts.
        mean: What is subtracted from red, green and blue of pixels in [0, 1].
        std: What red, green and blue are then divided by.
        distinct_prompts: Whether a prompt that a batch holds several times is encoded once: faster, and the same but
            for rounding.
    """

    differentiable = True

    def __init__(
        self, model: Any, tokenizer: Any, mean: list[float], std: list[float], *, distinct_prompts: bool = False
    ) -> None:
        self.model, self.tokenizer, self.distinct_prompts = model, tokenizer, distinct_prompts
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        return self.cosine(images, prompts)

    def cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarity of each image with its prompt: (B,), -1 to 1."""
        return (self.image_embeddings(images) * self.text_embeddings(prompts, images)).sum(dim=-1)

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of unit length, in the dtype of the images and not of the model."""
        out = self.model.get_image_features(self.pixels(images).to(self.model.dtype))
        return torch.nn.functional.normalize(out.pooler_output.to(images.dtype), dim=-1)

    def text_embeddings(self, prompts: list[str], images: Tensor) -> Tensor:
        """Embeddings (B, D) of unit length, in the dtype and on the device of the images."""
        length = self.model.config.text_config.max_position_embeddings
        asked = list(dict.fromkeys(prompts)) if self.distinct_prompts else list(prompts)
        tokens = self.tokenizer(asked, padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(images.device)
        out = self.model.get_text_features(tokens.input_ids, tokens.attention_mask)
        embeddings = torch.nn.functional.normalize(out.pooler_output.to(images.dtype), dim=-1)
        if len(asked) == len(prompts):
            return embeddings
        number = {prompt: i for i, prompt in enumerate(asked)}
        return embeddings[torch.tensor([number[prompt] for prompt in prompts], device=images.device)]

    def pixels(self, images: Tensor) -> Tensor:
        """The input of the vision tower (B, 3, S, S) for images (B, 3, H, W), nominally in [0, 1]."""
        return (resize_and_crop(images, self.model.config.vision_config.image_size) - self.mean) / self.std


class CLIPScore(CLIPReward):
    """Cosine similarity of picture and prompt in a CLIP's embedding space: -1 to 1. Differentiable.

    Under OpenAI's ViT-L/14, the default, a picture and its caption mostly score 0.2 to 0.35; others often report a
    CLIP score that is 100 or 2.5 times as large (arXiv 2104.08718). Fooled by textures and by text drawn into the
    picture; it tolerates wrong counts and places.

    Args:
        checkpoint: A folder or a repository of the Hub with a `CLIPModel`, its tokenizer and its image processor.
        name: The name of the reward in logs.
        revision: Branch, tag or commit on the Hub.
        dtype: The precision of the weights.
        distinct_prompts: Whether a prompt that a batch holds several times is encoded once: faster, and the same but
            for rounding.

    Raises:
        ValueError: If the checkpoint cannot be loaded.
    """

    name = "clip_score"

    def __init__(
        self,
        checkpoint: str | Path = "openai/clip-vit-large-patch14",
        name: str = "clip_score",
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        distinct_prompts: bool = False,
    ) -> None:
        model = load_model(CLIPModel, checkpoint, revision, dtype)
        tokenizer, normalisation = load_tokenizer(checkpoint, revision), load_normalisation(checkpoint, revision)
        super().__init__(model, tokenizer, *normalisation, distinct_prompts=distinct_prompts)
        self.name = name


class PickScore(CLIPReward):
    """PickScore (arXiv 2305.01569): a CLIP ViT-H/14 that learned which of two pictures people pick for a prompt.

    score = exp(logit_scale) cos(picture, prompt), where the checkpoint holds logit_scale

    Differentiable. exp(logit_scale) is about 100, so scores mostly lie between 15 and 26; only differences between
    pictures of one prompt mean something. Some projects divide by 26: a weight of 1/26 does the same. Fooled by
    saturated colours, centred glossy subjects and meaningless detail.

    Args:
        checkpoint: A folder or a repository of the Hub with a `CLIPModel`.
        processor: A folder or a repository of the Hub with the tokenizer and the image processor, which the official
            checkpoint lacks.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        processor_revision: Branch, tag or commit of the processor on the Hub.
        dtype: The precision of the weights.
        distinct_prompts: Whether a prompt that a batch holds several times is encoded once: faster, and the same but
            for rounding.

    Raises:
        ValueError: If the checkpoint or the processor cannot be loaded.
    """

    name = "pickscore"

    def __init__(
        self,
        checkpoint: str | Path = "yuvalkirstain/PickScore_v1",
        processor: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        revision: str | None = None,
        processor_revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        distinct_prompts: bool = False,
    ) -> None:
        model = load_model(CLIPModel, checkpoint, revision, dtype)
        tokenizer = load_tokenizer(processor, processor_revision)
        normalisation = load_normalisation(processor, processor_revision)
        super().__init__(model, tokenizer, *normalisation, distinct_prompts=distinct_prompts)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        return self.model.logit_scale.exp().to(images.dtype) * self.cosine(images, prompts)
