"""Churn: noise put back before each step of Heun's method, which corrects errors of earlier steps.

Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
"""

import math

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from dd_core.noise import Noise
from dd_core.spec import Spec


class ChurnSpec(Spec):
    """Noise put back before each step; the defaults are those for ImageNet.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 2 and table 5.
    """

    amount: float = Field(40.0, gt=0)
    """S_churn, shared by the steps; a step adds at most 41 % to its level."""
    low: float = Field(0.05, ge=0)
    """S_tmin: noise levels below it are left alone."""
    high: float = Field(50.0, gt=0)
    """S_tmax: noise levels above it are left alone."""
    noise: float = Field(1.003, gt=0)
    """S_noise: standard deviation of the new noise; a little above 1, as denoisers remove too much."""

    @model_validator(mode="after")
    def _fits(self) -> "ChurnSpec":
        if self.low > self.high:
            raise ValueError(
                f"low {self.low:g} is above high {self.high:g}, so no noise is put back; swap them"
            )
        return self


def churned(
    x: Float[Tensor, " b *s"], sigma: float, noise: Noise | None, churn: ChurnSpec | None, num_steps: int
) -> tuple[Float[Tensor, " b *s"], float]:
    """The image and its level after a little noise was put back."""
    if churn is None or not churn.low <= sigma <= churn.high:
        return x, sigma
    assert noise is not None
    raised = sigma * (1 + min(churn.amount / num_steps, math.sqrt(2) - 1))
    return x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise(x), raised
