"""`ddiff sample`: a prompt painted by a cascade in this process, without Ray or HTTP."""

import hashlib
import heapq
import json
import logging
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_core import bundle, images
from dd_core.bundle import Cascade
from dd_core.cascade import CascadeSpec, CascadeState, Hop, HopSpec, followed, requested, run
from dd_core.devices import nearest
from dd_core.precision import round_products
from dd_core.samplers import SamplingSpec
from dd_core.stage import LearnsEmbeddings
from dd_core.stages import StageSpec
from dd_core.stages.asking import hears_negative, led_away, reads_caption
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import clip_of
from dd_core.stages.consistency_hop import ConsistencyHop
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.text import too_long
from jobs import remake
from jobs.given_pictures import gray, hole, rgb
from jobs.order import Order, refuse_order, refuse_silence
from jobs.provenance import facts_of, text_of
from jobs.sample_changes import changed, refuse_overruled

log = logging.getLogger(__name__)


class Painted(NamedTuple):
    """A picture on disk."""

    path: Path
    score: float | None
    """Cosine of picture and prompt by the cascade's CLIP, in [-1, 1]; None unless pictures were ranked."""
    cut: tuple[str, ...] = ()
    """Texts of the order that are longer than the cascade reads; the end of each was ignored."""


class Canvas(NamedTuple):
    """A picture that may be kept."""

    seed: int
    image: Float[Tensor, " 1 3 h w"]


class Plan(NamedTuple):
    """How an order is painted."""

    hops: Sequence[Hop]
    """Those that run."""
    state: CascadeState
    """What each picture begins with, its seed aside."""
    how: Sequence[SamplingSpec]
    """Of each of these hops."""


def paint(order: Order, cascade: Path, out: Path) -> list[Painted]:
    """Paint a prompt as often as ordered.

    Each picture is painted by itself, never in a batch, so that a seed gives the same bytes however
    many are asked for: the sums inside a convolution may be ordered differently in another batch.

    Args:
        order: Prompt, seeds and how many.
        cascade: Directory of a cascade; every byte is verified first.
        out: Directory for the PNGs; made if missing.

    Returns:
        The files, named after the seed (and the order, see `place_of`), with all that decides them in their
        text (`provenance`); the best first if they were ranked.

    Raises:
        ValueError: The prompt is empty, a picture cannot be used, more are to be kept than painted, the
            cascade has no CLIP to rank by, or cannot do what is asked.
        sealed.SealError: The cascade is damaged or unfinished.
    """
    refuse_order(order)
    if order.precision == "auto" and remake.asked_for(order):
        order = order._replace(precision="fp32")  # the noise of a picture is found by exact inversion
    round_products(nearest(), order.precision)
    opened = bundle.load_cascade(cascade, device=nearest(), precision=order.precision)
    specs = changed(remake.specs_of(opened, order), order.changes, order.steps)
    how = [how_of(hop, order) for hop in specs]
    refuse_overruled(order.changes, specs, remake.final(opened, order, how))
    asked = state_of(order, opened.spec)
    refuse(order, opened, asked, how)
    rank = None if order.keep is None else ranking(cascade, opened, asked.tokens)
    plan = begun(order, opened, asked, how)
    out.mkdir(parents=True, exist_ok=True)
    lost = cut(order, opened.spec)
    facts = {"cascade": opened.digest, "how": written(plan.how), **facts_of(order, nearest())}
    seeds = range(order.seed, order.seed + order.images)
    drawn = (Canvas(seed, painted(plan, seed, opened.spec.name)) for seed in seeds)
    if rank is None or order.keep is None:
        return [saved(canvas, None, facts, out)._replace(cut=lost) for canvas in drawn]
    scored = ((rank(canvas.image), canvas) for canvas in drawn)
    best = heapq.nlargest(order.keep, scored, key=operator.itemgetter(0))
    return [saved(canvas, score, facts, out)._replace(cut=lost) for score, canvas in best]


def cut(order: Order, cascade: CascadeSpec) -> tuple[str, ...]:
    """The texts of an order that are longer than a cascade reads; a warning is logged for each."""
    texts = {"prompt": order.prompt, "negative": order.negative, "instead_of": order.instead_of or ""}
    lost = tuple(name for name, text in texts.items() if too_long(text, cascade.context_length))
    for name in lost:
        log.warning(
            "%s: cascade %s reads %d tokens, and the end of it is not heard; say it shorter",
            name,
            cascade.name,
            cascade.context_length,
        )
    return lost


def begun(order: Order, opened: Cascade, asked: CascadeState, how: Sequence[SamplingSpec]) -> Plan:
    """The plan of an order that was not refused; a picture that is remade is encoded here."""
    if not remake.asked_for(order):
        return Plan(opened.hops, asked, how)
    other = None if order.other is None else rgb(order.other, opened.spec.image_size)
    way = remake.way(opened, order, asked, list(how), other)
    return Plan(opened.hops[way.first :], way.state, way.how)


