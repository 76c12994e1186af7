"""What image networks are made of: normalisation told the noise level, residual blocks, attention.

Every block maps features `b c h w` to features `b c h w`, kept in memory with channels innermost
(channels_last), and is told the same two things: the noise level and, if it attends, the caption.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from dd_core.nets.attention import attend

Resample = Literal["same", "down", "up"]
EPSILON = 1e-5
CACHED = 2**18
"""Elements that passes over a few samples work on at a time: 1 MiB of float32."""
LARGE = 1024
"""Pixels of a map from which on PyTorch's GroupNorm is fast with channels innermost."""
M = TypeVar("M", bound=nn.Module)


class Told(NamedTuple):
    """What every block of one network hears; the same for all of them."""

    level: Float[Tensor, " b e"]
    """SiLU of the embedded noise level, with all that is added to it."""
    text: Float[Tensor, " b l d"] | None = None
    heard: Bool[Tensor, " b l"] | None = None
    """Which tokens of the text count; None: all of them."""


class Shared(NamedTuple):
    """What all blocks of one network have in common."""

    level_width: int
    groups: int
    scale_shift: bool = True
    dropout: float = 0.0
    head_width: int = 64
    text_width: int = 0
    heads: int = 0
    """Of every attention; 0: as many as `head_width` makes of its channels."""
    transformer_depth: int = 0
    """Layers of the transformer that attends; 0: one joint attention instead."""

    def heads_of(self, channels: int) -> int:
        """Heads of an attention over that many channels."""
        return self.heads or channels // self.head_width


