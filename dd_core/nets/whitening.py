"""Image embeddings in coordinates of variance one.

In the embeddings of a CLIP trained for minutes two dozen directions have a large amplitude; what a second
object looks like is encoded in the others, a thirtieth as strong.  A linear readout finds it, a network that
learns by gradients does not, and noise of equal strength in all directions drowns it.  So decoders and priors
use the coordinates of an embedding on the main axes: (value - mean) / deviation.

Source: Ramesh et al. 2022 (arXiv:2204.06125, section 2.2: PCA of the embeddings); published priors ship the
mean and the deviation of each number with their weights.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dd_core.embeddings import main_axes
from dd_core.ranks import gathered

FLOOR = 0.1
"""Added to each coordinate's deviation, as a share of the RMS coordinate of a unit vector, 1 / sqrt(d)."""


class Whitening(nn.Module):
    """Unit vectors of d numbers <-> d coordinates of mean zero and variance about one.

    It is fitted to the embeddings that `look` gets until it has `measured` of them, then fixed.

    Args:
        width: d.
        measured: Embeddings to fit to.
    """

    mean: Tensor
    axes: Tensor
    scale: Tensor
    seen: Tensor
    total: Tensor
    products: Tensor

    def __init__(self, width: int, measured: int) -> None:
        super().__init__()
        self.measured = measured
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("axes", torch.eye(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("total", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(width, width, dtype=torch.float64))

    @property
    def ready(self) -> bool:
        """Whether the coordinates are fitted."""
        return bool(self.seen >= self.measured)

    @torch.no_grad()
    def look(self, embedding: Float[Tensor, " b d"]) -> None:
        """Add these and the other ranks' to the statistics; the last of them fix axes and deviations."""
        if not self.training or self.ready:
            return
        values = gathered(embedding).double()
        self.seen += len(values)
        self.total += values.sum(0)
        self.products += values.T @ values
        if self.ready:
            mean = self.total / self.seen
            variance, axes = main_axes(self.products / self.seen - torch.outer(mean, mean))
            floor = FLOOR * len(mean) ** -0.5
            self.mean.copy_(mean)
            self.axes.copy_(axes)
            self.scale.copy_(variance.clamp(min=0).sqrt() + floor)

    def forward(self, embedding: Float[Tensor, " b d"]) -> Float[Tensor, " b d"]:
        """Coordinates of embeddings; in float32, since the small ones matter."""
        with torch.autocast(embedding.device.type, enabled=False):
            coordinates: Tensor = (embedding.float() - self.mean) @ self.axes / self.scale
            return coordinates

    def back(self, coordinates: Float[Tensor, " b d"]) -> Float[Tensor, " b d"]:
        """The unit vectors that have these coordinates."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return F.normalize((coordinates.float() * self.scale) @ self.axes.T + self.mean, dim=-1)


def nothing_of(model: nn.Module) -> Float[Tensor, ""]:
    """A loss of zero that reaches every weight, for steps in which a stage only collects statistics."""
    return torch.stack([weight.sum() for weight in model.parameters()]).sum() * 0.0
