"""What a chain is, and its network: see `chain`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import nn

from dd_core.denoiser import NetworkDenoiser, Parameterization, Tell, consistency_time
from dd_core.nets.dit import DiT, DiTSpec
from dd_core.nets.network import PlainSpec, build
from dd_core.nets.text import CaptionedSpec, UnclipSpec
from dd_core.nets.unet import UNetSpec
from dd_core.schedules import Clock, LogNormalSpec, ScheduleSpec, sigma_range
from dd_core.stage import ClipNeeds, EmbeddedBy, LearnedSpec
from dd_core.text import END

ChainNet = Annotated[DiTSpec | PlainSpec | CaptionedSpec | UnclipSpec, Field(discriminator="kind")]
"""The networks that can be trained on a chain."""


def levels_kind(levels: Any) -> str:
    """The kind of noise levels; specs of timesteps, which are older, have no `kind`."""
    kind = levels.get("kind") if isinstance(levels, dict) else getattr(levels, "kind", None)
    return "timesteps" if kind is None else str(kind)


Levels = Annotated[
    Annotated[ScheduleSpec, Tag("timesteps")] | Annotated[LogNormalSpec, Tag("lognormal")],
    Discriminator(levels_kind),
]
"""The noise levels of a chain: of timesteps, or all (EDM)."""


class ChainSpec(LearnedSpec):
    """A diffusion model: noise -> picture or latent, conditioned on what its network takes."""

    kind: Literal["chain"] = "chain"
    net: ChainNet
    """A UNet with level_scale 1 is told the timestep, or 250 log sigma where there are none, as published;
    every other network log sigma."""
    image_size: int = Field(64, ge=8)
    """Side of the pictures, in pixels."""
    embedded_at: int | None = Field(None, ge=8)
    """Side of the prepared images whose embeddings it is told, the same as its prior's; None: image_size."""
    latent_channels: int = Field(0, ge=0)
    """Channels of the latents of the parent autoencoder that it paints; 0: it paints pixels."""
    factor: int = Field(1, ge=1)
    """Above 1 the chain enlarges: it is told the picture made this many times smaller."""
    enlarged_by: Literal["bilinear", "bicubic"] = "bilinear"
    """How the smaller picture is enlarged for the network: bilinear (ADM, GLIDE), or bicubic, antialiased
    (Karlo)."""
    degrades: Literal["none", "blur", "bsr"] = "none"
    """How the smaller picture of a chain that enlarges is degraded in training: `degradations` (unCLIP)."""
    crop: int = Field(0, ge=0)
    """Side of the random crops of the pictures that it trains on, in pixels; 0: whole pictures.  It paints
    whole pictures either way, so its network must have no position embeddings."""
    inpaints: bool = False
    """Whether it is told a picture with a hole, and a mask: x's channels and one more."""
    mask_of: Literal["known", "hole"] = "known"
    """Where the mask is 1, and where it stands: of what is known, after the picture (GLIDE), or of the hole,
    before it (Stable Diffusion)."""
    schedule: Levels = ScheduleSpec()
    rescaled_time: bool = False
    """Told t * 1000 / T instead of t (Improved DDPM)."""
    predicts: Parameterization = "eps"
    """consistency: only for the base of a consistency model that is the identity at its lowest level; cannot
    be trained as a chain."""
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    """simple: squared error of what is predicted; hybrid: with the variational bound added, for a network
    that learns its variance too; vlb: the bound alone, at timesteps drawn by their losses (Improved DDPM)."""
    bound_rescaled: bool = True
    """In the hybrid loss the bound is weighted by T / 1000 (Improved DDPM; ADM has T = 1000, so weight 1)."""
    told_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of captions and classes dropped, for classifier-free guidance; unCLIP: 0.5, GLIDE: 0.2.  If above
    0, the last of the network's labels is the null class."""
    text_frozen: bool = False
    """Whether the network's own text transformer keeps the weights that it began with, the vectors for
    padding aside; for one that begins as the text tower of a CLIP and sees few pictures."""
    embedding_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of image embeddings dropped, independently."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level that it knows."""
        return sigma_range(self.schedule)

    @property
    def learns_variance(self) -> bool:
        """Whether its network predicts the variance too, with twice the channels."""
        return self.loss != "simple"

    @property
    def channels(self) -> int:
        """Of x."""
        return self.latent_channels or 3

    @property
    def unet(self) -> UNetSpec | None:
        """Its UNet, if that is what it has."""
        return None if isinstance(self.net, DiTSpec) else self.net.unet

    @property
    def labels(self) -> int:
        """Classes that the network is told, that of nothing included."""
        return self.unet.labels if self.unet else 0

    @property
    def classes(self) -> int:
        """Classes of the data."""
        return self.labels - bool(self.labels and self.told_dropout)

    @property
    def has_class_of_nothing(self) -> bool:
        """Whether the last of its network's labels says that no class is told."""
        return self.labels > self.classes

    @property
    def embedding_width(self) -> int:
        """Of the image embedding that it is told; 0: none."""
        return self.net.embedding_width if isinstance(self.net, DiTSpec) else self.net.unet.embedding_width

    @property
    def embedded_by(self) -> EmbeddedBy | None:
        """The parent CLIP, if its network is told embeddings."""
        width = self.embedding_width
        return EmbeddedBy("clip", width, self.embedded_at or self.image_size) if width else None

    @property
    def clip_needs(self) -> ClipNeeds | None:
        """States of captions unless it reads them itself, and embeddings; a DiT also those of captions."""
        if "clip" not in self.needs:
            return None
        net, told = self.net, bool(self.text_width)
        if isinstance(net, DiTSpec):
            widths = {"net.caption_width": net.caption_width, "net.embedding_width": net.embedding_width}
            return ClipNeeds({"net.text_width": net.text_width}, widths, captions=told)
        states = {"net.unet.text_width": net.unet.text_width}
        if isinstance(net, UnclipSpec):
            states = {"net.states_width": net.states_width}
        return ClipNeeds(states, {"net.unet.embedding_width": net.unet.embedding_width}, captions=told)

    @property
    def tokens(self) -> Mapping[str, int]:
        """Those that its own text transformer reads, if it has one."""
        return {"net.text.context_length": length} if (length := self.context_length) else {}

    @property
    def text_width(self) -> int:
        """Of the caption's states that it is told; 0: none."""
        return self.net.text_width if isinstance(self.net, DiTSpec) else self.net.unet.text_width

    @property
    def context_length(self) -> int:
        """Tokens of a caption, if it reads them itself; 0 if it does not."""
        return self.net.text.context_length if isinstance(self.net, CaptionedSpec) else 0

    @property
    def needs(self) -> tuple[str, ...]:
        """Roles of its parents."""
        clip = self.embedding_width or (self.text_width and not self.context_length)
        return (("clip",) if clip else ()) + (("autoencoder",) if self.latent_channels else ())

    @property
    def always_embedded(self) -> bool:
        """Whether it is told image embeddings, and never trains without one."""
        return self.embedding_width > 0 and self.embedding_dropout == 0

    @property
    def guides_itself(self) -> bool:
        """Whether it trains with dropped conditions, as classifier-free guidance needs."""
        told = (self.text_width or self.labels) and self.told_dropout
        return bool(told or (self.embedding_width and self.embedding_dropout))

    @property
    def told_channels(self) -> int:
        """Of `Conditioning.image`."""
        return 3 * (self.factor > 1) + (self.channels + 1) * self.inpaints

    @model_validator(mode="after")
    def _fits(self) -> "ChainSpec":
        for wrong, remedy in refused(self):
            if wrong:
                raise ValueError(remedy)
        return self


