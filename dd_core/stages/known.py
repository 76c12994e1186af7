"""What a training-free edit starts from and keeps: a picture with a hole, its brightness, or block means.

Source: Song et al. 2023 (arXiv:2303.01469), algorithm 4: zero-shot editing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dd_core import edits
from dd_core.cascade import CascadeState


class Known(NamedTuple):
    """What an edit starts from, and how it keeps what it must."""

    image: Float[Tensor, " b 3 h w"]
    edit: edits.Edit


def refuse_known(state: CascadeState, side: int) -> None:
    """Refuse an edit that cannot be kept at this side.

    Raises:
        ValueError: Two edits are asked for at once, an input has the wrong number of channels, or blocks do
            not fill the side.
    """
    asked = [name for name in ("hole", "gray", "coarse") if getattr(state, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"one edit at a time: {' and '.join(asked)} were given; leave all but one out")
    for name, part, channels in (("gray", state.gray, 1), ("coarse", state.coarse, 3)):
        if part is not None and (part.ndim != 4 or part.shape[1] != channels):
            raise ValueError(f"{name} is {tuple(part.shape)}; convert it to {channels} channel(s)")
    if state.coarse is not None:
        height, width = state.coarse.shape[2:]
        if height != width or side % height:
            raise ValueError(
                f"an image of {width} x {height} does not enlarge to {side} x {side} in whole blocks; "
                f"its side must divide {side}"
            )


def known_of(state: CascadeState, side: int, device: torch.device) -> Known | None:
    """What is known of a request's image, at the side of a hop; None if it is no edit.

    Raises:
        ValueError: As `refuse_known`.
    """
    refuse_known(state, side)
    if state.known is not None and state.hole is not None:
        image = F.interpolate(state.known.to(device), (side, side), mode="area")
        hole = F.interpolate(state.hole.float().to(device), (side, side), mode="area") > 0
        return Known(edits.bared(image, hole), edits.inpaint(image, hole))
    if state.gray is not None:
        gray = F.interpolate(state.gray.to(device), (side, side), mode="area")
        return Known(gray.expand(-1, 3, -1, -1), edits.colorize(gray))
    if state.coarse is not None:
        coarse, factor = state.coarse.to(device), side // state.coarse.shape[2]
        return Known(F.interpolate(coarse, scale_factor=factor), edits.upscale(coarse, factor))
    return None
