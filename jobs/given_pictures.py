"""Pictures and masks given to `ddiff sample`: read as networks take them, or refused with what to do."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from dd_core import images


def rgb(path: Path, side: int | None) -> Float[Tensor, " 1 3 h w"]:
    """A picture in [-1, 1].

    Raises:
        ValueError: It cannot be read, is not RGB, or has another size than the cascade paints.
    """
    found = opened_picture(path, "RGB", side)
    return images.to_unit(torch.from_numpy(np.array(found)).permute(2, 0, 1)[None])


def gray(path: Path, side: int) -> Float[Tensor, " 1 1 h w"]:
    """The brightness of a picture, in [-1, 1].

    Raises:
        ValueError: It cannot be read, is not greyscale, or has another size than the cascade paints.
    """
    return torch.from_numpy(np.array(opened_picture(path, "L", side)))[None, None].float() / 127.5 - 1


def hole(path: Path, side: int) -> Bool[Tensor, " 1 1 h w"]:
    """Where a mask is white.

    Raises:
        ValueError: It cannot be read, is not greyscale, or has another size than the cascade paints.
    """
    return torch.from_numpy(np.array(opened_picture(path, "L", side)) > 127)[None, None]


def opened_picture(path: Path, mode: Literal["RGB", "L"], side: int | None) -> Image.Image:
    """A picture of this mode and size, or why not."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as stored:
            found = ImageOps.exif_transpose(stored)  # as it is shown, and as data are read
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no PNG, JPEG or WebP that can be read ({error})") from None
    if found.mode != mode:
        name = {"RGB": "RGB", "L": "greyscale (8 bits)"}[mode]
        raise ValueError(f"{path}: its mode is {found.mode}; convert it to {name}")
    if side is not None and found.size != (side, side):
        width, height = found.size
        raise ValueError(f"{path}: {width} x {height}, but the cascade paints {side} x {side}; resize it")
    return found
