"""Chroma.

A FLUX.1 without embedded guidance and without CLIP. Latents are `(B, 16, h, w)`, packed into tokens of 2 x 2 for the
network, which takes sigma and predicts the velocity. The stock pipeline hands its mask of the prompt to attention as
numbers, which attention adds to its scores: padding weighs less than words but is not hidden
(huggingface/diffusers#13619). The same is done here.
"""

from typing import Any, ClassVar

from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import JOINT_ATTENTION, rounded_sigma
from .packed_pipeline import PackedFlowPipeline


class ChromaFlowPipeline(PackedFlowPipeline):
    """`ChromaPipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = JOINT_ATTENTION
    default_settings: ClassVar[Settings] = {"guidance_scale": 5.0, "negative_prompt": "", "max_sequence_length": 512}

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        embeds, _, mask, *_ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.text_encoders()[0].device,
            max_sequence_length=self.settings["max_sequence_length"],
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if self.transformer.gradient_checkpointing:
            # Its single blocks would run without the mask (diffusers 0.42), in training but not in sampling.
            raise ValueError(
                "`activation_checkpointing` is True, with which diffusers drops Chroma's attention mask: set it to "
                "False."
            )
        # Position ids and mask, too, come from private methods of the pipeline.
        pipe, dtype = self.pipeline, transformer.dtype
        count, _, height, width = latents.shape
        embeds, mask = conditioning["prompt_embeds"].to(dtype), conditioning["prompt_embeds_mask"].to(dtype)
        packed = transformer(
            hidden_states=self._packed(latents).to(dtype),
            timestep=rounded_sigma(sigma, dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, dtype),
            attention_mask=pipe._prepare_attention_mask(count, (height // 2) * (width // 2), dtype, mask),
            return_dict=False,
        )[0]
        return self._unpacked(packed.float())
