"""A declared source and its file -> networks of ours with their weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dd_core.layouts import clip, ddpm, glide, karlo, ldm
from dd_core.layouts.adm import AdmLayout, classifier_moves, unet_moves
from dd_core.layouts.moves import LayoutError, Move, fitted, inward
from dd_core.layouts.published import Layout, Published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.classifier import Classifier
from dd_core.nets.network import build
from dd_core.nets.noised_clip import GlideClip
from dd_core.nets.prior import CausalPrior
from dd_core.nets.text import CaptionedUNet, UnclipUNet
from dd_core.nets.unet import UNet


class Imported(NamedTuple):
    """What came out of the files of a source."""

    weights: dict[str, Tensor]
    autoencoder: dict[str, Tensor] | None = None
    left: dict[str, int] | None = None
    """Number of weights in the files that were not taken, by kind."""
    reader: dict[str, Tensor] | None = None
    """Weights of the CLIP text tower that reads captions for it."""
    averaged: bool = False
    """Whether `weights` are the averaged ones of a file that holds both."""


def imported(source: Published, states: Sequence[Mapping[str, Tensor]], *, averaged: bool) -> Imported:
    """The networks in the files of a source.

    Args:
        source: The source that the files are declared to be of.
        states: One file; of GLIDE's noised CLIP two, image and text; of Karlo's prior two, its weights, and
            mean and deviation of its embeddings.
        averaged: Take averaged weights where a file holds both.

    Raises:
        LayoutError: A file is not laid out as declared; the key is named.
        ValueError: There are more or fewer files than the source has.
    """
    wanted = 2 if source.layout in ("glide-clip", "karlo-prior") else 1
    if len(states) != wanted:
        raise ValueError(f"this source is {wanted} files, not {len(states)}; name each of them")
    with torch.device("meta"):
        net = build(source.net)
    match source.layout:
        case "glide-clip":
            towers = zip(("image.", "text."), states, strict=True)
            whole = {prefix + name: t for prefix, state in towers for name, t in state.items()}
            return Imported(weights_for(net, source.layout, whole))
        case "karlo-prior":
            return Imported(weights_for(net, source.layout, states[0]) | statistics(states[1]))
        case "ldm" | "ldm-linear":
            return from_ldm(source, net, states[0], averaged=averaged)
        case "karlo-sr" | "karlo-sr-last":
            part = upsampler_part(source.layout)
            mine = {name: t for name, t in states[0].items() if name.startswith(f"{part}.")}
            left = {"the other of its two networks": len(states[0]) - len(mine)}
            return Imported(weights_for(net, source.layout, mine), left=left)
        case _:
            return Imported(weights_for(net, source.layout, states[0]))


def weights_for(net: nn.Module, layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight of a network, checked."""
    return fitted(net, inward(state, moves_of(net, layout)))


def statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mean and deviation of the embeddings of a prior, a pair without names."""
    if state.keys() != {"0", "1"}:
        raise LayoutError(f"mean and deviation are a pair of vectors, not {', '.join(sorted(state)[:3])}")
    return {"mean": state["0"].flatten().float(), "std": state["1"].flatten().float()}


def from_ldm(source: Published, net: nn.Module, state: Mapping[str, Tensor], *, averaged: bool) -> Imported:
    """UNet, autoencoder and text tower of a whole file; any other text model is only counted."""
    left = ldm.left_over(state)
    averaged = averaged and ldm.has_averaged(state)
    weights = weights_for(net, source.layout, ldm.unet_part(state, averaged=averaged))
    assert source.autoencoder is not None
    first = autoencoder(source.autoencoder, state, scale=source.latent_scale)
    if source.reader is None:
        return Imported(weights, first, left, averaged=averaged)
    as_first = source.layout == "ldm"
    part = clip.reader_part(state, first=as_first)
    reader = clip.reader_weights(source.reader, part, first=as_first)
    left["readers"] -= len(part)
    return Imported(weights, first, left, reader, averaged)


def autoencoder(
    spec: AutoencoderNetSpec, state: Mapping[str, Tensor], *, scale: float | None
) -> dict[str, Tensor]:
    """An autoencoder's weights, from a whole file or its own, with the moments that its scale implies.

    Args:
        spec: Its network.
        state: The file.
        scale: Factor of its latents, unless the file has a measured one; None: the file must have it.

    Raises:
        LayoutError: The file is not laid out so, or nothing says the scale.
    """
    with torch.device("meta"):
        net = Autoencoder(spec)
    weights = fitted(net, inward(ldm.autoencoder_part(state), ldm.autoencoder_moves(net)))
    measured = ldm.measured_scale(state)
    scale = scale if measured is None else measured
    if scale is None:
        raise LayoutError(
            f"nothing says the scale of these latents, and there is no weight {ldm.SCALE!r}: give --scale, "
            "one over their standard deviation on your pictures (Stable Diffusion's f8: 0.18215)"
        )
    return weights | scaled(scale)


def scaled(scale: float) -> dict[str, Tensor]:
    """The moments of latents whose deviation is one over `scale`.

    Raises:
        LayoutError: No latents have such a scale.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise LayoutError(f"the scale of latents is {scale:g}; it must be a number above 0")
    return {"moments": torch.tensor([0.0, scale**-2]), "observed": torch.tensor(0)}


def upsampler_part(layout: Layout) -> str:
    """Prefix of the one of Karlo's two upsampling networks that is meant."""
    return "model_last_step" if layout == "karlo-sr-last" else "model_first_steps"


def moves_of(net: nn.Module, layout: Layout) -> Iterator[Move]:
    """Which weight of a published file becomes which of a network."""
    match net:
        case UNet():
            yield from unet_layout(net, layout)
        case Classifier():
            yield from classifier_moves(net, AdmLayout())
        case CaptionedUNet():
            yield from glide.captioned_moves(net)
        case GlideClip():
            yield from glide.noised_clip_moves(net)
        case UnclipUNet():
            yield from karlo.decoder_moves(net)
        case CausalPrior():
            yield from karlo.prior_moves(net)


def unet_layout(net: UNet, layout: Layout) -> Iterator[Move]:
    """The moves of a plain UNet, which is published in several layouts."""
    match layout:
        case "ddpm":
            yield from ddpm.unet_moves(net)
        case "adm-new":
            yield from unet_moves(net, AdmLayout(order="new"))
        case "consistency":
            yield from unet_moves(net, AdmLayout(order="new", attention_dims=2))
        case "ldm":
            yield from ldm.ldm_unet_moves(net, AdmLayout())
        case "ldm-linear":
            yield from ldm.ldm_unet_moves(net, AdmLayout(projection="linear"))
        case "karlo-sr" | "karlo-sr-last":
            yield from karlo.upsampler_moves(net, upsampler_part(layout))
        case _:
            yield from unet_moves(net, AdmLayout())
