"""Which noise levels a network knows: those of the timesteps of a discrete chain, or all of a range.

For chains: betas -> alpha-bars -> noise levels, and which of their timesteps a sampler visits.

A network trained on T timesteps knows T noise levels, sigma_t**2 = (1 - alpha_bar_t) / alpha_bar_t, growing
with t.  Samplers walk any decreasing sequence of levels, so "100 of 1000 steps" is a choice of timesteps
here and nothing else: in the sigma frame the respaced betas of the papers need not be computed.

The tables are float64.
"""

import math
from typing import Literal, NamedTuple, assert_never

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core.spec import Spec

Spacing = Literal["linspace", "ddim_leading", "sections", "fast27", "ldm_plus_one", "quad", "trailing"]
"""Which timesteps "N steps" are; `timesteps` says who uses which."""
FAST27 = (10, 10, 3, 2, 2)


class ScheduleSpec(Spec):
    """The noise levels of a network that was trained on discrete timesteps."""

    betas: Literal["linear", "cosine", "scaled_linear"] = "linear"
    """linear: DDPM; cosine: Improved DDPM; scaled_linear: latent diffusion, linear in sqrt(beta)."""
    num_timesteps: int = Field(1000, ge=2)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    """First beta of linear at 1000 timesteps (scaled by 1000 / num_timesteps) and of scaled_linear (as it
    is); cosine has none."""
    beta_end: float = Field(0.02, gt=0, lt=1)
    last: Literal["clean", "first"] = "clean"
    """Where the last step leads: to the clean image (DDPM, DDIM), or to the level of timestep 0 (latent
    diffusion)."""

    @model_validator(mode="after")
    def _rises(self) -> "ScheduleSpec":
        if self.beta_start >= self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} must be below beta_end {self.beta_end}")
        if self.betas == "linear" and self.beta_end * 1000 >= self.num_timesteps:
            raise ValueError(
                f"linear betas of {self.num_timesteps} timesteps end at "
                f"{self.beta_end * 1000 / self.num_timesteps:g}; 1 or more destroys the image in one step: "
                "take more timesteps, or cosine"
            )
        return self


class LogNormalSpec(Spec):
    """The noise levels of a network that was trained on all of them: log sigma is normal.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    std: float = Field(1.2, gt=0)
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    """The highest level that samplers visit; sigma_min is the lowest before 0."""

    @model_validator(mode="after")
    def _rises(self) -> "LogNormalSpec":
        refuse_falling(self.sigma_min, self.sigma_max)
        return self

    def draw(self, like: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
        """A level to train at for each sample."""
        return torch.exp(self.mean + self.std * torch.randn(len(like), device=like.device))


def refuse_falling(low: float, high: float) -> None:
    """Raises ValueError unless the lowest noise level of a spec is below its highest."""
    if low >= high:
        raise ValueError(f"sigma_min {low} must be below sigma_max {high}")


def sigma_range(levels: ScheduleSpec | LogNormalSpec) -> tuple[float, float]:
    """Lowest and highest noise level that a sampler asks a network for."""
    if isinstance(levels, LogNormalSpec):
        return levels.sigma_min, levels.sigma_max
    bar = np.cumprod(1 - added(levels))
    low, high = np.sqrt((1 - bar[[0, -1]]) / bar[[0, -1]]).tolist()
    return low, high


def added(spec: ScheduleSpec) -> NDArray[np.float64]:
    """Variance added by each step, in DDPM's frame; a NumPy array, which has content in FakeTensorMode, too.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 4 (linear); Nichol & Dhariwal 2021 (arXiv:2102.09672),
    eq. 17 (cosine); Rombach et al. 2022 (arXiv:2112.10752), published code (scaled_linear).
    """
    count, start, end = spec.num_timesteps, spec.beta_start, spec.beta_end
    match spec.betas:
        case "linear":
            scale = 1000 / count
            return np.linspace(scale * start, scale * end, count)
        case "scaled_linear":
            return np.linspace(start**0.5, end**0.5, count) ** 2
        case "cosine":
            bar = np.cos((np.linspace(0, 1, count + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - bar[1:] / bar[:-1]).clip(max=0.999)
        case _:
            assert_never(spec.betas)


def betas(spec: ScheduleSpec) -> Float[Tensor, " t"]:
    """Variance added by each step, in DDPM's frame."""
    return torch.tensor(added(spec))