def sinusoids(values: Float[Tensor, " b"], width: int) -> Float[Tensor, " b w"]:
    """Cosines, then sines, of `values` at width / 2 frequencies from 1 down to 1 / 10000, float32.

    Source: the timestep embedding of Ho et al. 2020 (arXiv:2006.11239) in the order of ADM.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulated_norm(
    x: Float[Tensor, " b c h w"],
    gain: Float[Tensor, " b c"],
    offset: Float[Tensor, " b c"],
    *,
    groups: int,
    silu: bool,
) -> Float[Tensor, " b c h w"]:
    """SiLU(GroupNorm(x) * gain + offset), in the dtype of x, its statistics in float32.

    PyTorch's own GroupNorm on the CPU takes 28 times as long backwards with channels innermost as
    with pixels innermost, while convolutions want the opposite; so the CPU, when it is not
    compiling, gets a pair of passes of its own.  Elsewhere the three library calls are the best, and
    so they are on the CPU for small maps in float32 that need no gradient.

    Source: Wu & He 2018 (arXiv:1803.08494); gain and offset per sample as in Dhariwal & Nichol 2021
    (arXiv:2105.05233), section 3, "AdaGN".
    """
    plainly = not torch.is_grad_enabled() and x.dtype == torch.float32 and x[0, 0].numel() < LARGE
    if x.device.type == "cpu" and not plainly and not torch.compiler.is_compiling():
        return _ModulatedNorm.apply(x, gain.float(), offset.float(), groups, silu)
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
    """Works on `b n c`, n pixels of c channels: everything is a row operation there.

    What happens between reading x and writing the result is in float32 even if x is not: element by
    element bfloat16 costs the CPU up to eight times as much, a conversion a third of one pass.  It
    happens to a few samples at a time, so that it stays in the cache and asks for no new memory.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, offset: Tensor, groups: int, silu: bool) -> Tensor:
        unit, scale = _normalized(x, groups)
        gain, offset = gain[:, None], offset[:, None]
        ctx.save_for_backward(unit, scale, gain, offset)
        ctx.silu, ctx.groups = silu, groups  # type: ignore[attr-defined]
        learning = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        out = torch.empty_like(unit) if learning else unit
        for y, u, g, o in _samples(out, unit, gain, offset):
            z = torch.addcmul(o, u, g, out=y if y.dtype == torch.float32 else None)
            z = F.silu(z, inplace=True) if silu else z
            if z is not y:
                y.copy_(z)
        return _as_image(out, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        unit, scale, gain, offset = ctx.saved_tensors  # type: ignore[attr-defined]
        silu, groups = ctx.silu, ctx.groups  # type: ignore[attr-defined]
        rows = _as_rows(grad)
        d_x, d_affine = torch.empty_like(rows), gain.new_empty(len(rows), 2, gain.shape[2])
        for d_u, d_a, dy, u, s, g, o in _samples(d_x, d_affine, rows, unit, scale, gain, offset):
            dz = dy.float()
            if silu:
                dz = torch.ops.aten.silu_backward(dz, torch.addcmul(o, u, g))
            torch.cat([dz.sum(1, keepdim=True), (dz * u).sum(1, keepdim=True)], dim=1, out=d_a)
            lean, turn = (_group_mean(g * d_a, groups) * (s / -rows.shape[1])).split(1, dim=1)
            d_u.copy_(torch.addcmul(lean, u, turn).addcmul_(dz, s * g))
        d_offset, d_gain = d_affine.unbind(1)
        return _as_image(d_x, grad), d_gain, d_offset, None, None


def _samples(rows: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """All of these, as many samples at a time as stay in the cache."""
    few = max(1, CACHED // rows[0].numel())
    if few >= len(rows):
        return iter([(rows, *parts)])
    return zip(*(part.split(few) for part in (rows, *parts)), strict=True)


def _normalized(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Rows of zero mean and unit variance in each group, and 1 / standard deviation as `b 1 c`."""
    batch, channels, height, width = x.shape
    pixels = height * width
    if pixels >= LARGE:
        one, zero = torch.ones(channels), torch.zeros(channels)
        unit, _, rstd = torch.native_group_norm(x, one, zero, batch, channels, pixels, groups, EPSILON)
        return _as_rows(unit), rstd.repeat_interleave(channels // groups, dim=1)[:, None]
    rows = _as_rows(x).float()  # the library's loop over small maps is not vectorised: 10 times slower
    sums = torch.cat([rows.sum(1, keepdim=True), (rows * rows).sum(1, keepdim=True)], dim=1)
    mean, square = (_group_mean(sums, groups) / pixels).split(1, dim=1)
    scale = torch.rsqrt((square - mean**2).clamp_min(0) + EPSILON)
    return torch.addcmul(-mean * scale, rows, scale).to(x.dtype), scale


def _group_mean(values: Tensor, groups: int) -> Tensor:
    """Mean over the channels of each group, given back to each of its channels: `b n c` to `b n c`."""
    parts = values.unflatten(2, (groups, -1))
    return parts.mean(3, keepdim=True).expand_as(parts).flatten(2)


def _as_rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _as_image(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


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


class ResBlock(nn.Module):
    """Two convolutions, told the noise level in between, beside a shortcut; may halve or double the size.

    The second convolution starts at zero, so that a new block passes its input on.

    Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 3; resampling as in BigGAN.
    """

    def __init__(
        self, in_channels: int, out_channels: int, shared: Shared, *, resample: Resample = "same"
    ) -> None:
        super().__init__()
        self.resample: Resample = resample
        self.scale_shift = shared.scale_shift
        self.norm_in = Norm(in_channels, shared.groups)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.level = nn.Linear(shared.level_width, out_channels * (2 if shared.scale_shift else 1))
        self.norm_out = Norm(out_channels, shared.groups)
        self.dropout = nn.Dropout(shared.dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b o h2 w2"]:
        h = self.conv_in(resampled(self.norm_in(x), self.resample))
        level = self.level(told.level)
        h = self.norm_out(h, level) if self.scale_shift else self.norm_out(h + level[:, :, None, None])
        return self.shortcut(resampled(x, self.resample)) + self.conv_out(self.dropout(h))


class Attention(nn.Module):
    """Every pixel looks at every pixel and, where there is a caption, at its tokens: one softmax over both.

    Rows of `qkv` are ordered query, key, value, each of them head by head.

    Source: Nichol et al. 2022 (arXiv:2112.10741), section 2.1.
    """

    def __init__(self, channels: int, shared: Shared) -> None:
        super().__init__()
        self.head_width = channels // shared.heads_of(channels)
        self.norm = Norm(channels, shared.groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.text = nn.Linear(shared.text_width, 2 * channels) if shared.text_width else None
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b c h w"]:
        rows = self.norm(x, silu=False).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = self._heads(self.qkv(rows), 3)
        if self.text is not None and told.text is not None:
            text_key, text_value = self._heads(self.text(told.text), 2)
            key, value = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
        heard = None if told.heard is None else F.pad(told.heard, (0, rows.shape[1]), value=True)
        seen = attend(query, key, value, None if heard is None else heard[:, None, None])
        out = self.out(seen.transpose(1, 2).flatten(2))
        return x + out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _heads(self, rows: Float[Tensor, " b n pc"], parts: int) -> tuple[Tensor, ...]:
        """Each part as `b heads n head_width`."""
        return rows.unflatten(2, (parts, -1, self.head_width)).permute(2, 0, 3, 1, 4).unbind(0)


class Resized(nn.Module):
    """Half or twice the size, by one convolution: strided, or after repeating pixels.

    Source: Ho et al. 2020 (arXiv:2006.11239), kept by latent diffusion.
    """

    def __init__(self, channels: int, how: Resample) -> None:
        super().__init__()
        self.how: Resample = how
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if how == "down" else 1, padding=1)

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b c h2 w2"]:
        return self.conv(resampled(x, "up") if self.how == "up" else x)


def resampled(x: Float[Tensor, " b c h w"], how: Resample) -> Float[Tensor, " b c h2 w2"]:
    """The same, halved by averaging or doubled by repetition."""
    match how:
        case "same":
            return x
        case "down":
            return F.avg_pool2d(x, 2)
        case "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        case _:
            assert_never(how)


def zeroed(module: M) -> M:
    """The module with all its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
