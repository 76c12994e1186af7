"""The autoencoder: images to small latents and back, by convolutions, through a Gaussian or a codebook.

The layout, down to the names of the weights, is that of latent diffusion (Rombach et al. 2022,
arXiv:2112.10752, appendix G), so published autoencoders load as they are: GroupNorm with eps 1e-6,
SiLU, halving by a stride-2 convolution padded at the right and the bottom only, doubling by repeating
pixels and convolving, attention in the middle, 1x1 convolutions on both sides of the latent.

Images are in [-1, 1]; latents leave `encode` with a standard deviation of about one.  With a codebook
`encode` returns them before quantisation, which belongs to the decoder: the output of a diffusion model
need not be a vector of the codebook (section 3.1 there).
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.nets.conv import Conv
from dd_core.nets.norm import Norm
from dd_core.nets.quantiser import Quantiser, straight_through
from dd_core.spec import Spec


class AutoencoderNetSpec(Spec):
    """Size of both halves; the defaults are the f8 z4 of Stable Diffusion (83.65 M parameters)."""

    width: int = Field(128, ge=1)
    """Channels of the finest level."""
    channel_mult: tuple[int, ...] = Field((1, 2, 4, 4), min_length=1)
    """Channels of each level over `width`; each level but the last halves the side."""
    blocks: int = Field(2, ge=1)
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention_levels: tuple[int, ...] = ()
    """Levels, 0 the finest, whose blocks are followed by attention."""
    mid_attention: bool = True
    """Attention in the middle of both halves; without it latents are local and crops stand for images."""
    norm: Literal["group", "none"] = "group"
    """GroupNorm as published; or none, which is quicker, learns flat colours at once and, since nothing is
    averaged over the picture, encodes a crop as it encodes the whole.  Small nets only."""
    groups: int = Field(32, ge=1)
    """Of GroupNorm."""
    latent_channels: int = Field(4, ge=1)
    codes: int = Field(0, ge=0)
    """Vectors of the codebook; 0: none, the bottleneck is a Gaussian."""
    stem: int = Field(1, ge=1)
    """Side of the square of pixels folded into channels before the first convolution; 1 is as published."""

    @property
    def factor(self) -> int:
        """Pixels of the image per side of one latent."""
        return self.stem * 2 ** (len(self.channel_mult) - 1)

    @property
    def norm_groups(self) -> int:
        """Groups of every norm; 0 for none."""
        return self.groups if self.norm == "group" else 0

    @property
    def encoded_channels(self) -> int:
        """Output channels of the encoder: a latent, or the mean and log variance of one."""
        return self.latent_channels * (1 if self.codes else 2)

    @model_validator(mode="after")
    def _fits(self) -> "AutoencoderNetSpec":
        if self.norm == "group" and self.width % self.groups:
            raise ValueError(f"width {self.width} must be a multiple of groups {self.groups}")
        if any(level not in range(len(self.channel_mult)) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} must lie in 0..{len(self.channel_mult) - 1}"
            )
        return self


class Posterior(NamedTuple):
    """Distribution of the latent given the image: a Gaussian for each of its values, unscaled."""

    mean: Float[Tensor, " b z h w"]
    logvar: Float[Tensor, " b z h w"]

    def draw(self, noise: Float[Tensor, " b z h w"]) -> Float[Tensor, " b z h w"]:
        """A latent, given standard normal noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class NoNorm(nn.Module):
    """In place of a norm: SiLU if it follows, nothing else."""

    def forward(self, x: Float[Tensor, " b c h w"], *, silu: bool = True) -> Float[Tensor, " b c h w"]:
        return F.silu(x) if silu else x


