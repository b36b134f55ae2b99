"""The network of SiT (Scalable Interpolant Transformers, arXiv 2401.08740), made of layers of diffusers."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn


class SiTBlock(nn.Module):
    """Self-attention and a feed-forward layer, which the conditioning shifts, scales and gates (adaLN-Zero).

    Args:
        dim: The width D.
        num_attention_heads: The attention heads.
        mlp_dim: The width of the feed-forward layer.
    """

    def __init__(self, dim: int, num_attention_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(dim)
        self.attn = Attention(dim, heads=num_attention_heads, dim_head=dim // num_attention_heads, bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim, inner_dim=mlp_dim, activation_fn="gelu-approximate")

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        """hidden_states: (B, N, D), conditioning: (B, D); returns (B, N, D)."""
        normed, gate_attn, shift, scale, gate_ff = self.norm1(hidden_states, emb=conditioning)
        hidden_states = hidden_states + gate_attn[:, None] * self.attn(normed)
        normed = self.norm2(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        return hidden_states + gate_ff[:, None] * self.ff(normed)


class SiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A class-conditional transformer that predicts the velocity of latents in the time of diffusers' schedulers.

    The original network reads t in [0, 1], 0 for noise and 1 for data, and predicts data - noise. The conversion
    happens in `forward` and nowhere else: t = 1 - timestep / 1000, velocity = -(prediction of the original network).

    Args:
        sample_size: Height and width of the latents of training. Position embeddings exist for this grid; smaller
            latents get its centre.
        patch_size: The side of a patch of latents, which becomes one token.
        in_channels: The channels of the latents and of the output.
        num_layers: The number of blocks.
        num_attention_heads: The attention heads of a block.
        attention_head_dim: The width of a head; D is this times the number of heads.
        mlp_dim: The width of the feed-forward layers. None: 4 D.
        num_classes: The number of classes. The class embedding has one more row, the last, for no class, which
            guidance needs.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("SiTBlock",)
    _repeated_blocks = ("SiTBlock",)
    _skip_layerwise_casting_patterns = ("pos_embed", "norm")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_dim: int | None = None,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.gradient_checkpointing = False
        # `pos_embed_max_size` makes positions integers; smaller latents get those at the centre of the grid.
        self.pos_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, dim, pos_embed_max_size=sample_size // patch_size
        )
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, dim)
        self.class_embedder = nn.Embedding(num_classes + 1, dim)
        self.transformer_blocks = nn.ModuleList(
            SiTBlock(dim, num_attention_heads, mlp_dim or 4 * dim) for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity noise - data of noisy latents (B, C, h, w), in the same shape.

        Args:
            hidden_states: The latents; h and w are multiples of `patch_size` and at most `sample_size`.
            timestep: (B,), 1000 for noise and 0 for data, as the scheduler counts.
            class_labels: (B,), in [0, num_classes], where num_classes means no class.
            return_dict: Whether to return a `Transformer2DModelOutput`, or else a tuple.
        """
        height, width = hidden_states.shape[-2:]
        t = 1 - timestep / 1000
        conditioning = self.time_embedder(self.time_proj(t).to(hidden_states.dtype)) + self.class_embedder(
            class_labels
        )
        hidden_states = self.pos_embed(hidden_states)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)
        patches = self.proj_out(self.norm_out(hidden_states, conditioning))
        velocity = -self._unpatchify(patches, height, width)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Put patches together to latents (B, C, height, width).

        Args:
            patches: (B, N, p p C), channels last within a patch.
            height: The height of the latents.
            width: The width of the latents.
        """
        p, channels = self.config.patch_size, self.config.in_channels
        patches = patches.unflatten(1, (height // p, width // p)).unflatten(3, (p, p, channels))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)
