"""Conditional group normalisation: then an affine map for each channel of each sample, then SiLU.

A CPU runs two loops of our own (norm.c), because PyTorch's GroupNorm takes 28 times as long backwards with
channels innermost as with pixels innermost, while convolutions want channels innermost, and because a pass
over memory costs a CPU as much as a convolution.  Elsewhere PyTorch's calls are best.
"""

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from dd_core.compiled import compiled, pointers
from dd_core.devices import kind_of

EPSILON = 1e-5
CACHED = 2**18
"""Elements that the passes without norm.c work on at a time: 1 MiB of float32."""
SOURCE = Path(__file__).with_name("norm.c")
KINDS = (torch.float32, torch.bfloat16)
"""Dtypes that norm.c supports."""


class Norm(nn.Module):
    """Group normalisation with an affine map per channel, a further one per sample, and SiLU."""

    def __init__(self, channels: int, groups: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.groups, self.epsilon = groups, epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Float[Tensor, " b c h w"], told: Float[Tensor, " b 2*c"] | None = None, *, silu: bool = True
    ) -> Float[Tensor, " b c h w"]:
        return modulated_norm(
            x, self.weight, self.bias, told, groups=self.groups, silu=silu, epsilon=self.epsilon
        )


def modulated_norm(  # noqa: PLR0913 - the terms of its formula
    x: Float[Tensor, " b c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    told: Float[Tensor, " b 2*c"] | None,
    *,
    groups: int,
    silu: bool,
    epsilon: float = EPSILON,
) -> Float[Tensor, " b c h w"]:
    """SiLU((GroupNorm(x) * weight + bias) * (1 + scale) + shift), in the dtype of x; statistics in float32.

    Args:
        x: Features.
        weight: Of each channel.
        bias: Likewise.
        told: Scales of each sample, then its shifts; None: no scale and shift.
        groups: Divides the channels.
        silu: Whether SiLU follows.
        epsilon: Added to the variance of a group.

    Source: Wu & He 2018 (arXiv:1803.08494); scale and shift as in Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3, "AdaGN".
    """
    if kind_of(x) != "cpu" or x.dtype not in KINDS or not x.numel():
        return plain_modulated_norm(x, weight, bias, told, groups=groups, silu=silu, epsilon=epsilon)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, told = known(weight), known(bias), None if told is None else known(told)
    if torch.is_grad_enabled():
        return _ModulatedNorm.apply((groups, silu, epsilon), x, weight, bias, told)
    out, _ = torch.ops.ddiff.norm(x, weight, bias, told, groups, silu, epsilon)
    return out


def known(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and in a dtype that norm.c supports."""
    return (tensor if tensor.dtype in KINDS else tensor.float()).contiguous()


def plain_modulated_norm(  # noqa: PLR0913 - the terms of its formula
    x: Float[Tensor, " b c h w"],
    weight: Float[Tensor, " c"],
    bias: Float[Tensor, " c"],
    told: Float[Tensor, " b 2*c"] | None,
    *,
    groups: int,
    silu: bool,
    epsilon: float = EPSILON,
) -> Float[Tensor, " b c h w"]:
    """`modulated_norm` by PyTorch's calls, as its formula reads.

    On a GPU PyTorch keeps the statistics for the backward pass in the dtype of x.
    """
    gain, offset = gain_and_offset(weight, bias, told)
    with torch.autocast("cuda", enabled=False):  # autocast would output the norm in float32
        unit = F.group_norm(x, groups, eps=epsilon)
        z = torch.addcmul(offset.to(x)[:, :, None, None], unit, gain.to(x)[:, :, None, None])
        return F.silu(z) if silu else z


def gain_and_offset(weight: Tensor, bias: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor and offset of each normalised channel, both maps in one; `b c`, or `1 c` for all samples."""
    gain, offset = wide(weight)[None], wide(bias)[None]
    if told is None:
        return gain, offset
    scale, shift = wide(told).chunk(2, dim=1)
    return gain * (1 + scale), torch.addcmul(shift, offset, 1 + scale)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _ModulatedNorm(torch.autograd.Function):
    """`modulated_norm` of features in channels_last, which is how norm.c wants them."""

    @staticmethod
    def forward(ctx: FunctionCtx, how: tuple[int, bool, float], x: Tensor, *affine: Tensor | None) -> Tensor:
        out, moments = torch.ops.ddiff.norm(x, *affine, *how)
        ctx.save_for_backward(x, moments, *affine)  # type: ignore[arg-type]
        ctx.silu = how[1]  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, moments, weight, bias, told = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = grad.contiguous(memory_format=torch.channels_last)
        silu = ctx.silu  # type: ignore[attr-defined]
        d_x, d_affine, d_told = torch.ops.ddiff.norm_backward(grad, x, moments, silu, weight, bias, told)
        d_weight, d_bias = d_affine.sum(1).to(weight).unbind()
        return None, d_x, d_weight, d_bias, None if told is None else d_told.to(told)


class Task(ctypes.Structure):
    """The struct of norm.c: sizes, threads, whether SiLU follows, and which tensors are bfloat16."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("batch", "pixels", "channels", "groups")),
        *((name, ctypes.c_int) for name in ("threads", "silu", "half", "half_affine", "half_told")),
    )


def room(  # noqa: PLR0913, PLR0917 - as declared to PyTorch
    x: Tensor, weight: Tensor, bias: Tensor, told: Tensor | None, groups: int, silu: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Empty tensors for normalised features and their moments `2 b groups`: mean, 1 / standard deviation."""
    return torch.empty_like(x), x.new_empty((2, len(x), groups), dtype=torch.float32)


def norm(  # noqa: PLR0913, PLR0917 - as declared to PyTorch
    x: Tensor, weight: Tensor, bias: Tensor, told: Tensor | None, groups: int, silu: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Features normalised, and their moments.

    Raises:
        ValueError: Sizes do not match, so that the loop would read beyond its tensors.
    """
    batch, channels = x.shape[:2]
    fits = weight.shape == bias.shape == (channels,) and weight.dtype == bias.dtype and not channels % groups
    if not fits or (told is not None and told.shape != (batch, 2 * channels)):
        raise ValueError(
            f"features {tuple(x.shape)} want weight and bias of (c,) in one dtype, to be told (b, 2 c), and"
            f" groups that divide c; got {tuple(weight.shape)}, {tuple(bias.shape)},"
            f" {None if told is None else tuple(told.shape)} and {groups}"
        )
    loops = compiled(SOURCE)
    if loops is None:
        return norm_by_passes(x, weight, bias, told, groups, silu, epsilon)
    out, moments = room(x, weight, bias, told, groups, silu, epsilon)
    task = task_of(x, weight, told, groups, silu)
    loops.norm_forward(*pointers(x, out, moments, weight, bias, told), ctypes.c_double(epsilon), task)
    return out, moments


def room_backward(
    grad: Tensor, x: Tensor, moments: Tensor, silu: bool, *affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for gradients: of x; of weight and bias, for each sample, `2 b c`; of `told`, `b 2c`."""
    (batch, channels), (_, _, told) = x.shape[:2], affine
    of_told = moments.new_empty((0 if told is None else batch, 2 * channels))
    return torch.empty_like(x), moments.new_empty((2, batch, channels)), of_told


def norm_backward(
    grad: Tensor, x: Tensor, moments: Tensor, silu: bool, *affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of weight and bias (per sample) and of `told`; `affine` is weight, bias, told."""
    loops = compiled(SOURCE)
    if loops is None:
        return norm_backward_by_passes(grad, x, moments, silu, *affine)
    made = room_backward(grad, x, moments, silu, *affine)
    weight, _, told = affine
    task = task_of(x, weight, told, moments.shape[2], silu)
    loops.norm_backward(*pointers(grad, x, *made, moments, *affine), task)
    return made


def task_of(x: Tensor, weight: Tensor | None, told: Tensor | None, groups: int, silu: bool) -> Task:
    """The sizes and flags that a loop needs beside its tensors."""
    half = [tensor is not None and tensor.dtype == torch.bfloat16 for tensor in (x, weight, told)]
    batch, channels, *sides = x.shape
    return Task(batch, math.prod(sides), channels, groups, torch.get_num_threads(), silu, *half)


def rows_of(x: Tensor) -> Tensor:
    """Features as `b n c`: n pixels of c channels."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def norm_by_passes(  # noqa: PLR0913, PLR0917 - as declared to PyTorch
    x: Tensor, weight: Tensor, bias: Tensor, told: Tensor | None, groups: int, silu: bool, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`norm` without norm.c.

    Arithmetic is in float32 even if x is not: elementwise operations in bfloat16 cost the CPU up to eight
    times as much, a conversion a third of one pass.  A few samples are processed at a time, so that
    intermediate tensors stay in the cache and need no new memory.
    """
    out, moments = room(x, weight, bias, told, groups, silu, epsilon)
    gain, offset = (of.expand(len(x), -1) for of in gain_and_offset(weight, bias, told))
    each = x.shape[1] // groups
    for y, v, m, s, g, o in samples(rows_of(out), rows_of(x), *moments, gain, offset):
        pivot = v[:, :1].float()
        apart = v - pivot
        first, second = apart.mean(1), apart.square_().mean(1)
        centre = (pivot[:, 0] + first).unflatten(1, (groups, -1))
        own = (second - first.square()).unflatten(1, (groups, -1))
        m.copy_(centre.mean(2))
        variance = (own + (centre - m[..., None]).square()).mean(2)
        s.copy_(variance.clamp_min(0).add(epsilon).rsqrt())
        factor = g * s.repeat_interleave(each, 1)
        z = torch.addcmul((o - m.repeat_interleave(each, 1) * factor)[:, None], v, factor[:, None])
        y.copy_(F.silu(z, inplace=True) if silu else z)
    return out, moments


def norm_backward_by_passes(
    grad: Tensor, x: Tensor, moments: Tensor, silu: bool, *affine: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_backward` without norm.c."""
    weight, bias, told = affine
    assert weight is not None
    assert bias is not None
    d_x, d_affine, d_told = room_backward(grad, x, moments, silu, *affine)
    gain, offset = (of.expand(len(x), -1) for of in gain_and_offset(weight, bias, told))
    each = x.shape[1] // moments.shape[2]
    mean, scale = moments.repeat_interleave(each, 2)
    per_channel = (of[:, None] for of in (*d_affine, mean, scale, gain, offset))
    for d_v, dy, v, d_g, d_o, m, s, g, o in samples(rows_of(d_x), rows_of(grad), rows_of(x), *per_channel):
        u, dz = torch.addcmul(-m * s, v, s), dy.float()
        if silu:
            dz = torch.ops.aten.silu_backward(dz, torch.addcmul(o, u, g))
        torch.sum(dz, 1, keepdim=True, out=d_o)
        torch.sum(dz * u, 1, keepdim=True, out=d_g)
        both = (g * torch.cat([d_o, d_g], dim=1)).unflatten(2, (-1, each)).mean(3).repeat_interleave(each, 2)
        lean, turn = (both * (s / -v.shape[1])).split(1, dim=1)
        d_v.copy_(torch.addcmul(lean, u, turn).addcmul_(dz, s * g))
    if told is not None:
        d_gain, d_offset = d_affine
        torch.cat([torch.addcmul(d_gain * weight, d_offset, bias), d_offset], dim=1, out=d_told)
        d_affine.mul_(1 + told[:, : x.shape[1]].float())
    return d_x, d_affine, d_told


def samples(rows: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of all these tensors, as many samples at a time as fit the cache."""
    few = max(1, CACHED // rows[0].numel())
    return zip(*(part.split(few) for part in (rows, *parts)), strict=True)


OPERATIONS = torch.library.Library("ddiff", "FRAGMENT")
"""Registered with PyTorch, so that it can infer their output sizes without data (FakeTensorMode)."""
OPERATIONS.define(
    "norm(Tensor x, Tensor weight, Tensor bias, Tensor? told, int groups, bool silu, float epsilon)"
    " -> (Tensor, Tensor)"
)
OPERATIONS.impl("norm", norm, "CPU")
torch.library.register_fake("ddiff::norm", room, lib=OPERATIONS)
OPERATIONS.define(
    "norm_backward(Tensor grad, Tensor x, Tensor moments, bool silu,"
    " Tensor weight, Tensor bias, Tensor? told) -> (Tensor, Tensor, Tensor)"
)
OPERATIONS.impl("norm_backward", norm_backward, "CPU")
torch.library.register_fake("ddiff::norm_backward", room_backward, lib=OPERATIONS)
