"""Consistency training: a network learns to give the same answer all along the path from noise to image.

Of two neighbouring levels, an image is noised to the higher and its path followed to the lower: by the steps
of a teacher (distillation), or with the image itself and the same noise (training alone).  The network at the
higher level is trained towards its own average at the lower, by any distance between images.  The path may be
cut into segments: then the network jumps to the end of the segment it is in, so a picture takes as many jumps
as there are segments, and each is far easier to learn.

Sources: Song et al. 2023 (arXiv:2303.01469), algorithms 2 and 3; Song & Dhariwal 2023 (arXiv:2310.14189,
pseudo-Huber distance); Heek et al. 2024 (arXiv:2403.06807, segments); Luhman & Luhman 2021 (arXiv:2101.02388,
paths that a teacher walks from noise).
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from dd_core.denoiser import Denoised, Denoiser
from dd_core.noise import Noise, karras_sigmas, spread
from dd_core.samplers import Query, Sampling, sample
from dd_core.spec import Spec

Distance = Callable[[Float[Tensor, " b *s"], Float[Tensor, " b *s"]], Float[Tensor, " b"]]
"""Distance between estimates of images, one value per sample: l1, l2, pseudo_huber, or a perceptual one."""


class Pace(NamedTuple):
    """How finely the path is cut, and how slowly the target follows."""

    num_levels: int
    mu: float
    """Decay of the target's moving average: the share of its weights that is kept at each step."""


def pace(
    step: int,
    num_steps: int,
    *,
    s0: int = 2,
    s1: int = 150,
    mu0: float = 0.95,
    form: Literal["paper", "openai_code"] = "paper",
) -> Pace:
    """The number of levels N(k) and the target's averaging mu(k) when training alone.

    Args:
        step: k, from 0.
        num_steps: K, at which N(k) reaches s1 + 1.
        s0: Levels at first, but these are never fewer than 2.
        s1: Levels less one at last; above s0.
        mu0: Averaging at first, in the paper's form.
        form: In mu the published code has N(k) - 1 where the paper has N(k), so it averages less: 0.9025 at
            k = 0 where the paper has 0.95.

    Source: Song et al. 2023, section 5 and appendix C.
    """
    grown = math.sqrt(step / num_steps * ((s1 + 1) ** 2 - s0**2) + s0**2)
    intervals = max(1, math.ceil(grown - 1))
    over = intervals + 1 if form == "paper" else intervals
    return Pace(intervals + 1, math.exp(s0 * math.log(mu0) / over))


class FixedLevels(Spec):
    """The same number of levels at every step, for distillation (Song et al. 2023, table 3)."""

    kind: Literal["fixed"] = "fixed"
    num_levels: int = Field(18, ge=2)
    """N: 18 on CIFAR-10, 40 on ImageNet-64."""
    mu: float = Field(0.95, ge=0, lt=1)
    """As `Pace.mu`; 0 on CIFAR-10."""

    @property
    def final(self) -> int:
        """Levels at the end of the training."""
        return self.num_levels

    def at(self, step: Tensor) -> Pace:
        """How fine the path is, and how slow the target, at a step."""
        return Pace(self.num_levels, self.mu)


class GrowingLevels(Spec):
    """Few levels at first and many at last, for training alone (Song et al. 2023, appendix C)."""

    kind: Literal["growing"] = "growing"
    steps: int = Field(ge=1)
    """K, the step at which there are s1 + 1 levels; as published, that of the whole budget."""
    s0: int = Field(2, ge=1)
    s1: int = Field(150, ge=2)
    mu0: float = Field(0.9, gt=0, lt=1)
    form: Literal["paper", "openai_code"] = "paper"
    """The published code averages less than the paper says; see `pace`."""

    @model_validator(mode="after")
    def _grows(self) -> "GrowingLevels":
        if self.s0 >= self.s1:
            raise ValueError(f"s0 {self.s0} must be below s1 {self.s1}: levels grow")
        return self

    @property
    def final(self) -> int:
        """Levels at the end of the training."""
        return self.s1 + 1

    def at(self, step: Tensor) -> Pace:
        """How fine the path is, and how slow the target, at a step."""
        reached = min(int(step), self.steps)
        return pace(reached, self.steps, s0=self.s0, s1=self.s1, mu0=self.mu0, form=self.form)