def norm(channels: int, groups: int) -> nn.Module:
    """Normalisation in groups; none for no groups."""
    return Norm(channels, groups, epsilon=1e-6) if groups else NoNorm()


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(channels_in, groups)
        self.conv1 = Conv(channels_in, channels, 3, padding=1)
        self.norm2 = norm(channels, groups)
        self.conv2 = Conv(channels, channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b d h w"]:
        h = self.conv1(self.norm1(x))
        return self.conv2(self.norm2(h), onto=self.nin_shortcut(x))


class Attention(nn.Module):
    """Every position reads every other, with one head over all channels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b c h w"]:
        normed = self.norm(x, silu=False)
        q, k, v = (layer(normed).flatten(2).mT.contiguous()[:, None] for layer in (self.q, self.k, self.v))
        read = F.scaled_dot_product_attention(q, k, v)[:, 0]  # without the axis of heads not fused on GPUs
        return x + self.proj_out(read.mT.reshape(x.shape))


class Downsample(nn.Module):
    """Half the side; padded at the right and the bottom only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b c i j"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b c i j"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one size, each perhaps followed by attention, then a change of size."""

    def __init__(self, widths: tuple[int, ...], *, attends: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(before, after, groups) for before, after in pairwise(widths))
        self.attn = nn.ModuleList(Attention(width, groups) for width in widths[1:] if attends)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b d i j"]:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Two residual blocks round attention, at the coarsest size."""

    def __init__(self, channels: int, *, attends: bool, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attn_1 = Attention(channels, groups) if attends else nn.Identity()
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Float[Tensor, " b c h w"]) -> Float[Tensor, " b c h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image -> mean and log variance of the latent, or the latent itself; before the 1x1 convolution."""

    def __init__(self, spec: AutoencoderNetSpec) -> None:
        super().__init__()
        widths = [spec.width * mult for mult in spec.channel_mult]
        self.stem = nn.PixelUnshuffle(spec.stem)
        self.conv_in = Conv(3 * spec.stem**2, spec.width, 3, padding=1)
        self.down = nn.ModuleList()
        for index, (before, width) in enumerate(zip([spec.width, *widths], widths, strict=False)):
            attends = index in spec.attention_levels
            level = Level((before, *[width] * spec.blocks), attends=attends, groups=spec.norm_groups)
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], attends=spec.mid_attention, groups=spec.norm_groups)
        self.norm_out = norm(widths[-1], spec.norm_groups)
        self.conv_out = Conv(widths[-1], spec.encoded_channels, 3, padding=1)

    def forward(self, image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b z2 i j"]:
        x = self.conv_in(self.stem(image))
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    """Latent -> image."""

    def __init__(self, spec: AutoencoderNetSpec) -> None:
        super().__init__()
        widths = [spec.width * mult for mult in spec.channel_mult]
        self.conv_in = Conv(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], attends=spec.mid_attention, groups=spec.norm_groups)
        self.up = nn.ModuleList()
        for index, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            attends = index in spec.attention_levels
            level = Level((before, *[width] * (spec.blocks + 1)), attends=attends, groups=spec.norm_groups)
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = norm(spec.width * spec.channel_mult[0], spec.norm_groups)
        self.conv_out = Conv(spec.width * spec.channel_mult[0], 3 * spec.stem**2, 3, padding=1)
        self.stem = nn.PixelShuffle(spec.stem)

    def forward(self, latent: Float[Tensor, " b z i j"]) -> Float[Tensor, " b 3 h w"]:
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.stem(self.conv_out(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder, and the scale at which their latents have a standard deviation of one.

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G (rescaling of the latent).
    """

    moments: Tensor
    """Running mean and mean square of the latents of training."""
    observed: Tensor
    """Batches that `moments` has seen."""

    def __init__(self, spec: AutoencoderNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quant_conv = nn.Conv2d(spec.encoded_channels, spec.encoded_channels, 1)
        self.post_quant_conv = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1)
        self.initialise()
        self.quantiser = Quantiser(spec.codes, spec.latent_channels) if spec.codes else None
        self.register_buffer("moments", torch.tensor([0.0, 1.0]))
        self.register_buffer("observed", torch.tensor(0))

    @torch.no_grad()
    def initialise(self) -> None:
        """Initial weights: signals keep their variance, and latents are drawn with a deviation of 0.05.

        So a run of minutes spends no steps on amplifying its signals or on unlearning noise.  Without norms
        every residual block begins as its shortcut (Zhang et al. 2019, arXiv:1901.09321).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock) and not self.spec.norm_groups:
                nn.init.zeros_(module.conv2.weight)
        if self.spec.codes:
            return
        mean_and_logvar, latent_channels = self.quant_conv, self.spec.latent_channels
        mean_and_logvar.weight[latent_channels:] = 0
        if mean_and_logvar.bias is not None:
            mean_and_logvar.bias[latent_channels:] = -6

    def posterior(self, image: Float[Tensor, " b 3 h w"]) -> Posterior:
        """The Gaussian of an image's latent; the sides of the image are multiples of `spec.factor`."""
        assert self.quantiser is None, "with a codebook there is no Gaussian; see `unquantised`"
        mean, logvar = self.quant_conv(self.encoder(image)).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def unquantised(self, image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b z i j"]:
        """The latent of an image before quantisation, unscaled."""
        assert self.quantiser is not None, "without a codebook there is a Gaussian; see `posterior`"
        return self.quant_conv(self.encoder(image)).float()

    def generate(
        self, latent: Float[Tensor, " b z h w"], *, quantise: bool = True
    ) -> Float[Tensor, " b 3 i j"]:
        """The image of an unscaled latent; not clipped.  Training quantises before this call.

        Where a gradient is asked for, it passes the quantiser as if nothing were rounded there.
        """
        if quantise and self.quantiser is not None:
            vectors = self.quantiser(latent).vectors
            latent = straight_through(latent, vectors) if latent.requires_grad else vectors
        return self.decoder(self.post_quant_conv(latent)).float()

    @torch.no_grad()
    def observe(self, mean: Float[Tensor, " b z h w"]) -> None:
        """Update `moments`, a mean over about the last 100 batches, by a batch of latents from every rank."""
        now = torch.stack([mean.mean(), mean.square().mean()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(now)
            now /= torch.distributed.get_world_size()
        if not now.isfinite().all():
            return  # the gradient of this batch will be refused as well
        self.observed += 1
        self.moments.lerp_(now, (1 / self.observed).clamp(min=0.01))

    def scale(self) -> Float[Tensor, ""]:
        """What latents are multiplied by: one over their standard deviation in training."""
        mean, mean_square = self.moments
        return (mean_square - mean.square()).clamp(min=1e-12).rsqrt()

    def encode(
        self, image: Float[Tensor, " b 3 h w"], noise: Float[Tensor, " b z i j"] | None = None
    ) -> Float[Tensor, " b z i j"]:
        """Images in [-1, 1] -> scaled latents: the mean of the posterior, or a draw if noise is given."""
        if self.quantiser is not None:
            return self.scale() * self.unquantised(image)
        posterior = self.posterior(image)
        return self.scale() * (posterior.mean if noise is None else posterior.draw(noise))

    def decode(self, latent: Float[Tensor, " b z i j"]) -> Float[Tensor, " b 3 h w"]:
        """Scaled latents -> images in [-1, 1]."""
        return self.generate(latent / self.scale()).clamp(-1, 1)

    def reconstruct(self, image: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b 3 h w"]:
        """An image encoded, then decoded."""
        return self.decode(self.encode(image))
