"""Sample grids: what a stage draws for fixed prompts and seeds while it is trained."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dd_core import images
from dd_core.cascade import CascadeState, run
from dd_core.stage import Trained
from dd_core.stages import load_hop
from dd_core.stages.base import BaseSpec
from dd_core.text import tokens
from workflows.train_spec import SamplesSpec


def draw(path: Path, trained: Trained, parents: Mapping[str, Trained], what: SamplesSpec) -> bool:
    """Write a grid of samples as PNG; False if a stage of this kind draws nothing by itself.

    Args:
        path: Of the PNG.
        trained: The stage as it is now, with averaged weights.
        parents: Role -> what it stands on.
        what: Prompts, first seed, and how to sample.
    """
    if not isinstance(trained.spec, BaseSpec):
        return False
    clip = parents["clip"].spec
    hop = load_hop(trained, parents, device="cuda" if torch.cuda.is_available() else "cpu")
    caption = torch.tensor(tokens(what.prompts, clip.net.context_length))  # type: ignore[attr-defined]
    seeds = [what.seed + place for place in range(len(what.prompts))]
    image = run(hop, CascadeState(seeds=seeds, tokens=caption), what.how).image
    assert image is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(image).save(path)
    return True


def grid(image: Float[Tensor, " b 3 h w"], columns: int = 0) -> Image.Image:
    """Pictures in [-1, 1] side by side, row by row, two pixels of white between them."""
    columns = columns or math.ceil(math.sqrt(len(image)))
    rows, side = math.ceil(len(image) / columns), image.shape[-1] + 2
    sheet = Image.new("RGB", (columns * side - 2, rows * side - 2), "white")
    for place, pixels in enumerate(images.to_bytes(image)):
        tile = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        sheet.paste(tile, (place % columns * side, place // columns * side))
    return sheet
