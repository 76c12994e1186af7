"""The first example: a DDPM of points on a plane, whose true answer is known at every noise level.

Points lie on an S.  A small network learns to predict the noise on them, with the schedule, contract, loss
and sampler of the large ones.  Since the noised S is a mixture of Gaussians along it, its density, its score
and the best possible denoiser have closed forms to compare the network with.

Sources: Ho et al. 2020 (arXiv:2006.11239); the S is that of scikit-learn's make_s_curve, seen from the side.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_core import losses
from dd_core.denoiser import Conditioning, Denoised, Denoiser, NetworkDenoiser
from dd_core.nets.layers import sinusoids
from dd_core.noise import SeededNoise, from_vp, to_vp
from dd_core.samplers import ddpm, sample
from dd_core.schedules import Clock, ScheduleSpec, sigmas, walk

SCHEDULE = ScheduleSpec(betas="linear", num_timesteps=100)
"""A tenth of DDPM's timesteps, with betas ten times as large."""


def s_curve(place: Float[Tensor, " n"]) -> Float[Tensor, " n 2"]:
    """Points of the S, from one end (place 0) to the other (1); about unit variance in both coordinates."""
    angle = 3 * math.pi * (place - 0.5)
    return 1.5 * torch.stack([angle.sin(), angle.sign() * (angle.cos() - 1) / 2], 1)


def fine(count: int = 2_000) -> Float[Tensor, " n 2"]:
    """Points so dense on the S that, noised at the levels of `SCHEDULE`, they are as good as the whole S."""
    return s_curve((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def log_density(
    points: Float[Tensor, " n 2"], x: Float[Tensor, " b 2"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Exact log density at x, in nats, of the points noised to sigma, all equally likely."""
    variance = sigma.square()
    return nearness(points, x, sigma).logsumexp(1) - (2 * math.pi * variance * len(points)).log()


def exact(points: Float[Tensor, " n 2"]) -> Denoiser:
    """The best possible denoiser of these points: E[x0 | x], all of them equally likely."""

    def denoise(x: Float[Tensor, " b 2"], sigma: Float[Tensor, " b"]) -> Denoised:
        near = nearness(points.to(x), x, sigma).softmax(1)
        return Denoised(near @ points.to(x))

    return denoise


def nearness(
    points: Float[Tensor, " n 2"], x: Float[Tensor, " b 2"], sigma: Float[Tensor, " b"]
) -> Float[Tensor, " b n"]:
    """Log likelihood of x for each point, up to a constant that is the same for all points."""
    squares = (x[:, None] - points).square().sum(2)
    return -squares / (2 * sigma[:, None].square())


class PointNet(nn.Module):
    """Three residual layers on the coordinates, their sines and cosines; each is told the timestep.

    Args:
        width: Of each layer.
    """

    waves: Tensor

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("waves", torch.tensor([1.0, 2.0, 4.0, 8.0]), persistent=False)
        self.enter = nn.Linear(2 + 4 * len(self.waves), width)
        self.told = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.leave = nn.Linear(width, 2)

    def forward(
        self, x: Float[Tensor, " b 2"], time: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, " b 2"]:
        angles, when = (x[:, :, None] * self.waves).flatten(1), sinusoids(time, self.width)
        h = self.enter(torch.cat([x, angles.sin(), angles.cos()], 1))
        for told, layer in zip(self.told, self.hidden, strict=True):
            h = h + layer(nn.functional.silu(h + told(when)))
        answer: Tensor = self.leave(nn.functional.silu(h))
        return answer


class Progress(NamedTuple):
    """One step of training."""

    step: int
    loss: float
    """Mean squared error of the noise."""
    denoise: Denoiser
    """The network as it is now."""


def train_points(*, steps: int = 1_500, batch_size: int = 256, seed: int = 0) -> Iterator[Progress]:
    """Train a network on the S, step by step; the last Progress holds what was learned.

    Args:
        steps: Optimizer steps.
        batch_size: Points per step, drawn anew.
        seed: Determines the result.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = NetworkDenoiser(PointNet(), "eps", tell=Clock(SCHEDULE, rescaled=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    levels = sigmas(SCHEDULE).float()

    def denoise(x: Float[Tensor, " b 2"], sigma: Float[Tensor, " b"]) -> Denoised:
        return model(x, sigma, Conditioning())

    for step in range(1, steps + 1):
        x0 = s_curve(torch.rand(batch_size, generator=generator))
        sigma = levels[torch.randint(len(levels), (batch_size,), generator=generator)]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed * 1_000_003 + step)
            loss = (losses.x0_mse(model, x0, sigma, Conditioning()) / sigma**2).mean()  # of eps
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        yield Progress(step, loss.item(), denoise)


def forward_frames(count: int, *, seed: int = 0) -> Float[Tensor, " t n 2"]:
    """Points of the S as they turn to noise, timestep by timestep, in DDPM's frame; the first are clean."""
    place = (torch.arange(count) + 0.5) / count
    x, before = s_curve(place), 0.0
    frames, noise = [x], SeededNoise([seed])
    for level in sigmas(SCHEDULE).tolist():
        x = x + math.sqrt(level**2 - before**2) * noise(x[None])[0]
        frames.append(to_vp(x, level))
        before = level
    return torch.stack(frames)


def reverse_frames(denoise: Denoiser, count: int, *, seed: int = 0) -> Float[Tensor, " t n 2"]:
    """Noise as it turns to points, by DDPM's own steps, in its frame; the last are clean.

    Args:
        denoise: Called for all points at once.
        count: Points.
        seed: Of the noise; every point has its own stream.
    """
    levels = walk(SCHEDULE, "linspace", SCHEDULE.num_timesteps).sigmas
    noise = SeededNoise(range(seed, seed + count))
    start = from_vp(noise(torch.empty(count, 2)), float(levels[0]))
    frames: list[Tensor] = []

    def watched(x: Float[Tensor, " b 2"], sigma: Float[Tensor, " b"]) -> Denoised:
        frames.append(to_vp(x, float(sigma[0])))
        return denoise(x, sigma)

    made = sample(ddpm(start, levels, noise, variance="fixed_small"), watched)
    return torch.stack([*frames, made])


def distance_to_curve(x: Float[Tensor, " b 2"]) -> Float[Tensor, " b"]:
    """How far from the S each point is."""
    return torch.cdist(x.double(), fine()).amin(1)


@torch.no_grad()
def excess(denoise: Denoiser, *, count: int = 4_000, seed: int = 1) -> float:
    """Mean squared error of the noise, over all timesteps, beyond that of the best possible denoiser."""
    generator = torch.Generator().manual_seed(seed)
    levels = sigmas(SCHEDULE).float()
    sigma = levels[torch.randint(len(levels), (count,), generator=generator)]
    x = s_curve(torch.rand(count, generator=generator))
    x = x + sigma[:, None] * torch.randn(count, 2, generator=generator)
    apart = (denoise(x, sigma).x0 - exact(fine())(x, sigma).x0) / sigma[:, None]
    return float(apart.square().mean())
