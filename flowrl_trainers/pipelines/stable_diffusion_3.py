"""Stable Diffusion 3 and 3.5.

Latents are `(B, 16, h, w)`, the transformer takes `1000 sigma` as its timestep and predicts the velocity as it is, guidance is
`v_negative + scale (v - v_negative)` for a scale above 1. Without T5, the stock pipeline appends `max_sequence_length` zero tokens.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from peft import get_peft_model_state_dict
from torch import nn

from .base import Conditioning, FlowPipeline, Generators


class StableDiffusion3FlowPipeline(FlowPipeline):
    """`StableDiffusion3Pipeline` as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    ]  # fmt: skip
    default_settings: ClassVar[dict[str, Any]] = {
        "height": None,
        "width": None,
        "guidance_scale": 7.0,
        "negative_prompt": "",
        "max_sequence_length": 256,
    }

    def __init__(self, pipeline: StableDiffusion3Pipeline, **settings: Any) -> None:
        self.pipeline = pipeline
        default = pipeline.default_sample_size * pipeline.vae_scale_factor
        self.settings = self.default_settings | {"height": default, "width": default} | settings
        height, width, unit = self.settings["height"], self.settings["width"], pipeline.vae_scale_factor * pipeline.patch_size
        largest = pipeline.transformer.config.pos_embed_max_size * unit
        for name, size in (("height", height), ("width", width)):
            if size % unit or not 0 < size <= largest:
                raise ValueError(f"`{name}` ({size}) must be a multiple of {unit} pixels and at most {largest} for this model.")
        length = self.settings["max_sequence_length"]
        if not 0 < length <= 512:
            raise ValueError(f"`max_sequence_length` ({length}) must be between 1 and 512 tokens for Stable Diffusion 3.")

    @property
    def transformer(self) -> SD3Transformer2DModel:
        return self.pipeline.transformer

    @property
    def name(self) -> str | None:
        name = self.pipeline.config.get("_name_or_path")
        return name if name and not Path(name).exists() else None

    def call_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if value != ""}

    def text_encoders(self) -> list[nn.Module]:
        pipe = self.pipeline
        return [m for m in (pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3) if m is not None]

    def decoders(self) -> list[nn.Module]:
        return [self.pipeline.vae]

    @property
    def guided(self) -> bool:
        return self.settings["guidance_scale"] > 1

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            list(prompts),
            None,
            None,
            device=self.text_encoders()[0].device,
            do_classifier_free_guidance=self.guided,
            negative_prompt=[self.settings["negative_prompt"]] * len(prompts),
            max_sequence_length=self.settings["max_sequence_length"],
        )
        conditioning = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if self.guided:
            conditioning |= {"negative_prompt_embeds": negative_embeds, "negative_pooled_prompt_embeds": negative_pooled}
        return conditioning

    def prompt_features(self, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = conditioning["prompt_embeds"]
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)

    def initial_latents(self, batch_size: int, generator: Generators = None) -> torch.Tensor:
        channels, height, width = self.transformer.config.in_channels, self.settings["height"], self.settings["width"]
        return self.pipeline.prepare_latents(batch_size, channels, height, width, torch.float32, self.device, generator)

    def sigmas(self, num_inference_steps: int, spacing: Literal["pipeline", "uniform"] = "pipeline") -> torch.Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        config, unit = scheduler.config, self.pipeline.vae_scale_factor * self.pipeline.patch_size
        mu = None
        if config.use_dynamic_shifting:
            tokens = (self.settings["height"] // unit) * (self.settings["width"] // unit)
            mu = calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        match spacing:
            case "pipeline":
                scheduler.set_timesteps(num_inference_steps, mu=mu)
            case "uniform":
                uniform = torch.linspace(1, 0, num_inference_steps + 1)[:-1]
                scheduler.set_timesteps(sigmas=uniform.tolist(), mu=mu)
            case _:
                raise ValueError(f"`spacing` is {spacing!r}: choose 'pipeline' or 'uniform'.")
        return scheduler.sigmas.float()

    def velocity(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        conditioning: Conditioning,
        guidance: bool = True,
    ) -> torch.Tensor:
        v = self._branch(transformer, latents, sigma, conditioning, "")
        if guidance and self.guided:
            with torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad):
                negative = self._branch(transformer, latents, sigma, conditioning, "negative_")
            v = negative + self.settings["guidance_scale"] * (v - negative)
        return v

    @staticmethod
    def _branch(
        transformer: nn.Module, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, prefix: str
    ) -> torch.Tensor:
        dtype = next(transformer.parameters()).dtype
        return transformer(
            hidden_states=latents.to(dtype),
            timestep=1000 * sigma,
            encoder_hidden_states=conditioning[f"{prefix}prompt_embeds"].to(dtype),
            pooled_projections=conditioning[f"{prefix}pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0].float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5

    def save_lora(self, directory: str | Path) -> None:
        (name,) = self.transformer.active_adapters()
        config = self.transformer.peft_config[name].to_dict()
        type(self.pipeline).save_lora_weights(
            str(directory),
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=name),
            # Without it the loader takes lora_alpha = r.
            transformer_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v for k, v in config.items()},
        )

    def save_transformer(self, directory: str | Path) -> None:
        self.transformer.save_pretrained(directory)
