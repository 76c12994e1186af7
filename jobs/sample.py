"""`ddiff sample`: a prompt painted by a cascade in this process, without Ray or HTTP."""

import heapq
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dd_core import bundle, images
from dd_core.bundle import Cascade
from dd_core.cascade import CascadeState, run
from dd_core.samplers import SamplingSpec
from dd_core.stages.clip import clip_of
from dd_core.text import tokens


class Order(NamedTuple):
    """What to paint."""

    prompt: str
    seed: int = 0
    """Of the first picture, from 0; the next has the next one."""
    images: int = 1
    steps: int | None = None
    """Denoising steps of the hop that follows requests; None as the cascade says."""
    guidance: float | None = None
    """Guidance scale of that hop; None as the cascade says."""
    keep: int | None = None
    """How many of the images are kept: those that the cascade's CLIP finds nearest to the prompt.  None: all,
    and CLIP is not asked."""


class Painted(NamedTuple):
    """A picture on disk."""

    path: Path
    score: float | None
    """Cosine of picture and prompt by the cascade's CLIP, in [-1, 1]; None unless pictures were ranked."""


class Canvas(NamedTuple):
    """A picture that may be kept."""

    seed: int
    image: Float[Tensor, " 1 3 h w"]


def paint(order: Order, cascade: Path, out: Path) -> list[Painted]:
    """Paint a prompt as often as ordered.

    Each picture is painted by itself, never in a batch, so that a seed gives the same bytes however
    many are asked for: the sums inside a convolution may be ordered differently in another batch.

    Args:
        order: Prompt, seeds and how many.
        cascade: Directory of a cascade; every byte is verified first.
        out: Directory for the PNGs; made if missing.

    Returns:
        The files, named after the seed, with prompt, seed, settings and digest in their text; the best first
        if they were ranked.

    Raises:
        ValueError: The prompt is empty, more are to be kept than painted, or the cascade has no CLIP to
            rank by.
        sealed.SealError: The cascade is damaged or unfinished.
    """
    if not order.prompt.strip():
        raise ValueError("the prompt is empty; say what to paint, such as 'a red circle'")
    if order.keep is not None and order.keep > order.images:
        raise ValueError(
            f"--keep {order.keep} of {order.images} images; paint more, -n {order.keep} at least"
        )
    opened = bundle.load_cascade(cascade, device=device())
    caption = torch.tensor(tokens([order.prompt], opened.spec.context_length))
    rank = None if order.keep is None else ranking(cascade, opened, caption)
    asked = {"num_steps": order.steps, "guidance_scale": order.guidance}
    changes = {name: value for name, value in asked.items() if value is not None}
    how = [hop.how.but(**changes) if hop.follows_request else hop.how for hop in opened.spec.hops]
    out.mkdir(parents=True, exist_ok=True)
    facts = {"prompt": order.prompt, "cascade": opened.digest, "how": written(how)}
    seeds = range(order.seed, order.seed + order.images)
    drawn = (Canvas(seed, painted(opened, caption, seed, how)) for seed in seeds)
    if rank is None or order.keep is None:
        return [saved(canvas, None, facts, out) for canvas in drawn]
    scored = ((rank(canvas.image), canvas) for canvas in drawn)
    best = heapq.nlargest(order.keep, scored, key=operator.itemgetter(0))
    return [saved(canvas, score, facts, out) for score, canvas in best]


def painted(
    cascade: Cascade, caption: Int[Tensor, " 1 l"], seed: int, how: list[SamplingSpec]
) -> Float[Tensor, " 1 3 h w"]:
    """One picture through every hop."""
    state = CascadeState(seeds=[seed], tokens=caption)
    for hop, chosen in zip(cascade.hops, how, strict=True):
        state = run(hop, state, chosen)
    if state.image is None:
        raise ValueError(
            f"cascade {cascade.spec.name}: its last hop paints no image; "
            "a base or an upsampler must come last"
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
    clip = clip_of(trained).to(device())
    wanted = clip.read(caption.to(device())).embedding

    @torch.no_grad()
    def score(image: Float[Tensor, " 1 3 h w"]) -> float:
        return float((clip.embed_image(image.to(device())) * wanted).sum())

    return score


def saved(canvas: Canvas, score: float | None, facts: dict[str, str], out: Path) -> Painted:
    """The picture as a file, renamed when it is whole."""
    told = {**facts, "seed": str(canvas.seed)} | ({} if score is None else {"clip": f"{score:.4f}"})
    draft = out / f".{canvas.seed:08d}.png"
    draft.write_bytes(images.png(canvas.image, told))
    return Painted(draft.rename(out / f"{canvas.seed:08d}.png"), score)


def written(how: list[SamplingSpec]) -> str:
    """How each hop was sampled, as JSON."""
    return json.dumps([spec.model_dump(mode="json") for spec in how])


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
