"""Networks that map a state of a trajectory to a vector of its own shape: the residual of a value gradient.

All are called as `network(latents, sigma, prompt_features, prompt_mask)` and start from almost zero. latents: (B, ...) float32. sigma:
(B,). prompt_features: (B, L, D). prompt_mask: (B, L), True where there is a token. They return a tensor like latents.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

WIDTHS = (
    64,
    128,
    256,
    256,
)  # arXiv 2512.05116 calls it a scaled-down U-Net of Stable Diffusion; the widths are those of its code
SMALLEST_SIDE = 4
SMALL = 1e-3
# The embedding's fastest wave has one radian per unit of its timestep: a finite difference over 0.01 of sigma must see it as smooth.
TIMESTEP_PER_SIGMA = 20.0


class ValueUNet(ModelMixin, ConfigMixin):
    """For spatial latents (B, C, h, w): a U-Net of diffusers with cross-attention to the prompt, one layer per block.

    It has as many levels, at most four, as leave the smaller side of the latent at least 4 in the deepest one.
    """

    @register_to_config
    def __init__(self, channels: int, height: int, width: int, prompt_dim: int) -> None:
        super().__init__()
        levels = max(1, min(len(WIDTHS), int(math.log2(max(min(height, width), SMALLEST_SIDE) // SMALLEST_SIDE)) + 1))
        self.unet = UNet2DConditionModel(
            sample_size=(height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=WIDTHS[:levels],
            layers_per_block=1,
            down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
            cross_attention_dim=prompt_dim,
        )
        _make_small(self.unet.conv_out)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """See the module."""
        return self.unet(
            latents, TIMESTEP_PER_SIGMA * sigma, prompt_features, encoder_attention_mask=prompt_mask
        ).sample


class ValueMLP(ModelMixin, ConfigMixin):
    """For latents that are vectors (B, d): three hidden layers of 256, which read latent, sigma and the mean of the prompt's features."""

    @register_to_config
    def __init__(self, dim: int, prompt_dim: int, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 3 + prompt_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Linear(width, dim)
        _make_small(self.out)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """See the module."""
        return self.out(
            self.layers(torch.cat([latents, time_features(sigma), masked_mean(prompt_features, prompt_mask)], dim=1))
        )


def value_network(latent_shape: torch.Size, prompt_dim: int) -> ValueUNet | ValueMLP:
    """The network that follows the latents (C, h, w) or (d,); prompt_dim: the width of the prompt's features."""
    if len(latent_shape) == 3:
        return ValueUNet(*latent_shape, prompt_dim=prompt_dim)
    return ValueMLP(latent_shape.numel(), prompt_dim)


def time_features(sigma: Tensor) -> Tensor:
    """Smooth functions of sigma (B,): (B, 3)."""
    return torch.stack([sigma, torch.sin(math.pi * sigma), torch.cos(math.pi * sigma)], dim=1)


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, D) of the features (B, L, D) whose mask (B, L) is True."""
    weights = mask.to(features.dtype)[..., None]
    return (features * weights).sum(dim=1) / weights.sum(dim=1)


def _make_small(layer: nn.Conv2d | nn.Linear) -> None:
    """Scale the weights and zero the bias, which would otherwise be larger than what the weights leave."""
    with torch.no_grad():
        layer.weight.mul_(SMALL)
        if layer.bias is not None:
            layer.bias.zero_()
