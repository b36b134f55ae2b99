"""The LAION aesthetic predictor: how much people would like a picture, whatever it shows."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .base import Reward
from .loading import load_model, load_normalisation
from .preprocessing import resize_and_crop


def linear_layers(width: int) -> torch.nn.Sequential:
    """LAION's five linear layers without activations between them, (B, width) to (B, 1)."""
    return torch.nn.Sequential(
        torch.nn.Linear(width, 1024),
        torch.nn.Dropout(0.2),  # does nothing at inference, but gives the next layer its number in the checkpoint
        torch.nn.Linear(1024, 128),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(128, 64),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 16),
        torch.nn.Linear(16, 1),
    )


class AestheticPredictor(CLIPVisionModelWithProjection):
    """A CLIP vision tower and LAION's linear layers, under the names of the checkpoint."""

    config_class = CLIPVisionConfig

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.layers = linear_layers(config.projection_dim)
        self.post_init()


class AestheticReward(Reward):
    """LAION's improved aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE): people's mean opinion, from 1 to 10.

    score = w · e + b, where e is the embedding of a CLIP ViT-L/14, scaled to unit length

    Differentiable. Pictures of diffusion models mostly score 4.5 to 7; nothing clips the score, so it can exceed 10.
    It ignores the prompt, so a model that is trained on it alone stops following prompts. Fooled by painterly
    textures, soft light and portraits. Pictures are resized, cropped at the centre and normalised in torch.

    Args:
        checkpoint: A folder or a repository of the Hub with the vision tower, the linear layers and the image
            processor.
        revision: Branch, tag or commit on the Hub.
        dtype: The precision of the weights.

    Raises:
        ValueError: If the checkpoint cannot be loaded.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(
        self,
        checkpoint: str | Path = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = load_model(AestheticPredictor, checkpoint, revision, dtype)
        mean, std = load_normalisation(checkpoint, revision)
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        pixels = (resize_and_crop(images, self.model.config.image_size) - self.mean) / self.std
        embeddings = self.model(pixels.to(self.model.dtype)).image_embeds
        return self.model.layers(torch.nn.functional.normalize(embeddings, dim=-1))[:, 0].to(images.dtype)
