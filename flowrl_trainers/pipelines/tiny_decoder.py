"""`TinyDecoder`: a distilled autoencoder of a family's latents, for gradients that need little memory."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors import SafetensorError
from torch import Tensor

from .base import FlowPipeline

EXAMPLE = "such as 'madebyollin/taesd3' for Stable Diffusion 3"


class TinyDecoder:
    """Decodes latents as the stock pipeline does with an `AutoencoderTiny` in the place of its autoencoder.

    Args:
        source: The Hub id or folder of an `AutoencoderTiny`, or one that is loaded, of which a copy is taken.

    Raises:
        ValueError: For a source that holds none.
        TypeError: For an object that is none.
    """

    def __init__(self, source: str | Path | AutoencoderTiny) -> None:
        self.name = str(source) if isinstance(source, (str, Path)) else "an AutoencoderTiny of the user's"
        autoencoder = _loaded(source) if isinstance(source, (str, Path)) else copy.deepcopy(source)
        if not isinstance(autoencoder, AutoencoderTiny):
            raise TypeError(
                f"`reward_decoder` is a {type(source).__name__}: pass an `AutoencoderTiny` of diffusers, or its Hub "
                f"id or folder, {EXAMPLE}."
            )
        self.autoencoder = autoencoder.float().requires_grad_(False).eval()

    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32 and differentiable, nominally in [0, 1] and not clamped."""
        config = self.autoencoder.config
        scaled = latents / config.scaling_factor + config.shift_factor
        return self.autoencoder.decode(scaled, return_dict=False)[0] / 2 + 0.5

    @torch.no_grad()
    def check_fits(self, flow: FlowPipeline, latents: Tensor) -> None:
        """Check that it decodes the latents of a pipeline into pictures of the pipeline's size.

        Args:
            flow: Decodes them by its own autoencoder.
            latents: (1, C, h, w).

        Raises:
            ValueError: Naming what is different.
        """
        channels = self.autoencoder.config.latent_channels
        if latents.dim() != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"`reward_decoder` ({self.name}) decodes latents of {channels} channels, but those of this model have "
                f"the shape {tuple(latents.shape[1:])}: pass the `AutoencoderTiny` that was distilled for it."
            )
        ours, stock = (tuple(decode(latents).shape[2:]) for decode in (self, flow.decode))
        if ours != stock:
            raise ValueError(
                f"`reward_decoder` ({self.name}) makes pictures of {ours} pixels where the model's have {stock}: pass "
                "the `AutoencoderTiny` that was distilled for it."
            )


def _loaded(source: str | Path) -> AutoencoderTiny:
    try:
        kind = AutoencoderTiny.load_config(source).get("_class_name", "model without a `_class_name`")
        if kind == "AutoencoderTiny":
            return AutoencoderTiny.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"`reward_decoder` ({str(source)!r}) cannot be loaded: pass the Hub id or folder of an `AutoencoderTiny`, "
            f"{EXAMPLE}."
        ) from error
    raise ValueError(
        f"`reward_decoder` ({str(source)!r}) is a {kind}: pass the Hub id or folder of an `AutoencoderTiny`, "
        f"{EXAMPLE}."
    )
