"""Attention of queries over keys, on whichever path is fast where it runs."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def attend(
    q: Float[Tensor, " b h n d"],
    k: Float[Tensor, " b h m d"],
    v: Float[Tensor, " b h m d"],
    mask: Bool[Tensor, " #b 1 #n m"] | None = None,
) -> Float[Tensor, " b h n d"]:
    """softmax(q k / sqrt(d)) v, over the keys where `mask` is True.

    On a CPU in bfloat16 the fused kernel's backward takes four times as long as the three products
    written out (2-core AVX512-bf16 box, 64 queries, 96 keys, torch 2.15), so there they are written out.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
