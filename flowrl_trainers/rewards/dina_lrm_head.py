"""The head of DiNa-LRM: what a few queries read of the features of a diffusion transformer, as one number."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

# The names of modules and parameters are those of the published checkpoint.


class LayerAdapter(nn.Module):
    """Features of one layer (B, N, D) to (B, N, width / 4), scaled and shifted by an embedding (B, D) of the level.

    Args:
        dim: D.
        width: That of the head.
        project: Whether the features are projected also where `dim` is `width`.
    """

    def __init__(self, dim: int, width: int, project: bool) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, width) if project or dim != width else nn.Identity()
        self.layer_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.cond_mlp = nn.Sequential(nn.Linear(dim, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.cond_mlp(level)[:, None].chunk(2, dim=-1)
        return self.proj(self.proj_in(features) * (1 + scale) + shift + self.layer_embed)


class Gate(nn.Sequential):
    """A number between 0 and 1 for every token: (B, N, D) to (B, N, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).sigmoid()


class QueryBlock(nn.Module):
    """Queries plus what they read of the picture and, with text, of the prompt, whose values are gated then.

    Args:
        width: Of queries and tokens.
        heads: Of the attention.
        with_text: Whether there are tokens of the prompt, and gates.
    """

    def __init__(self, width: int, heads: int, with_text: bool) -> None:
        super().__init__()
        self.heads, self.with_text = heads, with_text
        self.norm_q, self.norm_v = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_q, self.to_k_vis, self.to_v_vis = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))
        if with_text:
            self.norm_t = nn.RMSNorm(width)
            self.to_k_text, self.to_v_text = nn.Linear(width, width), nn.Linear(width, width)
            self.gate_vis, self.gate_text = Gate(width), Gate(width)

    def forward(self, queries: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        q, visual = self.to_q(self.norm_q(queries)), self.norm_v(visual)
        values = self.to_v_vis(visual)
        if not self.with_text:
            return queries + self.to_out(self._read(q, self.to_k_vis(visual), values))
        text = self.norm_t(text)
        seen = self._read(q, self.to_k_vis(visual), values * self.gate_vis(visual))
        read = self._read(q, self.to_k_text(text), self.to_v_text(text) * self.gate_text(text))
        return queries + self.to_out(seen + read)

    def _read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class RewardHead(nn.Module):
    """Scores (B,) of the features of some layers of a diffusion transformer.

    Args:
        dim: The width of the features, and of the embedding of level and prompt.
        layers: How many layers of the picture's tokens it reads, and how many of the prompt's.
        width: Its own width; -1 for `dim`.
        num_queries: How many queries read the tokens; the score is the mean of what they find.
        num_attn_heads: Of its attention.
        use_proj_in: Whether features are projected also where the widths agree.
    """

    def __init__(
        self,
        dim: int,
        layers: tuple[int, int],
        *,
        width: int = -1,
        num_queries: int = 4,
        num_attn_heads: int = 8,
        use_proj_in: bool = False,
    ) -> None:
        super().__init__()
        width = dim if width == -1 else width
        self.layer_adapters_visual, self.layer_adapters_text = (
            nn.ModuleList(LayerAdapter(dim, width, use_proj_in) for _ in range(count)) for count in layers
        )
        self.agg_visual, self.agg_text = (nn.Linear(count * (width // 4), width) for count in layers)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, width))
        self.attn1 = QueryBlock(width, num_attn_heads, with_text=True)
        self.attn2 = QueryBlock(width, num_attn_heads, with_text=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    def forward(self, visual: list[Tensor], text: list[Tensor], level: Tensor) -> Tensor:
        """Read a picture and its prompt.

        Args:
            visual: The picture's tokens (B, N, D) after every layer that is read.
            text: Those of the prompt.
            level: The embedding of level and prompt, (B, D).
        """
        seen = self.agg_visual(_adapted(self.layer_adapters_visual, visual, level))
        read = self.agg_text(_adapted(self.layer_adapters_text, text, level))
        queries = self.query_tokens.expand(len(seen), -1, -1)
        for block in (self.attn1, self.attn2):
            queries = block(queries, seen, read)
        queries = queries + self.ff(self.norm_ff(queries))
        return self.head(queries).mean(dim=(1, 2))


def _adapted(adapters: nn.ModuleList, layers: list[Tensor], level: Tensor) -> Tensor:
    """The features of all layers side by side, (B, N, layers * width / 4)."""
    return torch.cat([adapter(tokens, level) for adapter, tokens in zip(adapters, layers, strict=True)], dim=2)
