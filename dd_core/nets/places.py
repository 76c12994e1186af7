"""Numbers and places on a grid as waves, of the amplitude of what stands beside them.

A learned position that starts as small noise is not heard beside noisy patches: with it a CLIP trained
for minutes told colours and no place, and a base painted the right thing anywhere (README, experiments).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def grid_waves(side: int, width: int) -> Float[Tensor, " n d"]:
    """Where each position of a square grid is: half the numbers for its column, half for its row."""
    at = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    return torch.cat([wave(place.flatten() / side, width // 2, top=100.0) for place in (columns, rows)], -1)


def wave(values: Float[Tensor, " b"], width: int, *, top: float = 1000.0) -> Float[Tensor, " b d"]:
    """Sines and cosines of a number at geometrically spaced frequencies, 1 to `top`."""
    steps = torch.arange(width // 2, device=values.device, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(math.log(top) * steps / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)
