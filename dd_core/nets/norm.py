"""Group normalisation that is told things: an affine map for each channel of each sample, and SiLU after it.

The CPU has a pair of loops of its own (norm.c), because the library's GroupNorm takes 28 times as long
backwards with channels innermost as with pixels innermost, while convolutions want the opposite, and because
a pass over memory costs it as much as a convolution.  Elsewhere, and compiled, the library's calls are best.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from dd_core.compiled import compiled
from dd_core.devices import kind_of

EPSILON = 1e-5
CACHED = 2**18
"""Elements that passes over a few samples work on at a time: 1 MiB of float32."""
SOURCE = Path(__file__).with_name("norm.c")
KINDS = (torch.float32, torch.bfloat16)
"""Of numbers that norm.c knows."""


class Norm(nn.Module):
    """Group normalisation with an affine map per channel, a further one per sample, and SiLU."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        x: Float[Tensor, " b c h w"],
        scale_shift: Float[Tensor, " b 2*c"] | None = None,
        *,
        silu: bool = True,
    ) -> Float[Tensor, " b c h w"]:
        gain, offset = self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)
        if scale_shift is not None:
            scale, shift = scale_shift.float().chunk(2, dim=1)
            gain, offset = gain * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
        return modulated_norm(x, gain, offset, groups=self.groups, silu=silu)


def modulated_norm(
    x: Float[Tensor, " b c h w"],
    gain: Float[Tensor, " b c"],
    offset: Float[Tensor, " b c"],
    *,
    groups: int,
    silu: bool,
) -> Float[Tensor, " b c h w"]:
    """SiLU(GroupNorm(x) * gain + offset), in the dtype of x, its statistics in float32.

    Source: Wu & He 2018 (arXiv:1803.08494); gain and offset per sample as in Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3, "AdaGN".
    """
    plainly = kind_of(x) != "cpu" or x.dtype not in KINDS or not x.numel()
    if not plainly and not torch.compiler.is_compiling():
        rows = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        gain, offset = gain.float().contiguous(), offset.float().contiguous()
        out = _ModulatedNorm.apply(rows, gain, offset, groups, silu)
        return out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return plain_modulated_norm(x, gain, offset, groups=groups, silu=silu)


def plain_modulated_norm(
    x: Float[Tensor, " b c h w"],
    gain: Float[Tensor, " b c"],
    offset: Float[Tensor, " b c"],
    *,
    groups: int,
    silu: bool,
) -> Float[Tensor, " b c h w"]:
    """`modulated_norm` as its formula reads, out of library calls."""
    with torch.autocast("cuda", enabled=False):  # there it would write the norm out in float32
        unit = F.group_norm(x, groups, eps=EPSILON)
        z = torch.addcmul(offset.to(x)[:, :, None, None], unit, gain.to(x)[:, :, None, None])
        return F.silu(z) if silu else z


class _ModulatedNorm(torch.autograd.Function):
    """`modulated_norm` of rows `b n c`: n pixels of c channels, which is how norm.c wants them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool
    ) -> Tensor:
        out, moments = torch.ops.ddiff.norm(rows, gain, offset, groups, silu)
        ctx.save_for_backward(rows, moments, gain, offset)
        ctx.silu = silu  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        known, silu = ctx.saved_tensors, ctx.silu  # type: ignore[attr-defined]
        return *torch.ops.ddiff.norm_backward(grad.contiguous(), *known, silu), None, None


class Task(ctypes.Structure):
    """The struct of norm.c: sizes, threads, and whether SiLU follows and numbers are bfloat16."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("batch", "pixels", "channels", "groups")),
        *((name, ctypes.c_int) for name in ("threads", "silu", "half")),
    )


def room(rows: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor]:
    """Room for rows that are normalised, and for their moments `2 b groups`: mean, 1 / standard deviation."""
    return torch.empty_like(rows), gain.new_empty(2, len(rows), groups)


