"""How well pictures fit their captions, from embeddings in one space; computed in float64.

Rows are unit vectors, as `dd_core.nets.clip` makes them: row i of the captions is that of picture i.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NORMAL = 1.959964
"""95 % of a normal distribution lie within so many standard deviations of its mean."""


class Mean(NamedTuple):
    """The mean of a sample, with its confidence interval."""

    value: float
    low: float
    high: float


def cosines(pictures: Float[Tensor, " *b d"], captions: Float[Tensor, " n d"]) -> Float[Tensor, " n"]:
    """Of each picture with its own caption, or of one picture with many.

    Source: Hessel et al. 2021 (arXiv:2104.08718), equation 1, without its factor of 2.5 and its cut at 0.
    """
    return (pictures.double() * captions.double()).sum(-1)


def others(count: int, among: int, *, seed: int) -> Int[Tensor, " n k"]:
    """For each of `count` captions, `among - 1` of the others, drawn anew for each from (seed, its number).

    Raises:
        ValueError: There are fewer than `among` captions, or none would be drawn.
    """
    if not 2 <= among <= count:
        raise ValueError(f"{among} of {count} captions cannot be compared; 2 to {count} can")
    rows = [
        np.random.default_rng((seed, row)).permutation(count - 1)[: among - 1] for row in range(count)
    ]  # indices among the others: its own is left out
    drawn = torch.from_numpy(np.stack(rows))
    return drawn + (drawn >= torch.arange(count)[:, None])


def found_own(
    pictures: Float[Tensor, " n d"], captions: Float[Tensor, " n d"], others: Int[Tensor, " n k"]
) -> Bool[Tensor, " n"]:
    """Whether a picture is nearer to its own caption than to each of the others; a tie counts as no.

    The mean is R-precision.  Source: Xu et al. 2018 (arXiv:1711.10485, AttnGAN), section 4.1, with R = 1.
    """
    own, captions = cosines(pictures, captions), captions.double()
    nearest = [cosines(picture, captions[rows]).max() for picture, rows in zip(pictures, others, strict=True)]
    return own > torch.stack(nearest)


def mean_of(values: Float[Tensor, " n"], z: float = NORMAL) -> Mean:
    """The mean of at least two values with its interval, 95 % by default, by the central limit theorem."""
    mean, half = values.double().mean(), z * values.double().std() / math.sqrt(len(values))
    return Mean(float(mean), float(mean - half), float(mean + half))
