"""What `ddiff sample` is asked to paint, and which orders no cascade can."""

import math
from pathlib import Path
from typing import NamedTuple

from dd_core.precision import Precision
from dd_core.text import is_empty

SILENT = "the prompt is empty; say what to paint, such as 'a red circle'"
SEEDS = 2**32
"""A CPU generator uses no more of a seed than 32 bits: from here on pictures would repeat."""


class Order(NamedTuple):
    """What to paint."""

    prompt: str
    seed: int = 0
    """Of the first picture, from 0; the next has the next one, and all are below SEEDS."""
    images: int = 1
    steps: int | None = None
    """Denoising steps of the hop that follows requests; None as the cascade says."""
    guidance: float | None = None
    """Guidance scale of that hop; None as the cascade says."""
    keep: int | None = None
    """How many of the images are kept: those that the cascade's CLIP finds nearest to the prompt.  None: all,
    and CLIP is not asked."""
    label: int | None = None
    """Class, for a cascade that paints by class or is led by a classifier."""
    image: Path | None = None
    """An RGB picture of the cascade's size, to vary or to fill."""
    mask: Path | None = None
    """A greyscale picture of the same size: white is made anew.  None: all of it is varied."""
    strength: float | None = None
    """Share of the steps that a variation takes; None as the cascade says."""
    training_free: bool = False
    """Fill the hole with models that were not trained to."""
    reference: Path | None = None
    """An RGB picture whose content, style or structure is to be taken on."""
    other: Path | None = None
    """A second picture, for `between`."""
    vary: float | None = None
    """Paint the picture anew from its own embedding and noise; share of the noise that is drawn freshly."""
    between: float | None = None
    """Paint what lies between picture and other: 0 is the picture, 1 the other."""
    fresh_noise: bool = False
    """All that is between them begins with the noise of its seed, not with what lies between their noises."""
    instead_of: str | None = None
    """Caption of the picture; its embedding is turned from this caption towards the prompt."""
    by: float = 0.35
    """How far it is turned, in [0, 1]."""
    negative: str = ""
    """What the pictures should not be; empty is the empty caption."""
    colourise: bool = False
    """The picture is greyscale: its brightness is kept, its colours are made."""
    enlarge: bool = False
    """The picture is small: its pixels become the means of blocks of the picture that is made."""
    changes: tuple[str, ...] = ()
    """HOP.FIELD=VALUE, of how the hops are sampled (`jobs.sample_changes`)."""
    precision: Precision = "auto"
    """Of the networks that paint (`dd_core.stages.load_hop`); auto is fp32 where a picture is remade."""


def refuse_order(order: Order) -> None:
    """Refuse an order that no cascade can paint.

    Raises:
        ValueError: With what to do about it.
    """
    refuse_clashes(order)
    if is_empty(order.prompt) and (order.keep is not None or order.instead_of is not None):
        raise ValueError(SILENT)
    for text in (order.prompt, order.negative, order.instead_of or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{text!r} is no text in UTF-8; write it anew")
    if order.keep is not None and order.keep > order.images:
        raise ValueError(
            f"--keep {order.keep} of {order.images} images; paint more, -n {order.keep} at least"
        )
    if order.seed + order.images > SEEDS:
        raise ValueError(f"--seed {order.seed}: pictures come again from {SEEDS} on; take a smaller one")
    for option, given in (("--mask", order.mask), ("--strength", order.strength)):
        if given is not None and order.image is None:
            raise ValueError(f"{option} needs the picture; give it with --image")
    if order.training_free and order.mask is None:
        raise ValueError("--training-free fills the hole of --mask; give that, or leave it out")


def refuse_silence(order: Order) -> None:
    """Refuse an empty prompt, which a hop reads, where no picture says what to paint.

    Raises:
        ValueError: With an example.
    """
    if is_empty(order.prompt) and order.vary is None and order.between is None:
        raise ValueError(SILENT)


def refuse_clashes(order: Order) -> None:
    """Refuse options that cannot go together.

    Raises:
        ValueError: With what to do about it.
    """
    given = {"--vary": order.vary, "--between": order.between, "--instead-of": order.instead_of}
    ways = [name for name, value in given.items() if value is not None]
    others = {
        "--mask": order.mask,
        "--strength": order.strength,
        "--training-free": order.training_free or None,
    }
    edits = [name for name, value in others.items() if value is not None]
    kept = [name for name, on in (("--colourise", order.colourise), ("--enlarge", order.enlarge)) if on]
    way, besides = ways[0] if ways else "", [*kept[1:], *ways, *edits]
    numbers = {"--vary": order.vary, "--between": order.between, "--strength": order.strength}
    numbers["--by"] = order.by
    odd = [name for name, value in numbers.items() if value is not None and not math.isfinite(value)]
    remedies = (
        (bool(odd), f"{''.join(odd[:1])} is no number; give one from 0 to 1"),
        (
            bool(kept and besides),
            f"{' and '.join((kept + besides)[:2])} are different things; give one of them",
        ),
        (bool(kept) and order.image is None, f"{''.join(kept)} needs the picture; give it with --image"),
        (len(ways) > 1, f"{' and '.join(ways)} are different things; give one of them"),
        (
            bool(ways and edits),
            f"{way} repaints all of the picture, {''.join(edits[:1])} is for edits; leave one out",
        ),
        (bool(ways) and order.image is None, f"{way} needs the picture; give it with --image"),
        (
            order.between is not None and order.other is None,
            "--between is between two pictures; give --image twice",
        ),
        (
            order.other is not None and order.between is None,
            "two pictures are for --between, which paints what lies between them; add --between 0.5",
        ),
        (
            order.fresh_noise and order.between is None,
            "--fresh-noise is for --between, whose pictures have noise of their own; leave it out",
        ),
    )
    for wrong, remedy in remedies:
        if wrong:
            raise ValueError(remedy)
