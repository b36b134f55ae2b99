"""Stable Diffusion 3 and 3.5.

Latents are `(B, 16, h, w)`, the transformer takes `1000 sigma` as its timestep and predicts the velocity, guidance is
`v_negative + scale (v - v_negative)` for a scale above 1. Without T5, the stock pipeline appends `max_sequence_length`
zero tokens.
"""

from typing import Any, ClassVar

from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import JOINT_ATTENTION, DiffusersFlowPipeline


class StableDiffusion3FlowPipeline(DiffusersFlowPipeline):
    """`StableDiffusion3Pipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = JOINT_ATTENTION
    repeated_blocks: ClassVar[list[str]] = ["JointTransformerBlock", "SD3SingleTransformerBlock"]
    default_settings: ClassVar[Settings] = {"guidance_scale": 7.0, "negative_prompt": "", "max_sequence_length": 256}

    def pixels_per_token(self) -> int:
        return self.pipeline.vae_scale_factor * self.pipeline.patch_size

    def largest_size(self) -> int:
        return self.transformer.config.pos_embed_max_size * self.pixels_per_token()

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.text_encoders()[0].device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.settings["max_sequence_length"],
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _spacing(self, num_inference_steps: int) -> None:
        return None

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = transformer.dtype
        return transformer(
            hidden_states=latents.to(dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0].float()
