"""The noise levels at which guides train: those of the model that they guide.

A guide is called at every level that a sampling visits, and is useless at levels that it never saw: with
linear betas and 1000 timesteps, half of the levels lie above sigma 3.4 and the last at 157.

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4; Nichol et al. 2022 (arXiv:2112.10741), section
2.4; Liu et al. 2021 (arXiv:2112.05744), section 3.2: uniform over all timesteps of the chain.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from dd_core import schedules
from dd_core.schedules import ScheduleSpec
from dd_core.stage import LearnedSpec


class GuideSpec(LearnedSpec):
    """What the specs of all guides have in common."""

    log_sigma_mean: float = 0.0
    log_sigma_std: float = Field(1.4, gt=0)
    """Noise levels of training where there is no `schedule`: log sigma is normal, as for the demo's base."""
    schedule: ScheduleSpec | None = None
    """Of the chain that it guides; it trains uniformly at its timesteps, as published.  None: log-normal."""


class GuideLevels(nn.Module):
    """Draws a noise level to learn at for each image."""

    table: Float[Tensor, " t"] | None

    def __init__(self, spec: GuideSpec) -> None:
        super().__init__()
        self.spec = spec
        table = None if spec.schedule is None else schedules.sigmas(spec.schedule)
        self.register_buffer("table", table, persistent=False)

    def forward(self, like: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
        """One level per sample of `like`, with its dtype and on its device."""
        if self.table is not None:
            return self.table.to(like)[torch.randint(len(self.table), (len(like),), device=like.device)]
        normal = torch.randn(len(like), dtype=like.dtype, device=like.device)
        return (self.spec.log_sigma_mean + self.spec.log_sigma_std * normal).exp()
