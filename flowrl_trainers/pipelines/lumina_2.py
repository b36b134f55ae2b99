"""Lumina-Image 2.0.

Latents are `(B, 16, h, w)`, not packed. The network takes `1 - sigma` as its time and predicts minus the velocity. The guided velocity has,
in every row of every channel, the length of the unguided one. An instruction of the pipeline's precedes a prompt, but no negative prompt.
"""

from typing import Any, ClassVar

import torch
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift

from .base import Conditioning, Settings
from .diffusers_pipeline import ATTENTION, DiffusersFlowPipeline


class Lumina2FlowPipeline(DiffusersFlowPipeline):
    """`Lumina2Pipeline` as a velocity field; settings and defaults are those of its `__call__`, guidance is at every step."""

    lora_target_modules: ClassVar[list[str]] = ATTENTION
    default_settings: ClassVar[Settings] = {"guidance_scale": 4.0, "negative_prompt": "", "max_sequence_length": 256}

    def most_tokens(self) -> int:
        """The network has positions for one more, which is the picture's."""
        return self.transformer.config.axes_lens[0] - 1

    def _mu(self, num_inference_steps: int) -> float:
        config = self.scheduler().config
        # The stock pipeline takes the channels of its latents for the number of their tokens.
        tokens = self.transformer.config.in_channels
        return calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)

    def _guide(self, velocity: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        guided = super()._guide(velocity, negative)
        return guided * (velocity.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        embeds, mask, negative_embeds, negative_mask = self.pipeline.encode_prompt(
            prompts,
            negative,
            negative_prompt=prompts if negative else "",
            device=self.text_encoders()[0].device,
            max_sequence_length=self.settings["max_sequence_length"],
        )
        if negative:
            embeds, mask = negative_embeds, negative_mask
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def _branch(self, transformer: Any, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        dtype = transformer.dtype
        return -transformer(
            hidden_states=latents.to(dtype),
            timestep=1 - sigma,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            return_dict=False,
        )[0].float()
