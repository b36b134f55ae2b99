"""Networks for the residual of a value gradient, for VGG-Flow: they map a state to a tensor of the same shape.

A network is called as `network(latents, sigma, prompt_features, prompt_mask)`. An untrained network returns almost
zero.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

# arXiv 2512.05116 uses a "scaled-down" U-Net of Stable Diffusion; these widths are those of its code.
WIDTHS = (64, 128, 256, 256)
SMALLEST_SIDE = 4
SMALL = 1e-3
# The fastest wave of the timestep embedding advances one radian per unit of the timestep. VGG-Flow takes a finite
# difference over 0.01 of sigma: with this factor the wave advances 0.2 radian over it, so the network looks smooth.
TIMESTEP_PER_SIGMA = 20.0


class ValueUNet(ModelMixin, ConfigMixin):
    """For spatial latents (B, C, h, w): a U-Net of diffusers with cross-attention to the prompt, one layer per block.

    It has at most four levels, and only as many as keep the smaller side at 4 or more in the deepest level.

    Args:
        channels: The channels C of the latents.
        height: Their height h.
        width: Their width w.
        prompt_dim: The width of the prompt's features.
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
        """The residuals, shaped like the latents.

        Args:
            latents: (B, C, h, w) float32.
            sigma: The noise levels (B,).
            prompt_features: (B, L, D).
            prompt_mask: (B, L), True where there is a token.
        """
        timestep = TIMESTEP_PER_SIGMA * sigma
        return self.unet(latents, timestep, prompt_features, encoder_attention_mask=prompt_mask).sample


class ValueMLP(ModelMixin, ConfigMixin):
    """For latents that are vectors (B, d): three hidden layers over latent, sigma and mean feature of the prompt.

    Args:
        dim: The length d of the vectors.
        prompt_dim: The width of the prompt's features.
        width: The width of the hidden layers.
    """

    @register_to_config
    def __init__(self, dim: int, prompt_dim: int, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim + 3 + prompt_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Linear(width, dim)
        _make_small(self.out)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_features: Tensor, prompt_mask: Tensor) -> Tensor:
        """The residuals, shaped like the latents.

        Args:
            latents: (B, d) float32.
            sigma: The noise levels (B,).
            prompt_features: (B, L, D).
            prompt_mask: (B, L), True where there is a token.
        """
        inputs = [latents, time_features(sigma), masked_mean(prompt_features, prompt_mask)]
        return self.out(self.layers(torch.cat(inputs, dim=1)))


def value_network(latent_shape: torch.Size, prompt_dim: int) -> ValueUNet | ValueMLP:
    """The network for latents of the shape (C, h, w) or (d,); the prompt's features have the width `prompt_dim`."""
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
    """Scale the weights down and zero the bias, which would otherwise dominate the output."""
    with torch.no_grad():
        layer.weight.mul_(SMALL)
        if layer.bias is not None:
            layer.bias.zero_()
