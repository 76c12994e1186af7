"""An image embedding decoded to an image, in one forward pass.

Decoding a vector is cheap and denoising an image is expensive, so what the vector already determines is
learned here, at a tenth of the cost; a diffusion model that starts from the draft has only to sharpen it.

The image is made of flat layers: each has one colour, soft masks say which layer a pixel belongs to, and
a residual is added pixel by pixel.  Shape and colour are then learned separately, and an edge is as sharp
as its mask; a decoder of plain pixels learned shapes last (README, experiments).

Sources: Radford et al. 2016 (arXiv:1511.06434, figure 1, "project and reshape"); Locatello et al. 2020
(arXiv:2006.15055, section 3.2: an image as layers blended by a softmax over their masks); Pandey et al.
2022 (arXiv:2201.00308, DiffuseVAE: a decoder's image refined by a diffusion model that is told it).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_core.nets.conv import Conv
from dd_core.nets.whitening import Whitening

FOLD = 8
"""Side of the square of image pixels at one position of the first map."""
STEEP = 2.0
"""Factor of the mask logits, so that masks become sharp early."""


class Draft(nn.Module):
    """Unit vectors of d numbers -> images in about [-1, 1].

    Args:
        embedding_width: d.
        image_size: Side of the image in pixels, a multiple of 8.
        width: Channels at an eighth of the side; half as many at a quarter.
        layers: Flat layers of an image.
        measured: Embeddings that the whitening is fitted to, before anything is learned.
    """

    HIDDEN: ClassVar = ("trunk.2", "coarse", "fine", "out")
    """Layers that muon_named steps by Muon (dd_core/optimizers.py)."""

    def __init__(self, embedding_width: int, image_size: int, width: int, layers: int, measured: int) -> None:
        super().__init__()
        self.whitening = Whitening(embedding_width, measured)
        self.grid, self.layers = image_size // FOLD, layers
        hidden = 4 * width
        self.trunk = nn.Sequential(
            nn.Linear(embedding_width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.colours = nn.Linear(hidden, 3 * layers)
        self.project = nn.Linear(hidden, self.grid**2 * width)
        self.coarse = Conv(width, 2 * width, 3, padding=1)
        self.fine = Conv(width // 2, width // 2, 3, padding=1)
        self.out = Conv(width // 2, (layers + 3) * 4**2, 3, padding=1)

    def forward(self, embedding: Float[Tensor, " b d"]) -> Float[Tensor, " b 3 h w"]:
        return self.unfolded(self.whitening(embedding))

    def unfolded(self, coordinates: Float[Tensor, " b d"]) -> Float[Tensor, " b 3 h w"]:
        """The images of whitened embeddings."""
        told = self.trunk(coordinates)
        colours = self.colours(told).unflatten(1, (3, self.layers)).float()
        h = self.project(told).unflatten(1, (-1, self.grid, self.grid))
        h = F.pixel_shuffle(self.coarse(F.silu(h)), 2)
        h = F.pixel_shuffle(self.out(F.silu(self.fine(F.silu(h)))), 4).float()
        masks = (STEEP * h[:, : self.layers]).softmax(1)
        return torch.einsum("bcl,blhw->bchw", colours, masks) + h[:, self.layers :]