def refuse(order: Order, cascade: Cascade, asked: CascadeState, how: Sequence[SamplingSpec]) -> None:
    """Refuse what this cascade cannot paint, or no hop would use, before any network runs.

    Raises:
        ValueError: With what to do about it.
    """
    specs, name = cascade.spec.hops, cascade.spec.name
    follows = any(hop.follows_request for hop in specs)
    work = list(zip(specs, cascade.stages, remake.final(cascade, order, how), strict=True))
    readers = [hop.stage for hop, stage, last in work if last is not None and hears_negative(stage)]
    gradients = [chosen.gradient for chosen in how if chosen.gradient is not None]
    if any(last is not None and reads_caption(stage) for _, stage, last in work) or any(
        gradient.caption for gradient in gradients
    ):
        refuse_silence(order)
    classes = any(gradient.classes for gradient in gradients)
    painters = (hop.base if isinstance(hop, ConsistencyHop) else hop for hop in cascade.hops)
    told = any(isinstance(hop, ChainHop) and hop.spec.labels for hop in painters)
    unheard = (
        (order.steps is not None and not follows, "--steps", "set follows_request of one"),
        (order.guidance is not None and not follows, "--guidance", "set follows_request of one"),
        (order.label is not None and not (classes or told), "--label", "take one that is told classes"),
        (
            bool(order.negative and not readers),
            "--negative",
            "take one with a hop that reads captions and has learned to guide itself",
        ),
        (
            order.reference is not None and not any(one.looks_at_reference() for one in gradients),
            "--reference",
            "weigh image, style or structure in the gradient of one",
        ),
        (
            order.training_free and all(fills_holes(stage) for _, stage, _ in work),
            "--training-free",
            "take one with a base, an upsampler, or a chain without mask channels",
        ),
    )
    for wrong, option, remedy in unheard:
        if wrong:
            raise ValueError(f"cascade {name}: no hop uses {option}; leave it out, or {remedy}")
    if order.negative and not any(last is not None and led_away(stage, last) for _, stage, last in work):
        raise ValueError(
            f"cascade {name}: no hop is guided away from --negative, for each has scale 1; leave it out, or "
            f"--set {readers[-1]}.guidance_scale=3"
        )
    begun = asked._replace(seeds=[order.seed], known=None if remake.asked_for(order) else asked.known)
    for hop, chosen, spec in zip(cascade.hops, how, specs, strict=True):
        try:
            hop.refuse(begun, chosen)
        except ValueError as error:
            raise ValueError(f"hop {spec.stage}: {error}") from None


def fills_holes(stage: StageSpec) -> bool:
    """Whether a stage fills holes in one way alone, whatever `inpainting` says, or paints nothing."""
    in_one_way = isinstance(stage, LearnsEmbeddings | ConsistencySpec)
    return in_one_way or (isinstance(stage, ChainSpec) and stage.inpaints)


def state_of(order: Order, cascade: CascadeSpec) -> CascadeState:
    """What every picture of an order begins with, its seed aside."""
    side, negatives = cascade.image_size, [order.negative] if order.negative else []
    state = requested([order.prompt], [], cascade.context_length, negatives=negatives)
    if order.label is not None:
        state = state._replace(label=torch.tensor([order.label]))
    if order.image is not None and order.colourise:
        state = state._replace(gray=gray(order.image, side))
    elif order.image is not None and order.enlarge:
        state = state._replace(coarse=rgb(order.image, None))
    elif order.image is not None:
        state = state._replace(known=rgb(order.image, side))
    if order.mask is not None:
        state = state._replace(hole=hole(order.mask, side))
    if order.reference is not None:
        state = state._replace(reference=rgb(order.reference, None))
    return state


def painted(plan: Plan, seed: int, name: str) -> Float[Tensor, " 1 3 h w"]:
    """One picture through the hops of the cascade of this name."""
    state = plan.state._replace(seeds=[seed])
    try:
        for hop, chosen in zip(plan.hops, plan.how, strict=True):
            state = run(hop, state, chosen, checked=True)
    except FloatingPointError as error:
        raise FloatingPointError(f"cascade {name}, seed {seed}: {error}") from None
    if state.image is None:
        raise ValueError(
            f"cascade {name}: its last hop paints no image; a base or an upsampler must come last"
        )
    return state.image


def ranking(
    directory: Path, cascade: Cascade, caption: Int[Tensor, " 1 l"]
) -> Callable[[Float[Tensor, " 1 3 h w"]], float]:
    """How near a picture is to the caption: the cosine of their embeddings by the cascade's own CLIP.

    Source: Ramesh et al. 2021 (arXiv:2102.12092, DALL-E), section 2.6.
    """
    trained = bundle.parent_of_hops(directory, cascade.spec, "clip")
    if trained is None:
        raise ValueError(
            f"{directory}: none of its hops stands on a CLIP, so nothing ranks; leave --keep out"
        )
    clip = clip_of(trained).to(nearest())
    wanted = clip.read(caption.to(nearest())).embedding

    @torch.no_grad()
    def score(image: Float[Tensor, " 1 3 h w"]) -> float:
        return float((clip.embed_image(image.to(nearest())) * wanted).sum())

    return score


def saved(canvas: Canvas, score: float | None, facts: dict[str, str], out: Path) -> Painted:
    """The picture as a file, renamed when it is whole."""
    told = {**facts, "seed": str(canvas.seed)}
    path = place_of(told, out)
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(images.png(canvas.image, told | ({} if score is None else {"clip": f"{score:.4f}"})))
    return Painted(draft.rename(path), score)


def place_of(told: dict[str, str], out: Path) -> Path:
    """The file for a picture with this text: named by its seed; and by a digest if another has that name."""
    path = out / f"{int(told['seed']):08d}.png"
    try:
        same = not path.exists() or text_of(path).items() >= told.items()
    except ValueError:
        same = False
    origin = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return path if same else path.with_stem(f"{path.stem}-{origin[:8]}")


def how_of(hop: HopSpec, order: Order) -> SamplingSpec:
    """How one hop is sampled: as the cascade says, with what the order changes."""
    asked: dict[str, Any] = {
        "strength": order.strength,
        "inpainting": "projection" if order.training_free else None,
    }
    how = followed(hop, steps=order.steps, scale=order.guidance)
    return how.but(**{name: value for name, value in asked.items() if value is not None})


def written(how: Sequence[SamplingSpec]) -> str:
    """How each hop was sampled, as JSON."""
    return json.dumps([spec.model_dump(mode="json") for spec in how])
