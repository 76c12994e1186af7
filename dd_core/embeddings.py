"""Arithmetic on CLIP embeddings: between two images, from one caption to another, and as short codes.

Rows are unit vectors unless said otherwise.  Source of all: Ramesh et al. 2022 (arXiv:2204.06125).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def slerp(
    a: Float[Tensor, " b *s"], b: Float[Tensor, " b *s"], share: Float[Tensor, " b"] | float
) -> Float[Tensor, " b *s"]:
    """A point on the great circle from a (share 0) to b (share 1): unit vectors stay unit vectors.

    For vectors of any length, such as noise, the angle is that between their directions (Song et al. 2021,
    arXiv:2010.02502, appendix D.5).  Opposite directions have no shortest arc and give nan.

    Source: section 3.2; Shoemake 1985.
    """
    left, right = a.flatten(1), b.flatten(1)
    part = torch.as_tensor(share, dtype=a.dtype, device=a.device).expand(len(a))[:, None]
    straight = F.normalize(left, dim=1), F.normalize(right, dim=1)
    apart, along = ((straight[0] + sign * straight[1]).norm(dim=1, keepdim=True) for sign in (-1, 1))
    omega = 2 * torch.atan2(apart, along)  # exact for the smallest and the largest angles, as acos is not
    parallel = omega < 1e-6
    sine = torch.where(parallel, 1.0, torch.where(along > 0, omega.sin(), torch.nan))
    weight_a = torch.where(parallel, 1 - part, ((1 - part) * omega).sin() / sine)
    weight_b = torch.where(parallel, part, (part * omega).sin() / sine)
    return (weight_a * left + weight_b * right).view_as(a)


def text_difference(caption: Float[Tensor, " b d"], start: Float[Tensor, " b d"]) -> Float[Tensor, " b d"]:
    """The direction from one caption to another; `slerp` an image embedding towards it by 0.25 to 0.5.

    Source: section 3.3.
    """
    return F.normalize(caption - start, dim=-1)


def nearness(
    draws: Float[Tensor, " b k d"], caption: Float[Tensor, " b d"], seen: Float[Tensor, " b k d"]
) -> Float[Tensor, " b k"]:
    """How near the picture of each of k embeddings drawn for a caption is, in sum, to caption and draw.

    Args:
        draws: Unit vectors.
        caption: Unit vectors.
        seen: Embeddings of the draws' pictures, unit vectors; the draws themselves if there is no draft.

    Source: section 2.2 (k is 2, unpainted).
    """
    return torch.einsum("bkd,bd->bk", seen, caption) + (seen * draws).sum(-1)


class Pca(NamedTuple):
    """The main axes of a set of embeddings, the most important first."""

    mean: Float[Tensor, " d"]
    axes: Float[Tensor, " d k"]
    """Orthonormal columns."""
    low: Float[Tensor, " k"]
    """Smallest coordinate on each axis."""
    high: Float[Tensor, " k"]
    """Largest."""


def main_axes(covariance: Float[Tensor, " d d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d d"]]:
    """Variances, the largest first, and the axes that have them, as columns.

    Each axis points so that its largest component is positive, whatever the solver returned.
    """
    variances, axes = torch.linalg.eigh(covariance)
    axes = axes.flip(1)
    return variances.flip(0), axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def fit_pca(embeddings: Float[Tensor, " n d"], axes: int) -> Pca:
    """The axes that hold most of the variance (unCLIP: 319 of 1024).

    Source: section 2.2.
    """
    if not 1 <= axes <= embeddings.shape[1]:
        raise ValueError(f"axes {axes} must be from 1 to the {embeddings.shape[1]} of the embeddings")
    values = embeddings.double()
    mean = values.mean(0)
    main = main_axes((values - mean).T @ (values - mean))[1][:, :axes]
    coordinates = (values - mean) @ main
    low, high = coordinates.amin(0), coordinates.amax(0)
    return Pca(*(part.to(embeddings.dtype) for part in (mean, main, low, high)))


def encode(pca: Pca, embeddings: Float[Tensor, " b d"]) -> Float[Tensor, " b k"]:
    """Coordinates on the axes."""
    return (embeddings - pca.mean) @ pca.axes


def decode(pca: Pca, coordinates: Float[Tensor, " b k"]) -> Float[Tensor, " b d"]:
    """The embedding with these coordinates, equal to the mean off the axes; not normalised."""
    return coordinates @ pca.axes.T + pca.mean


def to_buckets(
    values: Float[Tensor, " b k"], low: Float[Tensor, " k"], high: Float[Tensor, " k"], count: int = 1024
) -> Int[Tensor, " b k"]:
    """Which of `count` equal parts of [low, high] each value lies in; values outside go to the nearest.

    Also for the product of caption and image embedding that the autoregressive prior is told, one value in
    [-1, 1].  Source: section 2.2.
    """
    return ((values - low) / (high - low) * count).long().clamp(0, count - 1)


def from_buckets(
    codes: Int[Tensor, " b k"], low: Float[Tensor, " k"], high: Float[Tensor, " k"], count: int = 1024
) -> Float[Tensor, " b k"]:
    """The middle of each bucket."""
    return low + (codes + 0.5) / count * (high - low)
