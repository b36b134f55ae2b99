"""Sana.

Latents are `(B, 32, h, w)`, not packed. The network takes `1000 sigma` times its `timestep_scale` and predicts the
velocity. The checkpoints ship with a DPM-Solver on flow sigmas; here the Euler sampler takes its place, with the
solver's shift.
"""

import inspect
import logging
from typing import Any, ClassVar

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import ATTENTION, DiffusersFlowPipeline

logger = logging.getLogger(__name__)

# The stock pipeline puts this before every prompt by default.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaFlowPipeline(DiffusersFlowPipeline):
    """`SanaPipeline` as a velocity field, without its resolution binning: pictures have the size that is asked for."""

    lora_target_modules: ClassVar[list[str]] = ATTENTION
    repeated_blocks: ClassVar[list[str]] = ["SanaTransformerBlock"]
    default_settings: ClassVar[Settings] = {"guidance_scale": 4.5, "negative_prompt": "", "max_sequence_length": 300}

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        if isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
            shift = pipeline.scheduler.config.flow_shift
            logger.warning(
                "Sana's DPM-Solver is replaced by the Euler sampler of flow matching with its shift, %g.", shift
            )

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        if isinstance(self.pipeline.scheduler, DPMSolverMultistepScheduler):
            return FlowMatchEulerDiscreteScheduler(shift=self.pipeline.scheduler.config.flow_shift)
        return super().scheduler()

    def call_arguments(self) -> dict[str, Any]:
        return super().call_arguments() | {"use_resolution_binning": False}

    def scheduler_code(self, renoises: bool) -> str | None:
        if not isinstance(self.pipeline.scheduler, DPMSolverMultistepScheduler):
            return super().scheduler_code(renoises)
        stochastic = ", stochastic_sampling=True" if renoises else ""
        made = f"FlowMatchEulerDiscreteScheduler(shift={self.scheduler().shift:g}{stochastic})"
        return f"from diffusers import FlowMatchEulerDiscreteScheduler\n\npipe.scheduler = {made}"

    def default_size(self) -> int:
        return self.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def pixels_per_token(self) -> int:
        return 32

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        device, length = self.text_encoders()[0].device, self.settings["max_sequence_length"]
        embeds, mask, negative_embeds, negative_mask = self.pipeline.encode_prompt(
            prompts,
            negative,
            negative_prompt=prompts if negative else "",
            device=device,
            max_sequence_length=length,
            complex_human_instruction=INSTRUCTION,
        )
        if negative:
            embeds, mask = negative_embeds, negative_mask
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def _spacing(self, num_inference_steps: int) -> None:
        return None

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype, config = transformer.dtype, self.transformer.config
        out = transformer(
            latents.to(dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(dtype),
            encoder_attention_mask=conditioning["prompt_embeds_mask"].to(dtype),
            timestep=1000 * sigma * config.timestep_scale,
            return_dict=False,
        )[0].float()
        # Some checkpoints also predict a variance, which flow matching does not use.
        return out.chunk(2, dim=1)[0] if config.out_channels == 2 * config.in_channels else out

    def decode(self, latents: Tensor) -> Tensor:
        return self._decoded(latents / self.pipeline.vae.config.scaling_factor)
