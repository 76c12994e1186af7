"""Scaled dot-product attention, by whichever implementation is fast on the device."""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dd_core.compiled import compiled, constant, pointers
from dd_core.devices import kind_of

FEW = 512
"""Up to this many keys attention may be two explicit matrix products, which hold all logits in memory."""
MANY = 4096
"""Up to this many keys attention.c holds the logits of its queries in a near cache."""
LANES = 16
"""Numbers in a register of attention.c, which the width of a head has to be a multiple of."""
SOURCE = Path(__file__).with_name("attention.c")


def attend(
    q: Float[Tensor, " b h n d"],
    k: Float[Tensor, " b h m d"],
    v: Float[Tensor, " b h m d"],
    mask: Bool[Tensor, " #b 1 #n m"] | None = None,
) -> Float[Tensor, " b h n d"]:
    """softmax(q k / sqrt(d)) v, over the keys where `mask` is True.

    On a CPU in bfloat16 without gradients attention.c takes a quarter of the time of PyTorch's fused kernel,
    where the processor has AVX-512's products of bfloat16 but not AMX (Zen 5, 256 queries, 272 keys, torch
    2.15).  With gradients that kernel takes four times as long backward as explicit matrix products (64
    queries, 96 keys), so at most FEW keys these are used; with AMX and without gradients it takes .9 to .3 of
    their time.
    """
    half = kind_of(q) == "cpu" and all(of.dtype == torch.bfloat16 for of in (q, k, v))
    trained = half and torch.is_grad_enabled()
    if half and not trained and fits(q, k, mask):
        heard = None if mask is None else mask[:, 0, 0].expand(len(q), -1)
        found: Tensor = torch.ops.ddiff.attention(q, k, v, heard)
        return found
    if not trained or k.shape[2] > FEW:
        return F.scaled_dot_product_attention(q, k, v, mask)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v  # computed in float32, written in the dtype of the logits


def fits(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether attention.c can be called: here, for these sizes, with no mask or one for all queries."""
    sizes = not q.shape[-1] % LANES and 0 < k.shape[2] <= MANY and bool(q.numel())
    return sizes and (mask is None or mask.shape[2] == 1) and runs()


@constant
def runs() -> bool:
    """Whether attention.c can be compiled here, and the processor has its instructions."""
    loops = compiled(SOURCE)
    return loops is not None and bool(loops.attention_runs())


class Task(ctypes.Structure):
    """The struct of attention.c: sizes, numbers between samples, heads and rows, and threads."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("batch", "heads", "queries", "keys", "width")),
        *((name, ctypes.c_long * 3) for name in ("of_q", "of_k", "of_v", "of_out")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


def room(q: Tensor, k: Tensor, v: Tensor, heard: Tensor | None) -> Tensor:
    """An empty tensor for the result, `b h n d`, whose heads of a query lie side by side."""
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, heard: Tensor | None) -> Tensor:
    """`attend` by attention.c, in bfloat16.

    Args:
        q: Queries, `b h n d`, d a multiple of LANES.
        k: Keys, `b h m d`.
        v: Values, `b h m d`.
        heard: False for keys that nothing looks at, `b m`; where all are False the result is NaN.

    Raises:
        ValueError: Sizes or dtypes do not match, so that the loop would read beyond its tensors, or a size is
            0.
    """
    (batch, heads, _, width), keys = q.shape, k.shape[2]
    halves = all(of.dtype == torch.bfloat16 for of in (q, k, v))
    fit = k.shape == v.shape == (batch, heads, keys, width) and not width % LANES and halves
    fit = fit and bool(q.numel() and k.numel())
    if not fit or (heard is not None and (heard.shape != (batch, keys) or heard.dtype != torch.bool)):
        raise ValueError(
            f"queries {tuple(q.shape)} in bfloat16, of a width that {LANES} divides, want keys and values of"
            f" (b, h, m, d), none of them empty, and heard, bool, of (b, m); got {tuple(k.shape)},"
            f" {tuple(v.shape)} and {None if heard is None else tuple(heard.shape)}"
        )
    loops = compiled(SOURCE)
    assert loops is not None
    q, k, v = (of if of.stride(3) == 1 else of.contiguous() for of in (q, k, v))
    out, heard = room(q, k, v, heard), None if heard is None else heard.contiguous()
    strides = ((ctypes.c_long * 3)(*of.stride()[:3]) for of in (q, k, v, out))
    task = Task(*q.shape[:3], keys, width, *strides, width**-0.5, torch.get_num_threads())
    loops.attention(*pointers(q, k, v, out, heard), task)
    return out


OPERATIONS = torch.library.Library("ddiff", "FRAGMENT")
OPERATIONS.define("attention(Tensor q, Tensor k, Tensor v, Tensor? heard) -> Tensor")
OPERATIONS.impl("attention", attention, "CPU")
torch.library.register_fake("ddiff::attention", room, lib=OPERATIONS)