def refused(spec: ChainSpec) -> list[tuple[bool, str]]:
    """Checks of fields that do not go together: (whether it fails, what to do about it)."""
    net, out = spec.net, spec.channels * (1 + spec.learns_variance)
    latent, told = bool(spec.latent_channels), spec.told_channels
    continuous = isinstance(spec.schedule, LogNormalSpec)
    found = [
        (continuous and spec.learns_variance, f"loss {spec.loss} counts the bits of timesteps; use simple"),
        (
            spec.rescaled_time and (continuous or spec.unet is None or spec.unet.level_scale != 1),
            "rescaled_time is for networks that are told timesteps; leave it out",
        ),
        (latent and spec.learns_variance, f"loss {spec.loss} counts the bits of pixels; use simple"),
        (
            latent and spec.predicts == "edm",
            "predicts edm scales for pixels, whose deviation is about .5, and that of latents is 1; use v",
        ),
        (latent and spec.factor > 1, "an enlarging model paints pixels; set latent_channels: 0 or factor: 1"),
        (spec.image_size % spec.factor > 0, f"image_size {spec.image_size} must divide by {spec.factor}"),
        (
            bool(spec.embedded_at and not spec.embedding_width),
            "embedded_at is of image embeddings, and its network is told none; leave it out",
        ),
        (
            spec.mask_of != "known" and not spec.inpaints,
            f"mask_of {spec.mask_of} is for a model that is told holes; set inpaints, or leave it out",
        ),
        (
            spec.text_frozen and not spec.context_length,
            f"text_frozen is for a net of kind captioned, this one is {net.kind}; leave it out",
        ),
        *cropping(spec),
    ]
    if isinstance(net, DiTSpec):
        other = net.image_size != spec.image_size and not latent
        return [
            *found,
            (other, f"net.image_size is {net.image_size}, image_size {spec.image_size}; make them equal"),
        ]
    unet = net.unet
    short = isinstance(net, CaptionedSpec) and net.text.vocab_size <= END
    return [
        *found,
        (net.in_channels != spec.channels, f"net.in_channels is {net.in_channels}, x has {spec.channels}"),
        (net.out_channels != out, f"net.out_channels is {net.out_channels}; loss {spec.loss} takes {out}"),
        (unet.image_channels != told, f"net.unet.image_channels is {unet.image_channels}, set it to {told}"),
        (short, f"net.text.vocab_size must be above {END}, the last of our tokens"),
        (bool(unet.labels) and not isinstance(net, PlainSpec), "labels are for a net of kind unet"),
        (
            bool(unet.embedding_width) and isinstance(net, CaptionedSpec),
            f"a net of kind {net.kind} is told no image embedding; leave net.unet.embedding_width out",
        ),
        (
            unet.level_told and not unet.labels and isinstance(net, PlainSpec),
            f"a net of kind {net.kind} is told classes alone with its level; set net.unet.labels instead",
        ),
    ]