def norm(rows: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> tuple[Tensor, Tensor]:
    """Rows normalised, and their moments.

    Raises:
        ValueError: Sizes that do not go together, for which the loop would read beyond its tensors.
    """
    if gain.shape != (rows.shape[0], rows.shape[2]) or offset.shape != gain.shape or rows.shape[2] % groups:
        raise ValueError(
            f"rows {tuple(rows.shape)} want gain and offset of (b, c) and groups that divide c;"
            f" got {tuple(gain.shape)}, {tuple(offset.shape)} and {groups}"
        )
    loops = compiled(SOURCE)
    if loops is None:
        return norm_by_passes(rows, gain, offset, groups, silu)
    out, moments = room(rows, gain, offset, groups, silu)
    task = task_of(rows, groups, silu)
    loops.norm_forward(*pointers(rows, out, moments, gain, offset), ctypes.c_double(EPSILON), task)
    return out, moments


def room_backward(
    grad: Tensor, rows: Tensor, moments: Tensor, gain: Tensor, offset: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of rows, gain and offset."""
    return torch.empty_like(rows), torch.empty_like(gain), torch.empty_like(offset)


def norm_backward(
    grad: Tensor, rows: Tensor, moments: Tensor, gain: Tensor, offset: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of rows, gain and offset."""
    loops = compiled(SOURCE)
    if loops is None:
        return norm_backward_by_passes(grad, rows, moments, gain, offset, silu)
    made = room_backward(grad, rows, moments, gain, offset, silu)
    task = task_of(rows, moments.shape[2], silu)
    loops.norm_backward(*pointers(grad, rows, *made, moments, gain, offset), task)
    return made


def task_of(rows: Tensor, groups: int, silu: bool) -> Task:
    """What a loop has to know beside its tensors."""
    return Task(*rows.shape, groups, torch.get_num_threads(), silu, rows.dtype == torch.bfloat16)


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """Where each begins; all of them are contiguous."""
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def norm_by_passes(
    rows: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor]:
    """`norm` without norm.c.

    What happens between reading and writing is in float32 even if rows are not: element by element
    bfloat16 costs the CPU up to eight times as much, a conversion a third of one pass.  It happens to a
    few samples at a time, so that it stays in the cache and asks for no new memory.
    """
    out, moments = room(rows, gain, offset, groups, silu)
    wide = rows.shape[2] // groups
    for y, x, m, s, g, o in samples(out, rows, *moments, gain, offset):
        pivot = x[:, :1].float()
        v = x - pivot
        first, second = v.mean(1), v.square_().mean(1)
        centre = (pivot[:, 0] + first).unflatten(1, (groups, -1))
        own = (second - first.square()).unflatten(1, (groups, -1))
        m.copy_(centre.mean(2))
        variance = (own + (centre - m[..., None]).square()).mean(2)
        s.copy_(variance.clamp_min(0).add(EPSILON).rsqrt())
        factor = g * s.repeat_interleave(wide, 1)
        z = torch.addcmul((o - m.repeat_interleave(wide, 1) * factor)[:, None], x, factor[:, None])
        y.copy_(F.silu(z, inplace=True) if silu else z)
    return out, moments


def norm_backward_by_passes(
    grad: Tensor, rows: Tensor, moments: Tensor, gain: Tensor, offset: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_backward` without norm.c."""
    d_rows, d_gain, d_offset = room_backward(grad, rows, moments, gain, offset, silu)
    wide = rows.shape[2] // moments.shape[2]
    mean, scale = moments.repeat_interleave(wide, 2)
    per_channel = (of[:, None] for of in (d_gain, d_offset, mean, scale, gain, offset))
    for d_x, dy, x, d_g, d_o, m, s, g, o in samples(d_rows, grad, rows, *per_channel):
        u, dz = torch.addcmul(-m * s, x, s), dy.float()
        if silu:
            dz = torch.ops.aten.silu_backward(dz, torch.addcmul(o, u, g))
        torch.sum(dz, 1, keepdim=True, out=d_o)
        torch.sum(dz * u, 1, keepdim=True, out=d_g)
        both = (g * torch.cat([d_o, d_g], dim=1)).unflatten(2, (-1, wide)).mean(3).repeat_interleave(wide, 2)
        lean, turn = (both * (s / -x.shape[1])).split(1, dim=1)
        d_x.copy_(torch.addcmul(lean, u, turn).addcmul_(dz, s * g))
    return d_rows, d_gain, d_offset


def samples(rows: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of these, as many samples at a time as stay in the cache."""
    few = max(1, CACHED // rows[0].numel())
    return zip(*(part.split(few) for part in (rows, *parts)), strict=True)


OPERATIONS = torch.library.Library("ddiff", "FRAGMENT")
"""Known to PyTorch by name, so that it also knows what they make of sizes alone (FakeTensorMode)."""
OPERATIONS.define("norm(Tensor rows, Tensor gain, Tensor offset, int groups, bool silu) -> (Tensor, Tensor)")
OPERATIONS.impl("norm", norm, "CPU")
torch.library.register_fake("ddiff::norm", room, lib=OPERATIONS)
OPERATIONS.define(
    "norm_backward(Tensor grad, Tensor rows, Tensor moments, Tensor gain, Tensor offset, bool silu)"
    " -> (Tensor, Tensor, Tensor)"
)
OPERATIONS.impl("norm_backward", norm_backward, "CPU")
torch.library.register_fake("ddiff::norm_backward", room_backward, lib=OPERATIONS)
