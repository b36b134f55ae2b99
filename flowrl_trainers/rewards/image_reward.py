"""ImageReward on the BLIP of transformers; `flowrl convert_image_reward` makes the checkpoint."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipPreTrainedModel,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .aesthetic import linear_layers
from .base import Reward
from .loading import load_model, load_tokenizer
from .preprocessing import resize_and_crop

FOLDER = "image-reward"
"""The default folder of the converter and of the reward."""

TOKENS = 35
"""The length to which prompts are cut or padded."""

RAW_MEAN, RAW_STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of raw scores, from the official code."""


class ImageRewardModel(BlipPreTrainedModel):
    """BLIP's image encoder, its text encoder with cross attention to the picture, and a head on the first token.

    The head is LAION's linear layers over the first token's state.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        assert isinstance(vision, BlipVisionConfig)
        assert isinstance(text, BlipTextConfig)
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.layers = linear_layers(text.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Raw scores (B,), before RAW_MEAN and RAW_STD.

        Args:
            pixel_values: Normalised pictures (B, 3, S, S).
            input_ids: The tokens of the prompts (B, N).
            attention_mask: (B, N), 0 at padding.
        """
        picture = self.vision_model(pixel_values).last_hidden_state
        text = self.text_encoder(input_ids, attention_mask, encoder_hidden_states=picture).last_hidden_state
        return self.layers(text[:, 0])[:, 0]


class ImageReward(Reward):
    """ImageReward v1.0 (arXiv 2304.05977): a BLIP that learned how people rank pictures of one prompt.

    score = (w · h + b - 0.167) / 1.033, where h is the text encoder's state of [CLS] after reading prompt and picture

    Unverified: the published weights were not available, so no score has been compared with the official code's.

    Differentiable. Unbounded, mostly -2 to 2; the constants are the official ones. Fooled by pictures that crowd in
    or repeat everything that the prompt names, by saturated colours and by invented detail. Pictures are resized to
    the model's size (shorter side, bicubic with antialiasing), cropped at the centre and normalised in torch. Prompts
    are cut to 35 tokens.

    Args:
        checkpoint: A folder that `flowrl convert_image_reward` wrote from the official `ImageReward.pt`, or a
            repository of the Hub with the same files.
        tokenizer: A folder or a repository of the Hub with the tokenizer of bert-base-uncased.
        revision: Branch, tag or commit of the checkpoint on the Hub.
        tokenizer_revision: Branch, tag or commit of the tokenizer on the Hub.
        dtype: The precision of the weights.

    Raises:
        ValueError: If the checkpoint or the tokenizer cannot be loaded.
    """

    name = "image_reward"
    differentiable = True

    def __init__(
        self,
        checkpoint: str | Path = FOLDER,
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        *,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        files = "config.json and model.safetensors as `flowrl convert_image_reward` writes them"
        self.model = load_model(ImageRewardModel, checkpoint, revision, dtype, files)
        # The official tokenizer adds [DEC] and [ENC]. No prompt is encoded with them, so they are left out here.
        self.tokenizer = load_tokenizer(tokenizer, tokenizer_revision)
        self.mean = torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]
        self.std = torch.tensor(OPENAI_CLIP_STD)[:, None, None]

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        pixels = (resize_and_crop(images, self.model.config.vision_config.image_size) - self.mean) / self.std
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        tokens = tokens.to(images.device)
        raw = self.model(pixels.to(self.model.dtype), tokens.input_ids, tokens.attention_mask)
        return (raw.to(images.dtype) - RAW_MEAN) / RAW_STD
