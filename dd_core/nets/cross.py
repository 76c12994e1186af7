"""A transformer over the pixels of a map, added to it: each layer attends to the map, then to the caption.

Source: Rombach et al. 2022 (arXiv:2112.10752), appendix E.2.1; Stable Diffusion differs in sizes alone.
The 1x1 convolutions there and the linear layers of Stable Diffusion 2 compute the same over rows of pixels;
here they are linear layers.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_core.nets.attention import attend
from dd_core.nets.layers import Shared, Told, zeroed

EPSILON = 1e-6


class CrossTransformer(nn.Module):
    """Layers of self-attention, attention to the caption and a gated feed-forward network, added to the map.

    Args:
        channels: Of the map.
        shared: What all blocks have in common.
        text_only: The first attention, too, is to the caption, not the map (Stable Diffusion's x4 upscaler).
    """

    def __init__(self, channels: int, shared: Shared, *, text_only: bool = False) -> None:
        super().__init__()
        heads = shared.heads_of(channels)
        self.norm = nn.GroupNorm(shared.groups, channels, eps=EPSILON)
        self.enter = nn.Linear(channels, channels)
        self.layers = nn.ModuleList(
            Layer(channels, heads, shared.text_width, text_only=text_only)
            for _ in range(shared.transformer_depth)
        )
        self.leave = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b c h w"]:
        rows = self.enter(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for layer in self.layers:
            rows = layer(rows, told)
        return x + self.leave(rows).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Layer(nn.Module):
    """Self-attention, attention to the caption, gated feed-forward network; each pre-norm and residual."""

    def __init__(self, width: int, heads: int, text_width: int, *, text_only: bool) -> None:
        super().__init__()
        self.text_only = text_only
        self.norm_self, self.norm_text, self.norm_alone = (nn.LayerNorm(width) for _ in range(3))
        self.to_self = CrossAttention(width, heads, text_width if text_only else width)
        self.to_text = CrossAttention(width, heads, text_width)
        self.alone_in = nn.Linear(width, 8 * width)
        self.alone_out = nn.Linear(4 * width, width)

    def forward(self, rows: Float[Tensor, " b n c"], told: Told) -> Float[Tensor, " b n c"]:
        normed = self.norm_self(rows)
        rows = rows + (self.to_self.asked(normed, told) if self.text_only else self.to_self(normed, normed))
        rows = rows + self.to_text.asked(self.norm_text(rows), told)
        value, gate = self.alone_in(self.norm_alone(rows)).chunk(2, dim=-1)  # GEGLU, arXiv:2002.05202
        return rows + self.alone_out(value * F.gelu(gate))

    def hears(self) -> tuple[nn.Linear, ...]:
        """The projections of the caption to keys and values."""
        asking = (self.to_self, self.to_text) if self.text_only else (self.to_text,)
        return tuple(layer for attention in asking for layer in (attention.key, attention.value))


class CrossAttention(nn.Module):
    """Queries from the map, keys and values from any sequence; these three projections have no bias."""

    def __init__(self, width: int, heads: int, seen_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(seen_width, width, bias=False)
        self.value = nn.Linear(seen_width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(
        self, rows: Float[Tensor, " b n c"], seen: Float[Tensor, " b m d"]
    ) -> Float[Tensor, " b n c"]:
        return self._looked(rows, self.key(seen), self.value(seen), None)

    def asked(self, rows: Float[Tensor, " b n c"], told: Told) -> Float[Tensor, " b n c"]:
        """Attention to the caption, whose keys and values are already computed."""
        return self._looked(rows, told.keys[self.key], told.keys[self.value], told.heard)

    def _looked(self, rows: Tensor, key: Tensor, value: Tensor, heard: Tensor | None) -> Tensor:
        parts = (self.query(rows), key, value)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask = None if heard is None else heard[:, None, None]
        return self.out(attend(query, key, value, mask).transpose(1, 2).flatten(2))
