"""Sinusoidal embeddings of numbers and of grid positions, with the amplitude of the features beside them.

Learned position embeddings that start as small noise are drowned by noisy patches: with them a CLIP trained
for minutes knew colours but no positions, and a base painted the right thing anywhere (README, experiments).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def grid_waves(side: int, width: int) -> Float[Tensor, " n d"]:
    """An embedding of each position of a square grid: first half for its column, second for its row."""
    at = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    return torch.cat([wave(place.flatten() / side, width // 2, top=100.0) for place in (columns, rows)], -1)


def wave(values: Float[Tensor, " b"], width: int, *, top: float = 1000.0) -> Float[Tensor, " b d"]:
    """Cosines, then sines, of numbers at geometrically spaced frequencies, from 1 to just below `top`."""
    steps = torch.arange(width // 2, device=values.device, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(math.log(top) * steps / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)
