"""Building blocks of image networks: residual blocks told the noise level, attention, changes of size.

Every block maps features `b c h w` to features `b c h w`, kept in memory with channels innermost
(channels_last), and is told the noise level and, if it attends, the caption's keys and values (`Told`).
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dd_core.devices import kind_of
from dd_core.nets.attention import attend
from dd_core.nets.conv import Conv
from dd_core.nets.norm import EPSILON, Norm

Resample = Literal["same", "down", "up"]
Pads = Literal["around", "after"]
M = TypeVar("M", bound=nn.Module)


class Told(NamedTuple):
    """The conditioning that all blocks of a network share."""

    level: Float[Tensor, " b e"]
    """SiLU of the embedded noise level, with all that is added to it."""
    keys: Mapping[nn.Linear, Float[Tensor, " b l k"]] = MappingProxyType({})
    """Output of each layer that projects the caption: keys, values or both."""
    heard: Bool[Tensor, " b l"] | None = None
    """Which tokens of the caption count; None: all of them."""
    made: Mapping[nn.Linear, Float[Tensor, " b k"]] = MappingProxyType({})
    """Outputs of layers for `level`, where they were computed as one product (`Together`)."""

    def by(self, layer: nn.Linear) -> Float[Tensor, " b k"]:
        """The output of a layer for `level`."""
        return self.made[layer] if layer in self.made else layer(self.level)


class Together:
    """Linear layers of the same input, computed as one matrix product on a CPU if they are frozen.

    For one image the call of a layer costs more than its product.  The weights are concatenated once, and
    again when they change, as in `Conv`; at every call that would cost a large network more than it saves.

    Args:
        layers: Each with a bias, of equal in_features.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = tuple(layers)
        self.widths = [layer.out_features for layer in layers]
        self.made_of: tuple[tuple[int, int], ...] = ()
        self.side_by_side: tuple[Tensor, ...] = ()

    def __call__(self, x: Float[Tensor, " b e"]) -> dict[nn.Linear, Tensor]:
        """The output of each layer for x; empty if the layers are to be called one by one."""
        alone = torch.is_grad_enabled() or torch.compiler.is_compiling() or kind_of(x) != "cpu"
        if alone or type(x) is not Tensor:
            return {}
        parts = [part for layer in self.layers for part in (layer.weight, layer.bias)]
        if any(part.requires_grad or part.is_inference() for part in parts):  # inference: no version counter
            return {}
        made_of = tuple((part.data_ptr(), part._version) for part in parts)
        if made_of != self.made_of:
            self.side_by_side = torch.cat(parts[::2]), torch.cat(parts[1::2])
            self.made_of = made_of
        made = F.linear(x, *self.side_by_side).split(self.widths, dim=-1)
        return dict(zip(self.layers, made, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Without the concatenated weights, which can be made again."""
        return self.__dict__ | {"made_of": (), "side_by_side": ()}


def read_by(layers: Sequence[nn.Linear], text: Float[Tensor, " b l d"]) -> Float[Tensor, " b l k"]:
    """Outputs of several layers for a caption, concatenated: `Conditioning.read`."""
    return torch.cat([layer(text) for layer in layers], dim=-1)


def apart(layers: Sequence[nn.Linear], read: Float[Tensor, " b l k"]) -> dict[nn.Linear, Tensor]:
    """The output of each layer, split out of that of `read_by`."""
    parts = read.split([layer.out_features for layer in layers], dim=-1)
    return dict(zip(layers, parts, strict=True))


class Shared(NamedTuple):
    """What all blocks of one network have in common."""

    level_width: int
    groups: int
    scale_shift: bool = True
    dropout: float = 0.0
    head_width: int = 64
    text_width: int = 0
    heads: int = 0
    """Heads of every attention; 0: channels // head_width."""
    transformer_depth: int = 0
    """Layers of each `CrossTransformer`; 0: a joint `Attention` instead."""
    epsilon: float = EPSILON
    """Added to the variance by every normalisation of a map except the one before a transformer."""

    def heads_of(self, channels: int) -> int:
        """Heads of an attention over that many channels."""
        return self.heads or channels // self.head_width


def sinusoids(
    values: Float[Tensor, " b"], width: int, *, sine_first: bool = False, freq_shift: int = 0
) -> Float[Tensor, " b w"]:
    """Cosines, then sines, of `values` at width / 2 frequencies that fall from 1 to 1 / 10000, float32.

    Args:
        values: Scaled so that differences of about 1 matter.
        width: Even.
        sine_first: The sines before the cosines.
        freq_shift: 1: the last frequency is 1 / 10000; 0: the one after the last would be.

    Source: the timestep embedding of Ho et al. 2020 (arXiv:2006.11239) in the order and at the frequencies
    of ADM; the original differs in both.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / (half - freq_shift)
    angles = values.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    waves = (angles.sin(), angles.cos()) if sine_first else (angles.cos(), angles.sin())
    return torch.cat(waves, dim=1)


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
        self.norm_in = Norm(in_channels, shared.groups, shared.epsilon)
        self.conv_in = Conv(in_channels, out_channels, 3, padding=1)
        self.level = nn.Linear(shared.level_width, out_channels * (2 if shared.scale_shift else 1))
        self.norm_out = Norm(out_channels, shared.groups, shared.epsilon)
        self.dropout = nn.Dropout(shared.dropout)
        self.conv_out = zeroed(Conv(out_channels, out_channels, 3, padding=1))
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = Conv(in_channels, out_channels, 1)

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b o h2 w2"]:
        h = self.conv_in(resampled(self.norm_in(x), self.resample))
        level = told.by(self.level)
        h = self.norm_out(h, level) if self.scale_shift else self.norm_out(h + level[:, :, None, None])
        return self.conv_out(self.dropout(h), onto=self.shortcut(resampled(x, self.resample)))


class Attention(nn.Module):
    """Every pixel looks at every pixel and, where there is a caption, at its tokens: one softmax over both.

    Rows of `qkv` are ordered query, key, value, each of them head by head.

    Source: Nichol et al. 2022 (arXiv:2112.10741), section 2.1.
    """

    def __init__(self, channels: int, shared: Shared) -> None:
        super().__init__()
        self.head_width = channels // shared.heads_of(channels)
        self.norm = Norm(channels, shared.groups, shared.epsilon)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.text = nn.Linear(shared.text_width, 2 * channels) if shared.text_width else None
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b c h w"]:
        rows = self.norm(x, silu=False).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = self._heads(self.qkv(rows), 3)
        if self.text is not None:
            text_key, text_value = self._heads(told.keys[self.text], 2)
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

    Args:
        channels: Of the map, before and after.
        how: "down" or "up".
        pads: around: zeros on all sides of a map to be halved; after: one row below, one column to the right.

    Source: Ho et al. 2020 (arXiv:2006.11239), which pads after; latent diffusion pads around.
    """

    def __init__(self, channels: int, how: Resample, *, pads: Pads = "around") -> None:
        super().__init__()
        self.how: Resample = how
        self.after = how == "down" and pads == "after"
        self.conv = Conv(
            channels, channels, 3, stride=2 if how == "down" else 1, padding=0 if self.after else 1
        )

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b c h2 w2"]:
        if self.after:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(resampled(x, "up") if self.how == "up" else x)


def unrounded(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer in the dtype of its weights, also under autocast.

    For the embedding of the noise level and for last layers.

    Source: ADM (arXiv:2105.05233) keeps the embedding of the timestep and the last layer in float32.
    """
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return layer(x.to(next(layer.parameters()).dtype))


def resampled(x: Float[Tensor, " b c h w"], how: Resample) -> Float[Tensor, " b c h2 w2"]:
    """The features as they are, halved by averaging, or doubled by repetition."""
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
