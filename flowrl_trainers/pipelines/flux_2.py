"""FLUX.2: dev, and klein base and distilled.

Latents are `(B, 128, h, w)`: 2 x 2 latents of the autoencoder, normalised by the running statistics of its batch norm.
The network takes sigma and predicts the velocity. dev has its guidance embedded, klein base has a negative branch of
the empty prompt, klein distilled has no guidance. By default a LoRA leaves out the output layers of the single-stream
blocks.
"""

from typing import Any, ClassVar

from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor

from .base import Conditioning, Settings
from .diffusers_pipeline import rounded_sigma, without_guidance
from .packed_pipeline import PackedFlowPipeline
from .quantization import computing_dtype


class Flux2FlowPipeline(PackedFlowPipeline):
    """`Flux2Pipeline` (FLUX.2-dev) as a velocity field; settings and defaults are those of its `__call__`."""

    lora_target_modules: ClassVar[list[str]] = [
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj",
    ]  # fmt: skip
    default_settings: ClassVar[Settings] = {"guidance_scale": 4.0, "max_sequence_length": 512}
    embeds_guidance: ClassVar[bool] = True

    @property
    def guided(self) -> bool:
        return False

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        device, length = self.text_encoders()[0].device, self.settings["max_sequence_length"]
        embeds, _ = self.pipeline.encode_prompt(prompts, device=device, max_sequence_length=length)
        return {"prompt_embeds": embeds}

    def _mu(self, num_inference_steps: int) -> float:
        height, width = self.size_in_tokens()
        return compute_empirical_mu(height * width, num_inference_steps)

    def _packed(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents)

    def _unpacked(self, packed: Tensor) -> Tensor:
        return packed.transpose(1, 2).unflatten(2, self.size_in_tokens())

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # Position ids, too, come from private methods of the pipeline.
        pipe, dtype = self.pipeline, computing_dtype(transformer)
        embeds = conditioning["prompt_embeds"].to(dtype)
        guidance = latents.new_full((len(latents),), self.settings["guidance_scale"])
        packed = transformer(
            hidden_states=self._packed(latents).to(dtype),
            timestep=rounded_sigma(sigma, dtype),
            guidance=guidance if self.embeds_guidance else None,
            encoder_hidden_states=embeds,
            txt_ids=pipe._prepare_text_ids(embeds).to(latents.device),
            img_ids=pipe._prepare_latent_ids(latents).to(latents.device),
            return_dict=False,
        )[0]
        return self._unpacked(packed.float())

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (value.view(1, -1, 1, 1).to(latents) for value in (vae.bn.running_mean, vae.bn.running_var))
        unnormalised = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return self._decoded(self.pipeline._unpatchify_latents(unnormalised))


class Flux2KleinFlowPipeline(Flux2FlowPipeline):
    """`Flux2KleinPipeline` as a velocity field.

    The distilled checkpoints have no guidance; a scale above 1, which the stock pipeline ignores, is refused for them.
    """

    embeds_guidance: ClassVar[bool] = False

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        if pipeline.config.is_distilled:
            settings = without_guidance(settings, "a distilled model")
        super().__init__(pipeline, **settings)

    @property
    def guided(self) -> bool:
        return self.settings["guidance_scale"] > 1
