"""Image embeddings in coordinates of variance one.

A CLIP of minutes lets two dozen directions of its sphere speak loudly; what a second thing looks like it
whispers in the others, a thirtieth as loud.  A linear readout hears it, a network that learns by gradients
does not, and noise as loud in all directions drowns it.  So decoders and priors know an embedding by its
coordinates on the main axes, each less its mean, over its deviation.

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
"""Added to the deviation of each coordinate, as a share of what a direction of the sphere has on average."""


class Whitening(nn.Module):
    """Unit vectors of d numbers <-> d coordinates of mean zero and variance about one.

    It measures the embeddings it is shown until it has seen enough, and stands still from then on.

    Args:
        width: d.
        measured: Embeddings that it looks at.
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
        """Whether it has seen enough."""
        return bool(self.seen >= self.measured)

    @torch.no_grad()
    def look(self, embedding: Float[Tensor, " b d"]) -> None:
        """Measure these, those of the other ranks too; the last of them settle axes and deviations."""
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
        """Coordinates of embeddings; in float32, since the small ones decide."""
        with torch.autocast(embedding.device.type, enabled=False):
            coordinates: Tensor = (embedding.float() - self.mean) @ self.axes / self.scale
            return coordinates

    def back(self, coordinates: Float[Tensor, " b d"]) -> Float[Tensor, " b d"]:
        """The unit vectors that have these coordinates."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return F.normalize((coordinates.float() * self.scale) @ self.axes.T + self.mean, dim=-1)


def nothing_of(model: nn.Module) -> Float[Tensor, ""]:
    """A loss of zero that reaches every weight, for the steps in which a stage only looks."""
    return torch.stack([weight.sum() for weight in model.parameters()]).sum() * 0.0
