"""FLUX.1, dev and schnell.

Latents are `(B, 16, h, w)`, packed into tokens of 2 x 2 for the network, which takes sigma and predicts the velocity.
dev has its guidance embedded: `guidance_scale` is an input of the network and costs nothing. schnell has no guidance.
`true_cfg_scale` above 1 adds a negative branch as the stock pipeline does.
"""

from typing import Any, ClassVar

from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import JOINT_ATTENTION, rounded_sigma, without_guidance
from .packed_pipeline import PackedFlowPipeline


class FluxFlowPipeline(PackedFlowPipeline):
    """`FluxPipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = JOINT_ATTENTION
    default_settings: ClassVar[Settings] = {
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
        "negative_prompt": "",
        "max_sequence_length": 512,
    }

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        if not pipeline.transformer.config.guidance_embeds:
            settings = without_guidance(settings, "this model, which has none embedded (as FLUX.1-schnell)")
        super().__init__(pipeline, **settings)

    @property
    def guided(self) -> bool:
        return self.settings["true_cfg_scale"] > 1

    def call_arguments(self) -> dict[str, Any]:
        unused = () if self.guided else ("true_cfg_scale", "negative_prompt")
        return {name: value for name, value in self.settings.items() if name not in unused}

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
        return negative + self.settings["true_cfg_scale"] * (velocity - negative)

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        device, length = self.text_encoders()[0].device, self.settings["max_sequence_length"]
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, prompts, device=device, max_sequence_length=length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # Position ids, too, come from a private method of the pipeline.
        pipe, dtype = self.pipeline, transformer.dtype
        count, _, height, width = latents.shape
        embeds = conditioning["prompt_embeds"].to(dtype)
        guidance = latents.new_full((count,), self.settings["guidance_scale"])
        packed = transformer(
            hidden_states=self._packed(latents).to(dtype),
            timestep=rounded_sigma(sigma, dtype),
            guidance=guidance if self.pipeline.transformer.config.guidance_embeds else None,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, dtype),
            return_dict=False,
        )[0]
        return self._unpacked(packed.float())
