"""AuraFlow.

Latents are `(B, 4, h, w)`, not packed. The network takes sigma and predicts the velocity. Embeddings of padding are
zero, and the network reads them like all others.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import JOINT_ATTENTION, DiffusersFlowPipeline


class AuraFlowFlowPipeline(DiffusersFlowPipeline):
    """`AuraFlowPipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = JOINT_ATTENTION
    repeated_blocks: ClassVar[list[str]] = ["AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"]
    default_settings: ClassVar[Settings] = {"guidance_scale": 3.5, "negative_prompt": "", "max_sequence_length": 256}

    def default_size(self) -> int:
        return 1024

    def largest_size(self) -> int:
        # The position embeddings of the network form a square.
        return math.isqrt(self.transformer.config.pos_embed_max_size) * self.pixels_per_token()

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.text_encoders()[0].device,
            max_sequence_length=self.settings["max_sequence_length"],
        )
        # The pipeline repeats the mask for every feature of a token, and flattens it.
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.reshape(embeds.shape)[..., 0].bool()}

    def _spacing(self, num_inference_steps: int) -> None:
        return None

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = transformer.dtype
        return transformer(
            latents.to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            timestep=sigma.to(dtype),
            return_dict=False,
        )[0].float()

    @property
    def decoder_overflows_in_float16(self) -> bool:
        return self.pipeline.vae.config.force_upcast

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if vae.dtype == torch.float16 and self.decoder_overflows_in_float16:
            vae.to(torch.float32)  # as the stock pipeline does, because float16 overflows
        return self._decoded(latents / vae.config.scaling_factor)
