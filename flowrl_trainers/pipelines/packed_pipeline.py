"""What FLUX.1, Chroma, Qwen-Image and FLUX.2 share: their networks read latents as a row of tokens."""

from torch import Tensor

from .base import Generators
from .diffusers_pipeline import DiffusersFlowPipeline


class PackedFlowPipeline(DiffusersFlowPipeline):
    """A pipeline that draws its noise packed into tokens and hands tokens to its network.

    The pipelines pack and unpack by private methods, which are called here because there are no public ones.
    """

    def _packed(self, latents: Tensor) -> Tensor:
        """Spatial latents (B, C, h, w) as tokens of 2 x 2, (B, h w / 4, 4 C)."""
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _unpacked(self, packed: Tensor) -> Tensor:
        """Tokens as spatial latents: the inverse of `_packed`."""
        height, width = self.settings["height"], self.settings["width"]
        return self.pipeline._unpack_latents(packed, height, width, self.pipeline.vae_scale_factor)

    def initial_latents(self, batch_size: int, generator: Generators = None) -> Tensor:
        packed, _ = self._prepared(self.transformer.config.in_channels // 4, batch_size, generator)
        return self._unpacked(packed)