class Cut(NamedTuple):
    """How the path from noise to image is cut: into levels, and these into segments."""

    num_levels: int
    """At least 2, the first at sigma_max."""
    sigma_min: float = 0.002
    """Lowest level that is not 0."""
    sigma_max: float = 80.0
    to_zero: bool = False
    """Whether the last level is 0, as in samplers; otherwise it is sigma_min, as published."""
    segments: int = 1
    """How many, each of equally many intervals; divides num_levels - 1."""
    steps: int = 1
    """Teacher steps in each interval."""

    def grid(self) -> Float[Tensor, " n"]:
        """All levels that the teacher visits, a Karras grid; every steps-th is a level of the path."""
        fine = (self.num_levels - 1) * self.steps
        levels = karras_sigmas(fine + (not self.to_zero), sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        return levels[: fine + 1]

    def ends(self) -> Float[Tensor, " s"]:
        """Where each segment ends; the last at 0."""
        grid = self.grid()
        each = (len(grid) - 1) // self.segments
        return torch.cat([grid[each:-1:each], grid.new_zeros(1)])


class Pair(NamedTuple):
    """Neighbouring levels for each sample, and the end of the segment that they lie in."""

    high: Float[Tensor, " b"]
    low: Float[Tensor, " b"]
    end: Float[Tensor, " b"]
    """0 in the last segment."""
    path: Float[Tensor, " b n"]
    """The levels that the teacher visits on its way from high to low, both included."""


def draw_pair(like: Float[Tensor, " b *s"], cut: Cut) -> Pair:
    """Uniform neighbours among the levels: one pair for each sample of `like`, on its device."""
    return pairs_at(torch.randint(cut.num_levels - 1, (len(like),), device=like.device), like, cut)


def pairs_at(place: Int[Tensor, " b"], like: Tensor, cut: Cut) -> Pair:
    """The neighbours in each of these intervals, counted from the noise; in the dtype of `like`."""
    grid, steps = cut.grid().to(like), cut.steps
    path = grid[steps * place[:, None] + torch.arange(steps + 1, device=like.device)]
    each = (len(grid) - 1) // cut.segments
    return Pair(path[:, 0], path[:, -1], cut.ends().to(like)[steps * place // each], path)


def segmented(
    x: Float[Tensor, " b *s"], sigmas: Float[Tensor, " n"], ends: Float[Tensor, " s"], noise: Noise
) -> Sampling:
    """Multistep sampling of a path in segments: each jump lands on the end of the segment that it begins in.

    From there fresh noise leads up again to the next level of that segment, if there is one: on the way to an
    end the answer, which is where DDIM would have to go to arrive there, is not on the path.

    Args:
        x: Noise at level sigmas[0].
        sigmas: Decreasing noise levels, all ends among them.
        ends: The last level of each segment.
        noise: Source of fresh noise; not called where each segment has one level.

    Source: Song et al. 2023, algorithm 1, for each segment of Heek et al. 2024, algorithm 2.
    """
    stops = ends.tolist()
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        end = max(stop for stop in stops if stop < sigma)
        x0 = (yield Query(x, sigma)).x0
        x = x0 + end * ((x - x0) / sigma)
        if sigma_next > end:
            x = x + math.sqrt(sigma_next**2 - end**2) * noise(x)
    return x


def ended(denoise: Denoiser) -> Denoiser:
    """A denoiser as a consistency function whose paths end at level 0, where it is the identity.

    Networks that predict eps, v or edm tend to the identity there by themselves.

    Source: Song et al. 2023, eq. 4, with epsilon 0.
    """

    def answered(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Denoised:
        found = denoise(x, torch.where(sigma == 0, torch.ones_like(sigma), sigma)).x0
        return Denoised(torch.where(spread(sigma, x) == 0, x, found))

    return answered


Solver = Literal["heun", "ddim"]
"""The teacher's steps: Heun's, as published, or DDIM's, which query it once each."""

Follow = Callable[[Float[Tensor, " b *s"], Float[Tensor, " b n"]], Float[Tensor, " b *s"]]
"""Images at the first of the levels -> the images on their path at the last."""


def following(teacher: Denoiser, solver: Solver = "heun") -> Follow:
    """Follows the path of a teacher, a diffusion model already conditioned and guided."""

    def walked(x: Float[Tensor, " b *s"], path: Float[Tensor, " b n"]) -> Float[Tensor, " b *s"]:
        step = heun_down if solver == "heun" else ddim_down
        for high, low in pairwise(path.unbind(1)):
            x = sample(step(x, spread(high, x), spread(low, x)), teacher)
        return x

    return walked


def ddim_down(x: Float[Tensor, " b *s"], high: Tensor, low: Tensor) -> Sampling:
    """From high to low straight towards the estimate, as `samplers.ddim` walks."""
    return torch.lerp((yield Query(x, high)).x0, x, low / high)


def heun_down(x: Float[Tensor, " b *s"], high: Tensor, low: Tensor) -> Sampling:
    """From high to low as `samplers.heun` walks: Heun's step, Euler's to level 0.

    Args:
        x: Images at the levels `high`.
        high: One level for each sample, shaped to broadcast against x.
        low: Where they go; may be 0.
    """
    x0 = (yield Query(x, high)).x0
    last = low == 0
    there, level = torch.where(last, x, torch.lerp(x0, x, low / high)), torch.where(last, high, low)
    x0_there = (yield Query(there, level)).x0
    slope = ((x - x0) / high + (there - x0_there) / level) / 2
    return torch.where(last, x0, x + (low - high) * slope)


Both = tuple[Float[Tensor, " b *s"], Float[Tensor, " b *s"]]
"""Images at the higher and at the lower level of each pair."""


def rollout(
    teacher: Follow, noise: Float[Tensor, " b *s"], cut: Cut
) -> tuple[tuple[Float[Tensor, " r *s"], Float[Tensor, " r *s"]], Pair]:
    """The paths that a teacher walks from noise to its pictures, which are those that its student will meet.

    Noised images are other than what a teacher meets between noise and picture, above all a guided one.

    Args:
        teacher: Follows its path.
        noise: Standard normal.
        cut: How the path is cut.

    Returns:
        Images at the higher and at the lower level of every interval, and the levels: those of a path after
        each other, so n intervals of b paths are r = b n rows.

    Source: Luhman & Luhman 2021 (arXiv:2101.02388), section 3, for whole paths.
    """
    intervals = cut.num_levels - 1
    path = cut.grid().to(noise)
    walked = [path[0] * noise]
    for number in range(intervals):
        levels = path[cut.steps * number : cut.steps * (number + 1) + 1]
        walked.append(teacher(walked[-1], levels.expand(len(noise), -1)))
    high, low = (torch.stack(part, 1).flatten(0, 1) for part in (walked[:-1], walked[1:]))
    place = torch.arange(intervals, device=noise.device).repeat(len(noise))
    return (high, low), pairs_at(place, noise, cut)


def distillation(
    student: Denoiser,
    target: Denoiser,
    teacher: Follow,
    x0: Float[Tensor, " b *s"],
    pair: Pair,
    distance: Distance,
) -> Float[Tensor, " b"]:
    """Consistency distillation: the path is followed by the steps of a sampler with the teacher.

    Args:
        student: The network in training, with its conditioning bound.
        target: The moving average of the student, with the same conditioning.
        teacher: Follows the path that is learned.
        x0: Clean images.
        pair: Levels to train at.
        distance: Between the answers of student and target.

    Source: Song et al. 2023, algorithm 2.
    """
    x = x0 + spread(pair.high, x0) * torch.randn_like(x0)
    return gap(student, target, (x, teacher(x, pair.path)), pair, distance)


def training(
    student: Denoiser, target: Denoiser, x0: Float[Tensor, " b *s"], pair: Pair, distance: Distance
) -> Float[Tensor, " b"]:
    """Consistency training: the path is that of the image itself, with the same noise at both levels.

    Source: Song et al. 2023, algorithm 3.
    """
    eps = torch.randn_like(x0)
    noisy = x0 + spread(pair.high, x0) * eps, x0 + spread(pair.low, x0) * eps
    return gap(student, target, noisy, pair, distance)


def gap(
    student: Denoiser,
    target: Denoiser,
    noisy: Both,
    pair: Pair,
    distance: Distance,
) -> Float[Tensor, " b"]:
    """Distance of the student at the higher level from the target at the lower, with the same dropout masks.

    No gradient flows through the target.
    """
    devices = [noisy[0].device] if noisy[0].is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):  # the student draws the same masks below
        wanted = landing_alike(target(noisy[1], pair.low).x0, noisy, pair)
    return distance(student(noisy[0], pair.high).x0, wanted)


def landing_alike(found: Float[Tensor, " b *s"], noisy: Both, pair: Pair) -> Float[Tensor, " b *s"]:
    """The estimate at the higher level from which DDIM reaches the same segment end as from `found`.

    Args:
        found: The estimate at the lower level; in the last segment it is the result, unchanged.
        noisy: The image at both levels.
        pair: The levels.

    Source: Heek et al. 2024 (arXiv:2403.06807), algorithm 1 (invDDIM).
    """
    high, low, end = (spread(level, found) for level in pair[:3])
    landed = torch.where(low == end, noisy[1], torch.lerp(found, noisy[1], end / low))
    landed = torch.where(low == 0, found, landed)
    return (landed - noisy[0] * (end / high)) / (1 - end / high)


def l1(a: Float[Tensor, " b *s"], b: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
    """Mean absolute difference."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Float[Tensor, " b *s"], b: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
    """Mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Float[Tensor, " b *s"], b: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
    """sqrt(|a - b|**2 + c**2) - c with c = 0.00054 sqrt(d): squared near 0, absolute far away.

    Source: Song & Dhariwal 2023, section 3.3.
    """
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


def enlarged(distance: Distance, side: int = 224) -> Distance:
    """A perceptual distance between images that, if smaller, are enlarged to the size its network expects.

    Source: Song et al. 2023, published code (LPIPS, bilinear, below 256 px).
    """

    def between(a: Float[Tensor, " b c h w"], b: Float[Tensor, " b c h w"]) -> Float[Tensor, " b"]:
        if a.shape[-1] < 256:
            a, b = (F.interpolate(one, (side, side), mode="bilinear") for one in (a, b))
        return distance(a, b)

    return between