def cropping(spec: ChainSpec) -> list[tuple[bool, str]]:
    """The same for crops and degradations."""
    crop, grid = spec.crop, spec.factor * (spec.unet.factors()[-1] if spec.unet else 1)
    return [
        (
            spec.degrades != "none" and spec.factor == 1,
            f"degrades {spec.degrades} is for a model that enlarges; set factor, or leave it out",
        ),
        (
            spec.enlarged_by != "bilinear" and spec.factor == 1,
            f"enlarged_by {spec.enlarged_by} is for a model that enlarges; set factor, or leave it out",
        ),
        (crop > spec.image_size, f"crop {crop} is larger than image_size {spec.image_size}; make it smaller"),
        (
            bool(crop) and (spec.unet is None or bool(spec.latent_channels)),
            "crop is for a UNet that paints pixels; set crop: 0",
        ),
        (bool(crop % grid), f"crop {crop} must divide by {grid}, what the network and factor make small"),
    ]


def network_of(spec: ChainSpec) -> nn.Module:
    """The network of a chain, with first weights."""
    if isinstance(spec.net, DiTSpec):
        channels, out = spec.channels + spec.told_channels, spec.channels * (1 + spec.learns_variance)
        return DiT(spec.net, in_channels=channels, out_channels=out)
    return build(spec.net)


def denoiser_of(spec: ChainSpec) -> NetworkDenoiser[nn.Module]:
    """The network of a chain, seen as a denoiser."""
    tell: Tell = torch.log
    if spec.unet and spec.unet.level_scale == 1:
        tell = consistency_time
        if isinstance(spec.schedule, ScheduleSpec):
            tell = Clock(spec.schedule, rescaled=spec.rescaled_time)
    return NetworkDenoiser(
        network_of(spec),
        spec.predicts,
        tell=tell,
        learns_variance=spec.learns_variance,
        sigma_min=spec.sigma_range[0],
    )
