"""What the network of a chain is told: caption, class, image embedding, pictures -> `Conditioning`.

The inputs come from `heard_of`, `kept` and `holes` in training, from a request in sampling; the rest is
shared.
"""

from typing import NamedTuple, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dd_core import degradations
from dd_core.denoiser import Conditioning
from dd_core.labels import UNLABELLED
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.clip import Clip, ReadCaption
from dd_core.nets.dit import DiT
from dd_core.nets.packed import upto_end
from dd_core.nets.text import CaptionedUNet, UnclipUNet
from dd_core.nets.unet import UNet
from dd_core.stage import PairBatch
from dd_core.stages.captions import null_like
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import embedding_of

WHOLE_HOLES = 0.125
"""Share of an inpainting model's training pictures that are hidden whole, so that it learns to paint too."""


class Heard(NamedTuple):
    """Captions, classes and embeddings of a request or a training batch, one per row."""

    tokens: Int[Tensor, " b l"]
    """The empty caption says nothing."""
    label: Int[Tensor, " b"]
    """UNLABELLED says nothing."""
    embedding: Float[Tensor, " b d"]
    """A row of zeros says nothing."""
    counts: Bool[Tensor, " b l"] | None = None
    """Which tokens are not padding, for a network that reads captions itself; None: as `counted` says."""


def read_by(spec: ChainSpec, clip: Clip | None, tokens: Int[Tensor, " b l"]) -> ReadCaption | None:
    """Captions as the parent CLIP reads them; None for a network that takes none, or reads them itself."""
    if not spec.text_width or spec.context_length:
        return None
    assert clip is not None
    with torch.no_grad():
        return clip.read(tokens)


def told(
    spec: ChainSpec, network: nn.Module, caption: ReadCaption | None, heard: Heard, picture: Tensor | None
) -> Conditioning:
    """The conditioning of the network; one that reads captions itself does so here, so once a request.

    Args:
        spec: The chain.
        network: Its network.
        caption: The captions, from `read_by`.
        heard: Captions as tokens, classes and embeddings.
        picture: `Conditioning.image`, if it is told one.
    """
    embedding = heard.embedding if spec.embedding_width else None
    match network:
        case CaptionedUNet():
            counts = counted(heard.tokens) if heard.counts is None else heard.counts
            return network.read(heard.tokens, counts)._replace(image=picture)
        case UnclipUNet():
            assert caption is not None
            given = heard.embedding.any(1, keepdim=True)
            embedding = torch.where(given, heard.embedding, network.no_embedding)
            upto = upto_end(heard.tokens)
            return network.read(caption.states, caption.embedding, upto, embedding)._replace(image=picture)
        case DiT() | UNet() as plain:
            text: Tensor | None = None
            if spec.text_width:
                assert caption is not None
                text = network.read(caption) if isinstance(network, DiT) else caption.states
            level: Tensor | None = None
            if isinstance(network, UNet) and spec.labels:
                label = torch.where(heard.label == UNLABELLED, spec.labels - 1, heard.label)
                level = network.of_class(label)
            cond = Conditioning(text=text, image_embedding=embedding, level=level, image=picture)
            return plain.prepared(cond)
    raise AssertionError(type(network))


def counted(tokens: Int[Tensor, " b l"]) -> Bool[Tensor, " b l"]:
    """`upto_end`, but none of an empty caption: a network that reads captions itself sees all padding."""
    return upto_end(tokens) & (tokens.argmax(1, keepdim=True) > 1)


def heard_of(spec: ChainSpec, batch: PairBatch, picture: Tensor, clip: Clip | None) -> Heard:
    """Everything that a training pair says."""
    if spec.labels and batch.label is None:
        raise ValueError("chain: its network is told classes; set `label` (path and classes) of the run")
    label = torch.full_like(batch.tokens[:, 0], UNLABELLED) if batch.label is None else batch.label
    if spec.labels and not spec.has_class_of_nothing and bool((label == UNLABELLED).any()):
        raise ValueError(
            "chain: a picture has no class, and with told_dropout 0 the network has none for nothing; "
            "set told_dropout, and one label more"
        )
    embedding = picture.new_zeros(len(picture), spec.embedding_width)
    if spec.embedding_width:
        assert clip is not None
        embedding = embedding_of(clip, batch, spec.embedded_at)
    return Heard(batch.tokens, label, embedding)


