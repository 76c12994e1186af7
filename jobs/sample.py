"""`ddiff sample`: a prompt painted by a cascade in this process, without Ray or HTTP."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from dd_core import bundle, images
from dd_core.cascade import CascadeState, run
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
        ValueError: The prompt is empty.
        sealed.SealError: The cascade is damaged or unfinished.
    """
    if not order.prompt.strip():
        raise ValueError("the prompt is empty; say what to paint, such as 'a red circle'")
    opened = bundle.load_cascade(cascade, device=device())
    caption = torch.tensor(tokens([order.prompt], opened.spec.context_length))
    asked = {"num_steps": order.steps, "guidance_scale": order.guidance}
    changes = {name: value for name, value in asked.items() if value is not None}
    how = [hop.how.but(**changes) if hop.follows_request else hop.how for hop in opened.spec.hops]
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(order.seed, order.seed + order.images):
        state = CascadeState(seeds=[seed], tokens=caption)
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


def written(how: list[SamplingSpec]) -> str:
    """How each hop was sampled, as JSON."""
    return json.dumps([spec.model_dump(mode="json") for spec in how])


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
