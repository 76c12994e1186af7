"""A transformer over patches between convolutions at higher resolution: the backbone for small budgets.

Pixels are folded into patches of side `stem`, on which residual convolutions work.  A further fold by 2 leads
to the grid where a transformer does most of the work; it is told sigma by adaptive norms and the caption by
keys and values beside the image's own.  Then back up, with a skip connection.

Sources: Peebles & Xie 2023 (arXiv:2212.09748, adaLN-zero), Hoogeboom et al. 2023 (arXiv:2301.11093, the
transformer in the middle of a U), Nichol et al. 2022 (arXiv:2112.10741, section 2.1, caption as extra keys).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.denoiser import Conditioning
from dd_core.nets.attention import attend
from dd_core.nets.clip import ReadCaption
from dd_core.nets.conv import Conv
from dd_core.nets.layers import Told, apart, read_by, unrounded
from dd_core.nets.places import grid_waves, wave
from dd_core.spec import Spec


class DiTSpec(Spec):
    """Size of the transformer and of the convolutions around it."""

    kind: Literal["dit"] = "dit"
    image_size: int = Field(64, ge=8)
    stem: int = Field(4, ge=1)
    """Pixels folded into one position of the convolutions."""
    conv_width: int = Field(96, ge=8, multiple_of=8)
    conv_blocks: int = Field(2, ge=0)
    """Residual blocks on the way down, and as many on the way up."""
    width: int = Field(256, ge=8, multiple_of=8)
    layers: int = Field(6, ge=1)
    head_width: int = Field(64, ge=8)
    text_width: int = Field(0, ge=0)
    """Width of the caption's states; 0: the network is not told a caption."""
    caption_width: int = Field(0, ge=0)
    """Width of the embedding of the whole caption; if set, the norms are told the caption, too."""
    text_layers: int = Field(1, ge=0)
    """Transformer layers over the caption's states, without causal mask, before the image attends to them."""
    embedding_width: int = Field(0, ge=0)
    """Width of the image embedding; 0: not told one."""

    @property
    def groups(self) -> int:
        """Groups of each GroupNorm of the convolutions."""
        return self.conv_width // 16 or 1

    @model_validator(mode="after")
    def _fits(self) -> "DiTSpec":
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} must divide by head_width {self.head_width}")
        if self.conv_width % self.groups:
            raise ValueError(
                f"conv_width {self.conv_width} does not split into {self.groups} groups; take "
                f"{-(-self.conv_width // 16) * 16}"
            )
        if self.image_size % (2 * self.stem):
            raise ValueError(f"image_size {self.image_size} must divide by {2 * self.stem}, twice the stem")
        if self.caption_width and not self.text_width:
            raise ValueError("caption_width without text_width tells no caption; set both, or leave it out")
        return self


class Modulation(nn.Module):
    """Shifts, scales and gates of a block: `count` vectors per sample, all zero at the start (adaLN-zero)."""

    def __init__(self, told: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(told, count * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, told: Float[Tensor, " b t"]) -> tuple[Tensor, ...]:
        return self.linear(told)[:, None].chunk(self.count, dim=-1)


class Attention(nn.Module):
    """Self-attention whose keys and values may be joined by those of a caption."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.context = nn.Linear(context_width, 2 * width) if context_width else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, " b n d"], told: Told | None = None) -> Float[Tensor, " b n d"]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.context is not None and told is not None:
            more_k, more_v = told.keys[self.context].chunk(2, dim=-1)
            k, v = torch.cat([more_k, k], 1), torch.cat([more_v, v], 1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, both scaled, shifted and gated by what the block is told.

    Gates start at one, not at zero as in DiT: a small budget has no steps to spend on opening them.
    """

    def __init__(self, width: int, heads: int, told: int, context_width: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(width, heads, context_width)
        last = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), last)
        self.modulation = Modulation(told, width, 6)
        for out in (self.attention.out, last):
            out.weight.data.mul_(depth**-0.5)

    def forward(self, x: Float[Tensor, " b n d"], told: Told) -> Float[Tensor, " b n d"]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(told.level)
        x = x + (1 + gate) * self.attention(self.norms[0](x) * (1 + scale) + shift, told)
        return x + (1 + gate_mlp) * self.mlp(self.norms[1](x) * (1 + scale_mlp) + shift_mlp)


