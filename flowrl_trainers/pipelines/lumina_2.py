"""Lumina-Image 2.0.

Latents are `(B, 16, h, w)`, not packed. The network takes `1 - sigma` as its time and predicts minus the velocity. The
guided velocity is rescaled: every row of every channel has the norm of the conditional velocity's. The pipeline puts
an instruction before prompts, but not before negative prompts.
"""

from typing import Any, ClassVar

from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import ATTENTION, DiffusersFlowPipeline


class Lumina2FlowPipeline(DiffusersFlowPipeline):
    """`Lumina2Pipeline` as a velocity field; settings and defaults are those of its `__call__`.

    Every step is guided.
    """

    lora_target_modules: ClassVar[list[str]] = ATTENTION
    last_layer: ClassVar[str] = "norm_out"
    last_layer_varies: ClassVar[bool] = True
    repeated_blocks: ClassVar[list[str]] = ["Lumina2TransformerBlock"]
    default_settings: ClassVar[Settings] = {"guidance_scale": 4.0, "negative_prompt": "", "max_sequence_length": 256}

    def most_tokens(self) -> int:
        """The network has positions for one token more, which stands for the picture."""
        return self.transformer.config.axes_lens[0] - 1

    def _mu(self, num_inference_steps: int) -> float:
        config = self.scheduler().config
        # The stock pipeline passes the number of channels where the number of tokens is meant.
        tokens, lengths = self.transformer.config.in_channels, (config.base_image_seq_len, config.max_image_seq_len)
        return calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
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

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = transformer.dtype
        return -transformer(
            hidden_states=latents.to(dtype),
            timestep=1 - sigma,
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            return_dict=False,
        )[0].float()
