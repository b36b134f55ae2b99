"""Qwen-Image.

Latents are `(B, 16, h, w)`, packed into tokens of 2 x 2 for the network, which takes sigma and predicts the velocity.
The guided velocity is rescaled: every token has the norm of the conditional velocity's. Prompts are ragged.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Conditioning, Generators, Settings
from .diffusers_pipeline import JOINT_ATTENTION, rounded_sigma
from .packed_pipeline import PackedFlowPipeline


class QwenImageFlowPipeline(PackedFlowPipeline):
    """`QwenImagePipeline` as a velocity field. `guidance_scale` is what its `__call__` names `true_cfg_scale`.

    The stock pipeline guides only if it gets a negative prompt; the default here is a space, which Qwen-Image's card
    advises.
    """

    lora_target_modules: ClassVar[list[str]] = JOINT_ATTENTION
    default_settings: ClassVar[Settings] = {"guidance_scale": 4.0, "negative_prompt": " ", "max_sequence_length": 512}

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        # Nothing reads the text output of the last block, and DDP would wait for its gradient.
        last = len(self.transformer.transformer_blocks) - 1
        self.lora_exclude_modules = [f"transformer_blocks.{last}.attn.to_add_out"]

    def most_tokens(self) -> int:
        return 1024

    def call_arguments(self) -> dict[str, Any]:
        arguments = super().call_arguments()
        # Without a negative prompt the stock pipeline does not guide, so an empty one is passed too.
        negative = {"negative_prompt": self.settings["negative_prompt"]} if self.guided else {}
        return arguments | {"true_cfg_scale": arguments.pop("guidance_scale")} | negative

    def _encode(self, prompts: list[str], negative: bool) -> Conditioning:
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.text_encoders()[0].device, max_sequence_length=self.settings["max_sequence_length"]
        )
        full = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": full if mask is None else mask.bool()}

    def initial_latents(self, batch_size: int, generator: Generators = None) -> Tensor:
        return self._unpacked(self._prepared(self.transformer.config.in_channels // 4, batch_size, generator))

    def _unpacked(self, packed: Tensor) -> Tensor:
        return super()._unpacked(packed)[:, :, 0]  # the only frame

    def _guide(self, velocity: Tensor, negative: Tensor) -> Tensor:
        conditional, guided = self._packed(velocity), self._packed(super()._guide(velocity, negative))
        return self._unpacked(guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)))

    def _branch(self, transformer: Any, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = transformer.dtype
        mask = conditioning["prompt_embeds_mask"]
        longest = int(mask.sum(dim=1).max())  # a cache may have padded further than this batch needs
        _, _, height, width = latents.shape
        packed = transformer(
            hidden_states=self._packed(latents).to(dtype),
            timestep=rounded_sigma(sigma, dtype),
            encoder_hidden_states=conditioning["prompt_embeds"][:, :longest].to(dtype),
            encoder_hidden_states_mask=None if mask[:, :longest].all() else mask[:, :longest],
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return self._unpacked(packed.float())

    def _frames(self, latents: Tensor) -> Tensor:
        """The input of the autoencoder: single frames (B, C, 1, h, w) in its units."""
        vae = self.pipeline.vae
        statistics = vae.config.latents_mean, vae.config.latents_std
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in statistics)
        return (latents * std + mean)[:, :, None].to(vae.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        if vae.use_tiling:
            raise ValueError(
                "Tiles of Qwen-Image's autoencoder have no gradient here: call `pipeline.vae.disable_tiling()`, and "
                "set `decode_batch_size` to 1 if memory is short."
            )
        # `vae.decode` clamps, which would kill gradients; for a single frame this does the same but does not clamp.
        return vae.decoder(vae.post_quant_conv(self._frames(latents)))[:, :, 0].float() / 2 + 0.5

    def images(self, latents: Tensor) -> Tensor:
        if not self.pipeline.vae.use_tiling:
            return super().images(latents)  # needs less memory: `vae.decode` keeps a cache for a next frame
        pictures = self.pipeline.vae.decode(self._frames(latents), return_dict=False)[0][:, :, 0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)
