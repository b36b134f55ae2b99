"""Z-Image and Z-Image-Turbo.

Latents are `(B, 16, h, w)`. The network takes lists of latents and prompts and `1 - sigma` as its time, and predicts
minus the velocity. Guidance is `v + scale (v - v_negative)`: 0 is off, also for Turbo, which has no guidance. Prompts
are ragged.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import ATTENTION, DiffusersFlowPipeline, pad_prompts


class ZImageFlowPipeline(DiffusersFlowPipeline):
    """`ZImagePipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = ATTENTION
    last_layer: ClassVar[str] = "all_final_layer.2-1"
    last_layer_varies: ClassVar[bool] = True
    default_settings: ClassVar[Settings] = {"guidance_scale": 5.0, "negative_prompt": "", "max_sequence_length": 512}

    @property
    def guided(self) -> bool:
        return self.settings["guidance_scale"] > 0

    def default_size(self) -> int:
        return 1024

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
        return velocity + self.settings["guidance_scale"] * (velocity - negative)

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),  # a copy, because the pipeline writes into the list
            device=self.text_encoders()[0].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings["max_sequence_length"],
        )
        return pad_prompts(embeds)

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = transformer.dtype
        embeds, mask = conditioning["prompt_embeds"].to(dtype), conditioning["prompt_embeds_mask"]
        out = transformer(
            list(latents.to(dtype)[:, :, None].unbind(dim=0)),
            1 - sigma,
            [row[keep] for row, keep in zip(embeds, mask, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack([row.float() for row in out])[:, :, 0]
