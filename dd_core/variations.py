"""Variations: a picture is encoded to what it can be painted from; this code is moved and painted again.

A picture's code is its image embedding (what it shows) and the noise from which deterministic DDIM paints it
(everything else about it).  For a base that is told no embeddings, it is the noise alone (Song et al. 2021,
arXiv:2010.02502, section 5.3).

Source: Ramesh et al. 2022 (arXiv:2204.06125, unCLIP), section 3.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_core.cascade import CascadeState, Draw, Hop, drawn
from dd_core.embeddings import slerp, text_difference
from dd_core.nets.clip import Clip
from dd_core.samplers import SamplingSpec


class Code(NamedTuple):
    """What a picture can be painted from: (z_i, x_T)."""

    embedding: Float[Tensor, " b d"] | None
    """None where no embedding is told."""
    noise: Float[Tensor, " b c h w"] | None
    """`CascadeState.noise` of its hop; None: drawn anew from the seeds of a request."""


@runtime_checkable
class Encoder(Hop, Protocol):
    """A hop that paints from noise alone, so that a picture's noise can be found."""

    def embedder(self) -> Clip | None:
        """The CLIP whose image embeddings it is told; None if it is told none."""
        ...

    def embedded(self, picture: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b d"]:
        """The image embedding of a picture of any size, by its `embedder`, computed as in training."""
        ...

    def encode(self, state: CascadeState, how: SamplingSpec) -> Draw:
        """The way back from `state.known`: a sampling whose result is the noise.

        Raises:
            ValueError: The picture or the sampling cannot be used.
        """
        ...


def walked(how: SamplingSpec, eta: float) -> SamplingSpec:
    """The same sampling by DDIM: eta 0 repaints the picture of a code, up to 1 varies it more and more."""
    return how.but(sampler="ddim", eta=eta, variance="learned", churn=None, strength=1.0)


def unguided(how: SamplingSpec) -> SamplingSpec:
    """The same sampling, led by nothing but what the network is told."""
    return how.but(guidance_scale=1.0, guidance_rescale=0.0, guidance_interval=None, gradient=None)


@torch.no_grad()
def encode(hop: Encoder, state: CascadeState, how: SamplingSpec) -> Code:
    """The code of a picture.

    Args:
        hop: The hop that is to paint it again.
        state: The picture (`known`) and the caption that the hop is told meanwhile.
        how: The sampling that is to paint it again: its steps are walked backwards with the same guidance,
            since at another scale than it was found at, a code paints another picture.

    Raises:
        ValueError: As `Encoder.encode`; or there is but one step, which would give the picture for its noise.

    Source: section 3.1.
    """
    assert state.known is not None
    if how.num_steps < 2:
        raise ValueError(
            "a picture's noise is found in 2 steps at least, and well in 50 or more; take more steps"
        )
    back = walked(how, 0.0)
    hop.refuse(state, back)  # before CLIP is asked
    embedding = None
    if hop.embedder() is not None:
        embedding = hop.embedded(state.known).float().cpu()
    draw = hop.encode(state._replace(image_embedding=embedding), back)
    return Code(embedding, drawn(hop.denoiser, draw).float().cpu())


def between(a: Code, b: Code, share: float) -> Code:
    """A code on the way from one picture to another, embedding and noise each on its great circle.

    What one of them lacks, the result lacks: without noise all that is between two pictures begins with the
    same noise, drawn from the seed, the second way of the paper.

    Source: section 3.2.
    """

    def way(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        return None if one is None or other is None else slerp(one, other, share)

    return Code(way(a.embedding, b.embedding), way(a.noise, b.noise))


def turned(
    code: Code, clip: Clip, before: Int[Tensor, " b l"], now: Int[Tensor, " b l"], share: float
) -> Code:
    """The embedding turned by the difference of two captions, the noise kept.

    Args:
        code: Of the picture, with an embedding.
        clip: That of its hop (`Encoder.embedder`).
        before: Tokens of what the picture shows.
        now: Tokens of what it should show.
        share: Of the way to the difference, 0.25 to 0.5 as published.

    Raises:
        ValueError: The captions are the same to CLIP.

    Source: section 3.3.
    """
    assert code.embedding is not None
    device = next(clip.parameters()).device
    old, new = (clip.read(caption.to(device)).embedding.float().cpu() for caption in (before, now))
    if torch.equal(old, new):
        raise ValueError("both captions say the same, so nothing is to be changed; change one of them")
    return code._replace(embedding=slerp(code.embedding, text_difference(new, old), share))
