"""Sequences of unequal length without their padding: what is done place by place is done for places that are.

Captions fill half of what their tower may read.  Norms and linear maps see the n places that there are, one
after the other; only attention lays them out as b rows again, where none looks at a place that is not.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dd_core.nets.attention import attend

ROUND = 128
"""Places are made a multiple of this by some that are not: a matrix product on a CPU is planned anew for each
size that it meets, and kept with its memory, so sizes must be few."""


class Packing(NamedTuple):
    """Which places of b rows there are."""

    there: Bool[Tensor, " b l"]
    """The places that are."""
    places: Int[Tensor, " n"]
    """The same in their order, counted through all rows; behind them fewer than ROUND that are not."""

    def pack(self, x: Float[Tensor, " b l d"]) -> Float[Tensor, " n d"]:
        """The places that are, and those behind them."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Float[Tensor, " n d"]) -> Float[Tensor, " b l d"]:
        """As rows; what stands where no place is means nothing."""
        rows, length = self.there.shape
        empty = x.new_zeros(rows * length, x.shape[1])
        return empty.index_copy(0, self.places, x).unflatten(0, (rows, length))

    def attended(
        self, qkv: Float[Tensor, " n three_d"], heads: int, mask: Bool[Tensor, " #b 1 #l l"]
    ) -> Float[Tensor, " n d"]:
        """Attention of the places of each row, over those where `mask` is True."""
        parts = self.unpack(qkv).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        return self.pack(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def packing(there: Bool[Tensor, " b l"]) -> Packing:
    """Of the places that are."""
    flat = there.flatten()
    places, others = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
    rounded = min(-(-len(places) // ROUND) * ROUND, len(flat))
    return Packing(there, torch.cat([places, others[: rounded - len(places)]]))


def upto_end(tokens: Int[Tensor, " b l"]) -> Bool[Tensor, " b l"]:
    """The tokens of each caption, START and END among them."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(1, keepdim=True)
