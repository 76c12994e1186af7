"""Pictures remade by `ddiff sample`: varied, mixed with another, or changed from one caption to another."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from dd_core.bundle import Cascade
from dd_core.cascade import CascadeState, HopSpec, requested
from dd_core.samplers import SamplingSpec
from dd_core.variations import Code, Encoder, between, encode, turned, unguided, walked
from jobs.order import Order


class Way(NamedTuple):
    """The rest of a cascade, from the hop that paints from noise on, and the state that it begins with."""

    first: int
    """Index of its first hop in the cascade; the picture's embedding takes the place of those before."""
    state: CascadeState
    how: list[SamplingSpec]


def asked_for(order: Order) -> bool:
    """Whether an order remakes a picture from its code."""
    return order.vary is not None or order.between is not None or order.instead_of is not None


def specs_of(cascade: Cascade, order: Order) -> list[HopSpec]:
    """The hops of a cascade as an order changes them.

    A picture that is varied or mixed is encoded and painted at guidance scale 1, unless the order sets one.
    """
    specs, first = list(cascade.spec.hops), encoder_of(cascade)
    if first is not None and (order.vary is not None or order.between is not None):
        specs[first] = specs[first].but(how=unguided(specs[first].how))
    return specs


def final(cascade: Cascade, order: Order, how: Sequence[SamplingSpec]) -> list[SamplingSpec | None]:
    """How each hop is finally sampled; None: the picture's code takes its place."""
    first = encoder_of(cascade)
    if first is None or not asked_for(order):
        return list(how)
    return [*[None] * first, walked(how[first], order.vary or 0.0), *how[first + 1 :]]


def encoder_of(cascade: Cascade) -> int | None:
    """Index of the first hop that paints from noise alone; None if there is none."""
    return next((at for at, hop in enumerate(cascade.hops) if isinstance(hop, Encoder)), None)


def way(
    cascade: Cascade,
    order: Order,
    asked: CascadeState,
    how: list[SamplingSpec],
    other: Float[Tensor, " 1 3 h w"] | None,
) -> Way:
    """How an order that remakes a picture is painted; the pictures are encoded here.

    Args:
        cascade: What paints.
        order: One for which `asked_for` is true.
        asked: The prompt, and the picture as `known`.
        how: How each hop is sampled.
        other: The second picture, if there is one.

    Raises:
        ValueError: No hop of the cascade can encode a picture, or, for --instead-of, it takes no embedding.
    """
    first = encoder_of(cascade)
    if first is None:
        raise ValueError(
            f"cascade {cascade.spec.name}: no hop paints by diffusion from noise alone, so no picture can be "
            "encoded; use one with a base or a chain"
        )
    hop = cascade.hops[first]
    assert isinstance(hop, Encoder)
    clip = hop.embedder()
    if clip is None and (order.instead_of is not None or order.fresh_noise):
        what, instead = "--instead-of changes nothing", "use --image with --strength"
        if order.fresh_noise:
            what, instead = "nothing of the pictures would be left with --fresh-noise", "leave it out"
        raise ValueError(
            f"cascade {cascade.spec.name}: {cascade.spec.hops[first].stage} is told no image embedding, so "
            f"{what}; {instead}"
        )
    state = asked._replace(seeds=[0])  # so that a code is the picture's alone
    eta = order.vary or 0.0
    if order.between is not None:
        pictures = [state._replace(known=known) for known in (state.known, other)]
        one, two = (
            embedded(hop, each) if order.fresh_noise else encode(hop, each, how[first]) for each in pictures
        )
        code = between(one, two, order.between)
    elif order.instead_of is not None:
        assert clip is not None
        before = requested([order.instead_of], [], cascade.spec.context_length)
        shown = state._replace(tokens=before.tokens, captions=before.captions)
        code = turned(encode(hop, shown, unguided(how[first])), clip, before.tokens, state.tokens, order.by)
    else:
        code = encode(hop, state, how[first])
    return Way(first, begun(state, code), [walked(how[first], eta), *how[first + 1 :]])


def embedded(hop: Encoder, state: CascadeState) -> Code:
    """The code of a picture without its noise."""
    assert state.known is not None
    return Code(hop.embedded(state.known).float().cpu(), None)


def begun(state: CascadeState, code: Code) -> CascadeState:
    """The request, with a code in place of the picture."""
    return state._replace(known=None, image_embedding=code.embedding, noise=code.noise)
