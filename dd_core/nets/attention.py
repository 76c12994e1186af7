"""Scaled dot-product attention, by whichever implementation is fast on the device."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dd_core.devices import kind_of

FEW = 512
"""Up to this many keys attention may be two explicit matrix products, which hold all logits in memory."""


def attend(
    q: Float[Tensor, " b h n d"],
    k: Float[Tensor, " b h m d"],
    v: Float[Tensor, " b h m d"],
    mask: Bool[Tensor, " #b 1 #n m"] | None = None,
) -> Float[Tensor, " b h n d"]:
    """softmax(q k / sqrt(d)) v, over the keys where `mask` is True.

    On a CPU in bfloat16 the fused kernel, made for long sequences, takes four times as long backward as
    explicit matrix products (2-core AVX512-bf16 box, 64 queries, 96 keys, torch 2.15), so with gradients and
    at most FEW keys these are used; without gradients the fused kernel takes .9 to .3 of their time (AMX).
    """
    trained = q.dtype == torch.bfloat16 and torch.is_grad_enabled()
    if kind_of(q) != "cpu" or not trained or k.shape[2] > FEW:
        return F.scaled_dot_product_attention(q, k, v, mask)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v  # computed in float32, written in the dtype of the logits
