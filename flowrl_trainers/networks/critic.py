"""Critics of noisy states, for AC-Flow.

A critic is called as `critic(latents, sigma, prompt_features, prompt_mask)` and returns one value per image (B,). An
untrained critic returns exactly zero, the right value for centred rewards.
"""

from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .value_network import masked_mean, time_features

SMALLEST_SIDE = 2
DEEPEST = 4


class _Judge(nn.Module):
    """Maps features of the latent, the noise level and the prompt to one number.

    Args:
        latent_features: The number of features of the latent.
        prompt_dim: The width of the prompt's features.
        width: The width of the hidden layers.
    """

    def __init__(self, latent_features: int, prompt_dim: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Sequential(nn.LayerNorm(prompt_dim), nn.Linear(prompt_dim, width))
        self.time = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.latent = nn.Linear(latent_features, width)
        first = nn.Linear(3 * width, width)
        self.layers = nn.Sequential(nn.LayerNorm(3 * width), first, nn.SiLU(), nn.LayerNorm(width))
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """The values (B,) of noisy states.

        Args:
            features: The features (B, latent_features) of the latents.
            sigma: The noise levels (B,).
            prompt_features: (B, L, D).
            prompt_mask: (B, L), True where there is a token.
        """
        parts = [
            self.latent(features),
            self.time(time_features(sigma)),
            self.prompt(masked_mean(prompt_features, prompt_mask)),
        ]
        return self.out(self.hidden(self.layers(torch.cat(parts, dim=1)))).squeeze(1)


class ConvCritic(ModelMixin, ConfigMixin):
    """For spatial latents (B, C, h, w): at most four convolutions of stride 2 with group norm, then a mean and an MLP.

    The prompt scales and shifts the input of these convolutions, so that the critic can look for what was asked.

    Args:
        channels: The channels C of the latents.
        height: Their height h.
        width: Their width w.
        prompt_dim: The width of the prompt's features.
        features: The channels of the first convolution; deeper ones have two and four times as many.
    """

    @register_to_config
    def __init__(self, channels: int, height: int, width: int, prompt_dim: int, features: int = 64) -> None:
        super().__init__()
        side, levels = min(height, width), 0
        while side > SMALLEST_SIDE and levels < DEEPEST:
            side, levels = (side + 1) // 2, levels + 1
        self.prompt = nn.Sequential(nn.LayerNorm(prompt_dim), nn.Linear(prompt_dim, 2 * features))
        self.first = nn.Conv2d(channels, features, 3, padding=1)
        widths = [features * 2 ** min(level, 2) for level in range(levels + 1)]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in pairwise(widths)
        )
        self.judge = _Judge(widths[-1], prompt_dim, 128)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """The values (B,) of noisy states.

        Args:
            latents: (B, C, h, w) float32.
            sigma: The noise levels (B,).
            prompt_features: (B, L, D).
            prompt_mask: (B, L), True where there is a token.
        """
        scale, shift = self.prompt(masked_mean(prompt_features, prompt_mask))[:, :, None, None].chunk(2, dim=1)
        x = nn.functional.silu(self.first(latents) * (1 + scale) + shift)
        for block in self.blocks:
            x = block(x)
        return self.judge(x.mean(dim=(2, 3)), sigma, prompt_features, prompt_mask)


class MLPCritic(ModelMixin, ConfigMixin):
    """For latents that are vectors (B, d): an MLP.

    Args:
        dim: The length d of the vectors.
        prompt_dim: The width of the prompt's features.
        width: The width of the hidden layers.
    """

    @register_to_config
    def __init__(self, dim: int, prompt_dim: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.judge = _Judge(width, prompt_dim, width)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """The values (B,) of noisy states.

        Args:
            latents: (B, d) float32.
            sigma: The noise levels (B,).
            prompt_features: (B, L, D).
            prompt_mask: (B, L), True where there is a token.
        """
        features = self.layers(torch.cat([latents, time_features(sigma)], dim=1))
        return self.judge(features, sigma, prompt_features, prompt_mask)


def critic(latent_shape: torch.Size, prompt_dim: int) -> ConvCritic | MLPCritic:
    """The critic for latents of the shape (C, h, w) or (d,); the prompt's features have the width `prompt_dim`."""
    if len(latent_shape) == 3:
        return ConvCritic(*latent_shape, prompt_dim=prompt_dim)
    return MLPCritic(latent_shape.numel(), prompt_dim)