class TextBlock(nn.Module):
    """A plain pre-norm transformer block over the caption's states."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads, 0)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, " b l d"]) -> Float[Tensor, " b l d"]:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ConvBlock(nn.Module):
    """A residual block of two convolutions, told sigma by a scale and a shift."""

    def __init__(self, width: int, groups: int, told: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.enter = Conv(width, width, 3, padding=1)
        self.leave = Conv(width, width, 3, padding=1)
        self.modulation = Modulation(told, width, 2)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, " b c h w"], told: Told) -> Float[Tensor, " b c h w"]:
        shift, scale = (part[:, 0, :, None, None] for part in self.modulation(told.level))
        return x + self.leave(F.silu(self.enter(self.norm(x) * (1 + scale) + shift)))


class DiT(nn.Module):
    """Network of a diffusion model: noisy image, log sigma and conditioning -> what it predicts.

    The output has the dtype of the image, whatever that of the weights.
    """

    def __init__(self, spec: DiTSpec, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spec = spec
        grid, heads = spec.image_size // spec.stem // 2, spec.width // spec.head_width
        self.fold = nn.PixelUnshuffle(spec.stem)
        self.enter = Conv(in_channels * spec.stem**2, spec.conv_width, 3, padding=1)
        self.told = nn.Sequential(nn.Linear(256, spec.width), nn.SiLU(), nn.Linear(spec.width, spec.width))
        self.down = nn.ModuleList(
            ConvBlock(spec.conv_width, spec.groups, spec.width) for _ in range(spec.conv_blocks)
        )
        self.to_grid = Conv(spec.conv_width, spec.width, 2, stride=2)
        self.places = nn.Parameter(grid_waves(grid, spec.width)[None])
        self.blocks = nn.ModuleList(
            Block(spec.width, heads, spec.width, spec.text_width and spec.width, 2 * spec.layers)
            for _ in range(spec.layers)
        )
        self.from_grid = nn.Linear(spec.width, 4 * spec.conv_width)
        self.join = Conv(2 * spec.conv_width, spec.conv_width, 1)
        self.up = nn.ModuleList(
            ConvBlock(spec.conv_width, spec.groups, spec.width) for _ in range(spec.conv_blocks)
        )
        self.leave = Conv(spec.conv_width, out_channels * spec.stem**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(spec.stem)
        if spec.text_width:
            self.text_in = nn.Linear(spec.text_width, spec.width)
            self.text_blocks = nn.ModuleList(TextBlock(spec.width, heads) for _ in range(spec.text_layers))
            self.text_out = nn.LayerNorm(spec.width)
        if spec.text_width and spec.caption_width:
            self.caption_in = nn.Linear(spec.caption_width, spec.width)
            self.caption_told = nn.Linear(spec.width, spec.width)
        if spec.embedding_width:
            self.embedding = nn.Linear(spec.embedding_width, spec.width)
        attending = [part.context for part in self.modules() if isinstance(part, Attention)]
        self.reading = tuple(layer for layer in attending if layer is not None)

    def prepared(self, cond: Conditioning) -> Conditioning:
        """The same conditioning with its caption's keys and values computed, for all later calls."""
        if not self.reading or cond.read is not None:
            return cond
        if cond.text is None:
            raise ValueError("this network is told text, but Conditioning.text is None")
        return cond._replace(read=read_by(self.reading, cond.text.to(self.places.dtype)))

    def read(self, caption: ReadCaption) -> Float[Tensor, " b m d"]:
        """The caption's states for the blocks, independent of x and sigma, so computed once per request."""
        dtype = self.text_in.weight.dtype
        x = self.text_in(caption.states.to(dtype))
        if self.spec.caption_width:
            whole = caption.embedding * caption.embedding.shape[-1] ** 0.5
            x = torch.cat([self.caption_in(whole.to(dtype))[:, None], x], 1)
        for block in self.text_blocks:
            x = block(x)
        return self.text_out(x)

    def heard(self, cond: Conditioning) -> Tensor:
        """Caption and image embedding as one vector per image; zeros if the network is told neither."""
        heard = self.places.new_zeros(1, self.spec.width)
        if self.spec.embedding_width and cond.image_embedding is not None:
            unit = cond.image_embedding * self.spec.embedding_width**0.5
            heard = heard + self.embedding(unit.to(self.places.dtype))
        if self.spec.caption_width and cond.text is not None:
            heard = heard + self.caption_told(cond.text[:, 0].to(self.places.dtype))
        return heard

    def forward(
        self, x: Float[Tensor, " b c h w"], log_sigma: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b o h w"]:
        cond, dtype = self.prepared(cond), self.places.dtype
        level = F.silu(unrounded(self.told, wave(log_sigma / 4, 256)) + self.heard(cond))
        h = x if cond.image is None else torch.cat([x, cond.image], 1)
        h = self.enter(self.fold(h.to(dtype)))
        told = Told(level, {} if cond.read is None else apart(self.reading, cond.read.to(h.dtype)))
        for block in self.down:
            h = block(h, told)
        skip, tokens = h, self.to_grid(h)
        size = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens, told)
        h = self.from_grid(tokens).transpose(1, 2).unflatten(2, size)
        h = self.join(torch.cat([F.pixel_shuffle(h, 2), skip], 1))
        for block in self.up:
            h = block(h, told)
        return self.unfold(unrounded(self.leave, h)).to(x.dtype)
