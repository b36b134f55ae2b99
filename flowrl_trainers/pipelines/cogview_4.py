"""CogView4.

Latents are `(B, 16, h, w)`, not packed. The network predicts the velocity; its time is not the noise level but
`1000 u`, where u is the level before the scheduler's shift.

The stock pipeline pads prompts on the left, and no attention masks the padding: the picture of a prompt depends on the
longest prompt of the batch. Here each prompt is encoded by itself, and the network reads prompts of one length at a
time: pictures are those of the stock pipeline called with one prompt.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import ATTENTION, DiffusersFlowPipeline, pad_prompts


class CogView4FlowPipeline(DiffusersFlowPipeline):
    """`CogView4Pipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = ATTENTION
    repeated_blocks: ClassVar[list[str]] = ["CogView4TransformerBlock"]
    last_layer_varies: ClassVar[bool] = True
    default_settings: ClassVar[Settings] = {"guidance_scale": 5.0, "negative_prompt": "", "max_sequence_length": 1024}

    def most_tokens(self) -> int:
        return 1024

    def default_size(self) -> int:
        return self.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        device, length = self.text_encoders()[0].device, self.settings["max_sequence_length"]
        encoded = []
        for prompt in prompts:
            embeds, _ = self.pipeline.encode_prompt(
                [prompt], do_classifier_free_guidance=False, device=device, max_sequence_length=length
            )
            encoded.append(embeds[0])
        return pad_prompts(encoded)

    def _spacing(self, num_inference_steps: int) -> list[float]:
        return (np.linspace(1000, 1, num_inference_steps).astype(int) / 1000).tolist()

    def _mu(self, num_inference_steps: int) -> float:
        config = self.pipeline.scheduler.config
        height, width = self.size_in_tokens()
        return calculate_shift(height * width, config.base_image_seq_len, config.base_shift, config.max_shift)

    def unshifted(self, sigma: Tensor) -> Tensor:
        """The u of levels `sigma = f u / (1 + (f - 1) u)`: every shift of the scheduler has this form."""
        config, f = self.pipeline.scheduler.config, self.pipeline.scheduler.shift
        if config.use_dynamic_shifting:
            mu = self._mu(0)  # here `_mu` depends on the size alone
            f = mu if config.time_shift_type == "linear" else math.exp(mu)
        return sigma / (sigma + f * (1 - sigma))

    def grid_arguments(self, levels: list[float]) -> dict[str, Any]:
        # The times of the network, whole numbers here, are arguments of their own: levels alone leave them uniform.
        return super().grid_arguments(levels) | {"timesteps": [round(1000 * level) for level in levels]}

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, mask = transformer.dtype, conditioning["prompt_embeds_mask"]
        embeds, timestep = conditioning["prompt_embeds"].to(dtype), 1000 * self.unshifted(sigma)
        size = embeds.new_tensor([[self.settings["height"], self.settings["width"]]])
        lengths, velocity = mask.sum(dim=1), torch.empty_like(latents, dtype=torch.float32)
        # Each length by itself: attention would add the network's mask to its scores, which does not hide padding.
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            sizes = size.expand(len(rows), 2)
            velocity[rows] = transformer(
                hidden_states=latents[rows].to(dtype),
                encoder_hidden_states=embeds[rows][mask[rows]].unflatten(0, (len(rows), length)),
                timestep=timestep[rows],
                original_size=sizes,
                target_size=sizes,
                crop_coords=torch.zeros_like(sizes),
                return_dict=False,
            )[0].float()
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        return self._decoded(latents / self.pipeline.vae.config.scaling_factor)