def kept(spec: ChainSpec, heard: Heard) -> Heard:
    """The same after dropout: of caption and class together, of the embedding independently."""
    dropped, unseen = torch.rand(2, len(heard.tokens), 1, device=heard.tokens.device)
    silent = dropped < spec.told_dropout
    return Heard(
        torch.where(silent, null_like(heard.tokens), heard.tokens),
        torch.where(silent[:, 0], UNLABELLED, heard.label),
        torch.where(unseen < spec.embedding_dropout, 0.0, heard.embedding),
    )


def unsaid(spec: ChainSpec, heard: Heard, tokens: Int[Tensor, " b l"]) -> Heard:
    """These captions without class and embedding; but what training never drops is kept."""
    label = torch.full_like(heard.label, UNLABELLED) if spec.has_class_of_nothing else heard.label
    silent = torch.zeros_like(heard.embedding)
    return Heard(tokens, label, silent if spec.embedding_dropout else heard.embedding)


def encoded(
    picture: Float[Tensor, " b 3 h w"], autoencoder: Autoencoder | None, *, noisy: bool = False
) -> Float[Tensor, " b c i j"]:
    """A picture as x: itself, or its latent; noisy draws from the posterior as in training."""
    if autoencoder is None:
        return picture
    with torch.no_grad():
        side, channels = picture.shape[-1] // autoencoder.spec.factor, autoencoder.spec.latent_channels
        noise = torch.randn(len(picture), channels, side, side, device=picture.device) if noisy else None
        return autoencoder.encode(picture, noise).float()


def smaller(spec: ChainSpec, picture: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b 3 i j"] | None:
    """The smaller picture for an enlarging model in training, averaged or degraded; None for other models."""
    if spec.factor == 1:
        return None
    match spec.degrades:
        case "none":
            return F.avg_pool2d(picture, spec.factor)
        case "blur":
            return degradations.blurred(F.avg_pool2d(picture, spec.factor))
        case "bsr":
            return degradations.bsr(picture, spec.factor)
        case _:
            assert_never(spec.degrades)


def seen(
    spec: ChainSpec,
    autoencoder: Autoencoder | None,
    *,
    small: Float[Tensor, " b 3 i j"] | None,
    known: Float[Tensor, " b 3 h w"],
    hole: Bool[Tensor, " b 1 h w"] | None,
) -> Float[Tensor, " b n y x"] | None:
    """The image inputs of the network: what is known around a hole, and the smaller picture enlarged.

    Channels are in the order of published weights: known values, a mask (1 where they are known), the
    enlarged picture (GLIDE); or a mask (1 in the hole), known values (Stable Diffusion).  Known latents are
    those of the picture with the hole painted grey.
    """
    parts: list[Tensor] = []
    if spec.inpaints:
        assert hole is not None
        values = encoded(torch.where(hole, 0.0, known), autoencoder)
        if spec.mask_of == "known":
            parts += [values, 1 - covering(hole, values).to(values)]
        else:  # the mask of the nearest pixel, as published
            parts += [F.interpolate(hole.to(values), values.shape[2:]), values]
    if small is not None:
        as_antialiased = spec.enlarged_by == "bicubic"  # changes the bicubic kernel too, to Karlo's
        parts.append(
            F.interpolate(small, scale_factor=spec.factor, mode=spec.enlarged_by, antialias=as_antialiased)
        )
    return torch.cat(parts, dim=1) if parts else None


def covering(hole: Bool[Tensor, " b 1 h w"], like: Float[Tensor, " b c i j"]) -> Bool[Tensor, " b 1 i j"]:
    """The hole at the size of x: every position of which any part is hidden."""
    return F.adaptive_max_pool2d(hole.float(), like.shape[2:]) > 0


def holes(picture: Float[Tensor, " b c h w"]) -> Bool[Tensor, " b 1 h w"]:
    """A random rectangle of each picture, a quarter to the whole of a side long; some are hidden whole."""
    count, (height, width) = len(picture), picture.shape[2:]
    draws = torch.rand(5, count, device=picture.device)
    inside = []
    for share, place, side in ((draws[0], draws[1], height), (draws[2], draws[3], width)):
        long = torch.where(draws[4] < WHOLE_HOLES, 1.0, 0.25 + 0.75 * share) * side
        start, at = (place * (side - long))[:, None], torch.arange(side, device=picture.device)
        inside.append((at >= start.floor()) & (at < (start + long[:, None]).ceil()))
    return (inside[0][:, :, None] & inside[1][:, None])[:, None]
