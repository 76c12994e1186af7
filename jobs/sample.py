"""`ddiff sample`: a prompt painted by a cascade in this process, without Ray or HTTP."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from dd_core import bundle, images
from dd_core.cascade import CascadeState, HopSpec, run
from dd_core.samplers import SamplingSpec
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
    label: int | None = None
    """Class, for a cascade that paints by class or is led by a classifier."""
    image: Path | None = None
    """An RGB picture of the cascade's size, to vary or to fill."""
    mask: Path | None = None
    """A greyscale picture of the same size: white is made anew.  None: all of it is varied."""
    strength: float | None = None
    """Share of the steps of a variation."""
    training_free: bool = False
    """Fill the hole with models that were not trained to."""
    reference: Path | None = None
    """An RGB picture whose content, style or structure is to be taken on."""


def paint(order: Order, cascade: Path, out: Path) -> list[Path]:
    """Paint a prompt as often as ordered.

    Each picture is painted by itself, never in a batch, so that a seed gives the same bytes however
    many are asked for: the sums inside a convolution may be ordered differently in another batch.

    Args:
        order: Prompt, seeds and how many.
        cascade: Directory of a cascade; every byte is verified first.
        out: Directory for the PNGs; made if missing.

    Returns:
        The files, named after the seed, with prompt, seed, settings and digest in their text.

    Raises:
        ValueError: The prompt is empty, or a picture cannot be used.
        sealed.SealError: The cascade is damaged or unfinished.
    """
    if not order.prompt.strip():
        raise ValueError("the prompt is empty; say what to paint, such as 'a red circle'")
    opened = bundle.load_cascade(cascade, device=device())
    caption = torch.tensor(tokens([order.prompt], opened.spec.context_length))
    how = [how_of(hop, order) for hop in opened.spec.hops]
    start, side = CascadeState(seeds=[], tokens=caption), opened.spec.image_size
    if order.label is not None:
        start = start._replace(label=torch.tensor([order.label]))
    if order.image is not None:
        start = start._replace(known=rgb(order.image, side))
    if order.mask is not None:
        start = start._replace(hole=hole(order.mask, side))
    if order.reference is not None:
        start = start._replace(reference=rgb(order.reference, None))
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(order.seed, order.seed + order.images):
        state = start._replace(seeds=[seed])
        for hop, chosen in zip(opened.hops, how, strict=True):
            state = run(hop, state, chosen)
        if state.image is None:
            raise ValueError(
                f"{cascade}: its last hop paints no image; a base or an upsampler must come last"
            )
        facts = {"prompt": order.prompt, "seed": str(seed), "cascade": opened.digest, "how": written(how)}
        draft = out / f".{seed:08d}.png"
        draft.write_bytes(images.png(state.image, facts))
        paths.append(draft.rename(out / f"{seed:08d}.png"))
    return paths


def how_of(hop: HopSpec, order: Order) -> SamplingSpec:
    """How one hop is sampled: as the cascade says, with what the order changes."""
    asked: dict[str, Any] = {
        "num_steps": order.steps if hop.follows_request else None,
        "guidance_scale": order.guidance if hop.follows_request else None,
        "strength": order.strength,
        "inpainting": "projection" if order.training_free else None,
    }
    return hop.how.but(**{name: value for name, value in asked.items() if value is not None})


def rgb(path: Path, side: int | None) -> Float[Tensor, " 1 3 h w"]:
    """A picture in [-1, 1].

    Raises:
        ValueError: It cannot be read, is not RGB, or has another size than the cascade paints.
    """
    found = opened_picture(path, "RGB", side)
    return images.to_unit(torch.from_numpy(np.array(found)).permute(2, 0, 1)[None])


def hole(path: Path, side: int) -> Bool[Tensor, " 1 1 h w"]:
    """Where a mask is white.

    Raises:
        ValueError: It cannot be read, is not greyscale, or has another size than the cascade paints.
    """
    return torch.from_numpy(np.array(opened_picture(path, "L", side)) > 127)[None, None]


def opened_picture(path: Path, mode: Literal["RGB", "L"], side: int | None) -> Image.Image:
    """A picture of this mode and size, or why not."""
    try:
        found = Image.open(path, formats=("PNG", "JPEG", "WEBP"))
        found.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no PNG, JPEG or WebP that can be read ({error})") from None
    if found.mode != mode:
        name = {"RGB": "RGB", "L": "greyscale (8 bits)"}[mode]
        raise ValueError(f"{path}: its mode is {found.mode}; convert it to {name}")
    if side is not None and found.size != (side, side):
        width, height = found.size
        raise ValueError(f"{path}: {width} x {height}, but the cascade paints {side} x {side}; resize it")
    return found


def written(how: list[SamplingSpec]) -> str:
    """How each hop was sampled, as JSON."""
    return json.dumps([spec.model_dump(mode="json") for spec in how])


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
