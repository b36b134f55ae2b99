"""Networks that judge a noisy state: the critic of AC-Flow.

Called as `critic(latents, sigma, prompt_features, prompt_mask)`, they return one value per image (B,) and start from exactly zero, which is
the right value for centred rewards. latents: (B, ...) float32. sigma: (B,). prompt_features: (B, L, D). prompt_mask: (B, L).
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
    """From features of the latent, noise level and prompt to one number."""

    def __init__(self, latent_features: int, prompt_dim: int, width: int) -> None:
        super().__init__()
        self.prompt = nn.Sequential(nn.LayerNorm(prompt_dim), nn.Linear(prompt_dim, width))
        self.time = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.latent = nn.Linear(latent_features, width)
        self.layers = nn.Sequential(
            nn.LayerNorm(3 * width), nn.Linear(3 * width, width), nn.SiLU(), nn.LayerNorm(width)
        )
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        parts = [
            self.latent(features),
            self.time(time_features(sigma)),
            self.prompt(masked_mean(prompt_features, prompt_mask)),
        ]
        return self.out(self.hidden(self.layers(torch.cat(parts, dim=1)))).squeeze(1)


class ConvCritic(ModelMixin, ConfigMixin):
    """For spatial latents (B, C, h, w): convolutions of stride 2 with group norm, at most four, a mean over places, and an MLP.

    The prompt modulates what the convolutions see, so that the critic can look for what was asked.
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
        """See the module."""
        scale, shift = self.prompt(masked_mean(prompt_features, prompt_mask))[:, :, None, None].chunk(2, dim=1)
        x = nn.functional.silu(self.first(latents) * (1 + scale) + shift)
        for block in self.blocks:
            x = block(x)
        return self.judge(x.mean(dim=(2, 3)), sigma, prompt_features, prompt_mask)


class MLPCritic(ModelMixin, ConfigMixin):
    """For latents that are vectors (B, d)."""

    @register_to_config
    def __init__(self, dim: int, prompt_dim: int, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.judge = _Judge(width, prompt_dim, width)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """See the module."""
        features = self.layers(torch.cat([latents, time_features(sigma)], dim=1))
        return self.judge(features, sigma, prompt_features, prompt_mask)


def critic(latent_shape: torch.Size, prompt_dim: int) -> ConvCritic | MLPCritic:
    """The critic that follows the latents (C, h, w) or (d,); prompt_dim: the width of the prompt's features."""
    if len(latent_shape) == 3:
        return ConvCritic(*latent_shape, prompt_dim=prompt_dim)
    return MLPCritic(latent_shape.numel(), prompt_dim)
