"""SiT, which draws classes instead of prompts.

A prompt is the name of a class, or its number as a string. Latents are `(B, 4, h, w)`, the network takes `1000 sigma`
as its timestep and predicts the velocity: `SiTTransformer2DModel` converts the time and the sign of the original code.
Guidance is `v_null + scale (v - v_null)` on all channels for a scale above 1, where null is the label that stands for
no class; the original sampler guides the first three channels only.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import ATTENTION, DiffusersFlowPipeline


class SiTFlowPipeline(DiffusersFlowPipeline):
    """`SiTPipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = ATTENTION
    features_need_network: ClassVar[bool] = True
    default_settings: ClassVar[Settings] = {"guidance_scale": 4.0}
    task = None  # the Hub has no tag for pictures of classes
    example_prompt = "0"

    def _check_settings(self) -> None:
        # The size alone: there is no text and hence no `max_sequence_length`.
        self.pipeline.check_size(self.settings["height"], self.settings["width"])

    def loader(self) -> tuple[str, str]:
        return "flowrl_trainers.sit", "SiTPipeline"

    def default_size(self) -> int:
        return self.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        if negative:
            null = self.transformer.config.num_classes
            return {"class_labels": torch.full((len(prompts),), null, device=self.device)}
        return {"class_labels": self.pipeline.class_labels(prompts)}

    @torch.no_grad()
    def prompt_features(self, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """The embedding of the class, as the only token."""
        labels = conditioning["class_labels"][:, None]
        return self.transformer.class_embedder(labels).float(), torch.ones_like(labels, dtype=torch.bool)

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        labels = conditioning["class_labels"]
        return transformer(latents.to(transformer.dtype), 1000 * sigma, labels, return_dict=False)[0].float()
