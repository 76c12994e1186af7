"""The noise levels at which the guides learn: those of the model that they lead.

A guide is asked at every level that a sampling visits, and says nothing sensible of levels it never saw: of
linear betas with 1000 timesteps, half lie above sigma 3.4 and the last at 157.

Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4; Nichol et al. 2022 (arXiv:2112.10741), section
2.4; Liu et al. 2021 (arXiv:2112.05744), section 3.2: all timesteps of the chain alike.
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
    """Of the chain that it leads, at whose timesteps it is trained, all alike, as published; None: normal."""


class GuideLevels(nn.Module):
    """Draws a noise level to learn at for each image."""

    table: Float[Tensor, " t"] | None

    def __init__(self, spec: GuideSpec) -> None:
        super().__init__()
        self.spec = spec
        table = None if spec.schedule is None else schedules.sigmas(spec.schedule)
        self.register_buffer("table", table, persistent=False)

    def forward(self, like: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
        """Levels of the number, the dtype and the device of `like`."""
        if self.table is not None:
            return self.table.to(like)[torch.randint(len(self.table), (len(like),), device=like.device)]
        normal = torch.randn(len(like), dtype=like.dtype, device=like.device)
        return (self.spec.log_sigma_mean + self.spec.log_sigma_std * normal).exp()
