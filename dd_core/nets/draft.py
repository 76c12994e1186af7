"""An image embedding unfolded to the image that it speaks of, in one call: the mean of all such images.

A vector is cheap to decode and an image is dear to denoise, so what the vector already says is learned
here, at a tenth of the cost, and a diffusion model that starts from the draft has only to make it sharp.

Sources: Radford et al. 2016 (arXiv:1511.06434, figure 1, "project and reshape"); Pandey et al. 2022
(arXiv:2201.00308, DiffuseVAE: a decoder's image refined by a diffusion model that is told it).
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FOLD = 8
"""Pixels of the image to one position of the first map."""


class Draft(nn.Module):
    """Unit vectors of d numbers -> images in about [-1, 1].

    Args:
        embedding_width: d.
        image_size: Side of the image in pixels, a multiple of 8.
        width: Channels at an eighth of the side; half as many at a quarter.
    """

    def __init__(self, embedding_width: int, image_size: int, width: int) -> None:
        super().__init__()
        self.loud, self.grid = embedding_width**0.5, image_size // FOLD
        hidden = 4 * width
        self.project = nn.Sequential(
            nn.Linear(embedding_width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, self.grid**2 * width),
        )
        self.coarse = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fine = nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.out = nn.Conv2d(width // 2, 3 * 4**2, 3, padding=1)

    def forward(self, embedding: Float[Tensor, " b d"]) -> Float[Tensor, " b 3 h w"]:
        h = self.project(embedding * self.loud).unflatten(1, (-1, self.grid, self.grid))
        h = F.pixel_shuffle(self.coarse(F.silu(h)), 2)
        return F.pixel_shuffle(self.out(F.silu(self.fine(F.silu(h)))), 4)
