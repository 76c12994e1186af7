"""Sequences of unequal length without padding: what works place by place is computed for real places only.

Captions fill half of their tower's context.  Norms and linear layers see the n real places of all rows as one
sequence; only attention lays them out as b rows again, where no real place attends to padding.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dd_core.nets.attention import attend

ROUND = 128
"""The number of places is rounded up to a multiple of this by padding: on a CPU each new size of a matrix
product is planned anew, and plan and memory are kept, so sizes must be few."""


class Packing(NamedTuple):
    """Which places of b rows are real, that is, not padding."""

    there: Bool[Tensor, " b l"]
    """True at real places."""
    places: Int[Tensor, " n"]
    """Indices of the real places in the flattened rows, in order, then of fewer than ROUND of padding."""

    def pack(self, x: Float[Tensor, " b l d"]) -> Float[Tensor, " n d"]:
        """The vectors at `places`, as one sequence."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Float[Tensor, " n d"]) -> Float[Tensor, " b l d"]:
        """Back as b rows; values at padding mean nothing."""
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
    """The packing of rows whose real places are given."""
    flat = there.flatten()
    places, others = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
    rounded = min(-(-len(places) // ROUND) * ROUND, len(flat))
    return Packing(there, torch.cat([places, others[: rounded - len(places)]]))


def upto_end(tokens: Int[Tensor, " b l"]) -> Bool[Tensor, " b l"]:
    """True for the tokens of each caption, from START to END inclusive."""
    return torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(1, keepdim=True)
