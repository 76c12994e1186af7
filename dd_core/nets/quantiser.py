"""The codebook of a VQ autoencoder: each latent becomes the nearest of its vectors.

Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1 and 2; its loss is in `losses.py`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_core.precision import exact_products


class Quantised(NamedTuple):
    """Quantised latents."""

    vectors: Float[Tensor, " b z h w"]
    """The nearest vectors themselves: gradients reach the codebook, but not the latents."""
    codes: Int[Tensor, " b h w"]
    """Their indices in the codebook."""


class Quantiser(nn.Module):
    """Latents -> the nearest vectors of a codebook."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(codes, channels)
        nn.init.uniform_(self.vectors.weight, -1 / codes, 1 / codes)

    @torch.no_grad()
    def begin(self, latent: Float[Tensor, " b z h w"]) -> None:
        """Put the vectors where latents are: those of a batch, evenly spread over it.

        As published they begin within 1 / codes of zero; latents that leave there faster than the vectors can
        follow share a handful of them, and stay with it.  Source: Lancucki et al. 2020 (arXiv:2005.08520).
        """
        rows = latent.float().movedim(1, -1).flatten(0, -2)
        spread = torch.arange(len(self.vectors.weight), device=rows.device) * len(rows)
        self.vectors.weight.copy_(rows[spread // len(self.vectors.weight)])

    def forward(self, latent: Float[Tensor, " b z h w"]) -> Quantised:
        with torch.no_grad(), torch.autocast(latent.device.type, enabled=False), exact_products():
            rows, book = latent.movedim(1, -1).flatten(0, -2), self.vectors.weight.to(latent)
            apart = book.square().sum(1) - 2 * rows @ book.T  # without the row's square, equal for all
            codes = apart.argmin(1).view(len(latent), *latent.shape[2:])
        return Quantised(self.of_codes(codes), codes)

    def of_codes(self, codes: Int[Tensor, " b h w"]) -> Float[Tensor, " b z h w"]:
        """The vectors of given codes."""
        return self.vectors(codes).movedim(-1, 1).contiguous()


def straight_through(z: Float[Tensor, " b *s"], quantized: Float[Tensor, " b *s"]) -> Float[Tensor, " b *s"]:
    """The quantized values, whose gradient goes to z as if it had not been quantized.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), section 3.2.
    """
    return z + (quantized - z).detach()