def alpha_bars(spec: ScheduleSpec) -> Float[Tensor, " t"]:
    """Share of the variance that is still image, falling with t (Ho et al. 2020, eq. 4)."""
    return (1 - betas(spec)).cumprod(0)


def sigmas(spec: ScheduleSpec) -> Float[Tensor, " t"]:
    """Noise level of each timestep, rising with t."""
    bar = alpha_bars(spec)
    return ((1 - bar) / bar).sqrt()


def timesteps(
    spacing: Spacing, num_timesteps: int, num_steps: int, *, sections: tuple[int, ...] = ()
) -> Int[Tensor, " n"]:
    """The timesteps that a sampler visits, rising.

    - linspace: evenly from the first to the last (Improved DDPM, ADM; unCLIP).
    - ddim_leading: every k-th from 0, k the smallest whole stride that gives num_steps (ADM's "ddimN").
    - sections: the chain cut into equal parts, each with its own number of steps (ADM on LSUN).
    - fast27: sections 10, 10, 3, 2, 2, the last timestep two earlier (GLIDE's upsampler).
    - ldm_plus_one: ddim_leading, one later (latent diffusion).
    - quad: evenly in sqrt(t) up to 0.8 T (DDIM on CIFAR), without the repeated timesteps of DDIM's code from
      30 steps of 1000 on, at which it calls the network again and changes nothing.
    - trailing: evenly from the last timestep backwards (Lin et al. 2023, arXiv:2305.08891, table 2).
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps {num_steps} must be from 1 to the {num_timesteps} of training")
    if num_steps == 1 and spacing != "trailing":
        raise ValueError(f"one step of {spacing} starts at timestep 0, not at the noise; use trailing")
    match spacing:
        case "linspace":
            chosen = fractions(num_timesteps, num_steps)
        case "ddim_leading":
            chosen = leading(num_timesteps, num_steps)
        case "ldm_plus_one":
            chosen = plus_one(num_timesteps, num_steps)
        case "sections":
            chosen = in_sections(num_timesteps, num_steps, sections)
        case "fast27":
            chosen = in_sections(num_timesteps, num_steps, FAST27)
            chosen[-1] -= 2
        case "quad":
            chosen = squares(num_timesteps, num_steps)
        case "trailing":
            stride = num_timesteps / num_steps
            chosen = [round(num_timesteps - i * stride) - 1 for i in reversed(range(num_steps))]
        case _:
            assert_never(spacing)
    return torch.tensor(chosen)


def fractions(size: int, count: int) -> list[int]:
    """`count` of the numbers below `size`, evenly and with both ends; a single one is the first.

    Halves go to the even neighbour.  ADM's own code adds up its stride; the rounding error leads to the other
    neighbour for some counts (21 of 1000), but for none of the published ones.
    """
    stride = (size - 1) / max(1, count - 1)
    return [round(i * stride) for i in range(count)]


def leading(num_timesteps: int, num_steps: int) -> list[int]:
    """Every k-th number from 0, k the smallest stride that gives num_steps; ValueError if none does."""
    stride = next(k for k in range(1, num_timesteps + 1) if -(-num_timesteps // k) <= num_steps)
    found = list(range(0, num_timesteps, stride))
    if len(found) != num_steps:
        raise ValueError(
            f"no whole stride takes {num_steps} of {num_timesteps} timesteps; one takes {len(found)}; "
            "or use linspace"
        )
    return found


def plus_one(num_timesteps: int, num_steps: int) -> list[int]:
    """`leading`, each timestep one later; ValueError unless num_steps divides the chain and is less than it.

    Otherwise the published code takes more steps than asked for or runs off the end of the chain.
    """
    if num_timesteps % num_steps or num_steps == num_timesteps:
        raise ValueError(
            f"ldm_plus_one needs num_steps below {num_timesteps} that divides it, got {num_steps}"
        )
    return [t + 1 for t in leading(num_timesteps, num_steps)]


def squares(num_timesteps: int, num_steps: int) -> list[int]:
    """Evenly in sqrt(t) from 0 to 0.8 of the chain, each timestep once.

    The first squares of many fall on one timestep (of 1000, 50 steps visit 49 and 100 visit 96); published
    code takes these steps too, from a timestep to itself, which changes nothing.

    Source: Song et al. 2021 (arXiv:2010.02502), appendix D.2, and the published code.
    """
    roots = np.linspace(0, math.sqrt(0.8 * num_timesteps), num_steps)
    return sorted({int(t) for t in roots**2})  # float errors as published: 16 steps of 1000 depend on them


def in_sections(num_timesteps: int, num_steps: int, sections: tuple[int, ...]) -> list[int]:
    """Timesteps of equal parts of the chain, the first ones longer by one if need be, each as `fractions`.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), section 4; the numbers of Dhariwal & Nichol 2021
    (arXiv:2105.05233), appendix H.
    """
    if min(sections, default=0) < 1 or sum(sections) != num_steps:
        raise ValueError(f"sections {sections} must be numbers of steps with the sum num_steps, {num_steps}")
    whole, extra = divmod(num_timesteps, len(sections))
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        size = whole + (i < extra)
        if count > size:
            raise ValueError(f"section {i} takes {count} steps of its {size} timesteps; lower it")
        chosen += [start + t for t in fractions(size, count)]
        start += size
    return chosen


class Walk(NamedTuple):
    """The levels that a sampler visits on a chain."""

    sigmas: Float[Tensor, " n_plus_1"]
    """Decreasing; the last is the level of the result: 0, or that of timestep 0."""
    timesteps: Int[Tensor, " n"]
    """Of all levels but the last."""


def walk(schedule: ScheduleSpec, spacing: Spacing, num_steps: int, *, sections: tuple[int, ...] = ()) -> Walk:
    """The noise levels that a sampler visits on a chain, and their timesteps.

    With `last` "first" the sampler ends at the level of timestep 0, and what it returns is the published
    image after `noise.to_vp`.
    """
    table = sigmas(schedule)
    chosen = timesteps(spacing, schedule.num_timesteps, num_steps, sections=sections).flip(0)
    end = table[:1] if schedule.last == "first" else torch.zeros_like(table[:1])
    return Walk(torch.cat([table[chosen], end]), chosen)


class Clock(nn.Module):
    """sigma -> the timestep that a network of a discrete chain is told.

    Exact at the levels of the chain, linear in log sigma between them, and held at both ends.

    Args:
        schedule: The chain that the network was trained on.
        rescaled: Whether it was told t * 1000 / T (Improved DDPM) instead of t.
    """

    log_sigmas: Float[Tensor, " t"]

    def __init__(self, schedule: ScheduleSpec, *, rescaled: bool = False) -> None:
        super().__init__()
        self.scale = 1000 / schedule.num_timesteps if rescaled else 1.0
        self.register_buffer("log_sigmas", sigmas(schedule).log().float(), persistent=False)

    def forward(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        log_sigma, table = sigma.float().log(), self.log_sigmas
        above = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        t = above - 1 + ((log_sigma - low) / (high - low)).clamp(0, 1)
        whole = t.round()
        return self.scale * torch.where((t - whole).abs() < 0.01, whole, t)  # float32 noise in log sigma
