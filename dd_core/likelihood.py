"""The variational bound of a discrete chain, in bits per number: a training loss and a measure of images.

A chain is its table of noise levels, rising with the timestep (`schedules.sigmas`), in float64; timestep t
leads from level t to level t - 1, and timestep 0 to the image, whose pixels are 8 bits in [-1, 1].

Sources: Ho et al. 2020 (arXiv:2006.11239), eq. 5; Nichol & Dhariwal 2021 (arXiv:2102.09672), sections 3.1
and 3.3.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dd_core.denoiser import ConditionalDenoiser, Conditioning, Denoised, Denoiser
from dd_core.noise import Noise, Variance, spread


class Step(NamedTuple):
    """One step of a chain for each sample, its variances in the frame of the level it leads to."""

    sigma: Float[Tensor, " b"]
    sigma_next: Float[Tensor, " b"]
    """0 at timestep 0."""
    log_small: Float[Tensor, " b"]
    """Log of beta-tilde; at timestep 0, where that is zero, of that of timestep 1."""
    log_large: Float[Tensor, " b"]
    """Log of beta."""


def step_at(table: Float[Tensor, " t"], t: Int[Tensor, " b"]) -> Step:
    """The steps of a chain at the timesteps t."""
    levels = table.double().to(t.device)
    sigma, sigma_next = levels[t], torch.where(t > 0, levels[(t - 1).clamp(min=0)], 0.0)
    upper, lower = levels[t.clamp(min=1)], levels[t.clamp(min=1) - 1]
    small = lower**2 * (1 - (lower / upper) ** 2)
    small = torch.where(t > 0, small, small / (1 + lower**2))  # to the frame of the image
    large = (1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2)
    return Step(sigma, sigma_next, small.log(), large.log())


def bound(
    out: Denoised,
    x0: Float[Tensor, " b *s"],
    t: Int[Tensor, " b"],
    table: Float[Tensor, " t"],
    *,
    variance: Variance = "learned",
) -> Float[Tensor, " b"]:
    """The term of the bound for timestep t, in bits per number.

    The divergence of the true posterior from the model's; at timestep 0, the bits that encode the pixels.

    Args:
        out: The denoiser's answer to x0 noised to level t; the means of the two posteriors differ by their
            x0 alone, as both have the same share of x.
        x0: Pixels in [-1, 1].
        t: Timesteps.
        table: Noise levels of the chain.
        variance: Of the model's step.

    Source: Nichol & Dhariwal 2021, eq. 4 to 7.
    """
    step = step_at(table, t)
    small, large = (spread(value, x0).to(x0.dtype) for value in (step.log_small, step.log_large))
    later = spread(step.sigma_next, x0) > 0
    match variance:
        case "learned":
            assert out.variance_fraction is not None
            log_var = small + out.variance_fraction * (large - small)
        case "fixed_small":
            log_var = small
        case "fixed_large":
            log_var = torch.where(later, large, small)
    share = spread(1 - (step.sigma_next / step.sigma) ** 2, x0).to(x0.dtype)
    apart = share * (x0 - out.x0)
    nats = 0.5 * (log_var - small - 1 + (small - log_var).exp() + apart.square() * (-log_var).exp())
    nats = torch.where(later, nats, -log_pixel(x0, out.x0, log_var / 2))
    return nats.flatten(1).mean(1) / math.log(2)


def log_pixel(
    x0: Float[Tensor, " b *s"], mean: Float[Tensor, " b *s"], log_std: Float[Tensor, " b *#s"]
) -> Float[Tensor, " b *s"]:
    """Log probability of 8-bit pixels under a normal distribution: its mass in bins that are 1/127.5 wide.

    The darkest and the brightest bin include the tails.  The published code approximates the distribution
    function by a tanh; this is the function itself, evaluated in the lower tail, where it is accurate.

    Source: Ho et al. 2020, eq. 13; probabilities below 1e-12 count as that, as published.
    """
    sharp, half, below = torch.exp(-log_std), 1 / 255, -(x0 - mean).abs()
    inside = mass_below(sharp * (below + half)) - mass_below(sharp * (below - half))
    darkest = mass_below(sharp * (x0 - mean + half))
    brightest = mass_below(sharp * (mean - x0 + half))
    mass = torch.where(x0 < -0.999, darkest, torch.where(x0 > 0.999, brightest, inside))
    return mass.clamp(min=1e-12).log()


def mass_below(z: Float[Tensor, " b *s"]) -> Float[Tensor, " b *s"]:
    """The normal distribution function; torch.special.ndtr is 0 in single precision below -6."""
    return torch.erfc(-math.sqrt(0.5) * z) / 2


def hybrid(
    denoise: ConditionalDenoiser,
    x0: Float[Tensor, " b *s"],
    t: Int[Tensor, " b"],
    table: Float[Tensor, " t"],
    cond: Conditioning,
    *,
    rescaled: bool = False,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Squared error of the noise, and the bound that trains the variance alone: L_hybrid is their sum.

    Args:
        denoise: A network that learns its variance.
        x0: Pixels in [-1, 1].
        t: Timesteps to train at.
        table: Noise levels of the chain.
        cond: What the network is told.
        rescaled: Multiplies the bound by T / 1000, which makes its weight the paper's 0.001 of the sum over
            T terms (Improved DDPM); ADM's 4000-step models were trained without.

    Source: Nichol & Dhariwal 2021, eq. 16; Dhariwal & Nichol 2021 (arXiv:2105.05233), published code.
    """
    sigma = table.to(x0)[t]
    eps = torch.randn_like(x0)
    x = x0 + spread(sigma, x0) * eps
    out = denoise(x, sigma, cond)
    mse = ((x - out.x0) / spread(sigma, x0) - eps).square().flatten(1).mean(1)
    bits = bound(out._replace(x0=out.x0.detach()), x0, t, table)
    return mse, bits * (len(table) / 1000 if rescaled else 1.0)


def vlb(
    denoise: ConditionalDenoiser,
    x0: Float[Tensor, " b *s"],
    t: Int[Tensor, " b"],
    table: Float[Tensor, " t"],
    cond: Conditioning,
) -> Float[Tensor, " b"]:
    """L_vlb: T times the bound at t, whose mean over uniform timesteps is the whole bound in bits.

    Source: Nichol & Dhariwal 2021, eq. 4.
    """
    sigma = table.to(x0)[t]
    out = denoise(x0 + spread(sigma, x0) * torch.randn_like(x0), sigma, cond)
    return len(table) * bound(out, x0, t, table)


class TimestepSampler(nn.Module):
    """Draws timesteps in proportion to the root mean square of their last losses; for L_vlb.

    Its history is in buffers, so that a resumed run draws as an unbroken one.  Under data parallelism every
    rank must see the same losses: gather t and loss before `observe`.

    Args:
        num_timesteps: Length of the chain.
        history: Losses remembered per timestep; until all timesteps have that many, draws are uniform.
        uniform: Share of the draws that stays uniform.

    Source: Nichol & Dhariwal 2021, eq. 18.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, num_timesteps: int, *, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(num_timesteps, history, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self) -> Float[Tensor, " t"]:
        """Of each timestep."""
        count, history = self.losses.shape
        rms = self.losses.square().mean(1).sqrt()
        warm = (self.seen >= history).all() & (rms.sum() > 0)
        by_loss = (1 - self.uniform) * rms / rms.sum().clamp(min=1e-300) + self.uniform / count
        return torch.where(warm, by_loss, 1 / count)

    def draw(self, count: int) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
        """Timesteps, and the weights with which the mean loss is in expectation that of uniform draws."""
        chances = self.probabilities()
        t = torch.multinomial(chances, count, replacement=True)
        return t, (1 / (len(chances) * chances[t])).float()

    @torch.no_grad()
    def observe(self, t: Int[Tensor, " b"], loss: Float[Tensor, " b"]) -> None:
        """Remember unweighted losses; those of a timestep that occurs more than once, in their order.

        A loss that is not finite is skipped: with it no timestep could be drawn for the rest of the run.
        """
        count, history = self.losses.shape
        t = torch.where(loss.isfinite(), t, count)  # an extra row, dropped below
        order = t.argsort(stable=True)
        t, loss = t[order], loss.double()[order]
        new = self.seen.new_zeros(count + 1).scatter_add_(0, t, torch.ones_like(t))
        place = history - (new.cumsum(0)[t] - torch.arange(len(t), device=t.device))  # its last comes last
        older = torch.arange(history, device=t.device) + new[:, None]
        rows = F.pad(self.losses, (0, 0, 0, 1)).gather(1, older.clamp(max=history - 1))
        rows[torch.where(place >= 0, t, count), place.clamp(min=0)] = loss
        self.losses.copy_(rows[:-1])
        self.seen += new[:-1]


class Bits(NamedTuple):
    """What an image costs, in bits per number."""

    total: Float[Tensor, " b"]
    prior: Float[Tensor, " b"]
    """The cost of the noisiest level not being pure noise."""
    steps: Float[Tensor, " b t"]
    """Of each timestep, 0 first."""


@torch.no_grad()
def bits_per_dim(
    denoise: Denoiser,
    x0: Float[Tensor, " b *s"],
    table: Float[Tensor, " t"],
    noise: Noise,
    *,
    variance: Variance = "learned",
) -> Bits:
    """The bound on the negative log likelihood of images, one query of the denoiser per timestep.

    Args:
        denoise: Clip it (`guidance.clip_x0`) for the published figures.
        x0: 8-bit pixels in [-1, 1].
        table: Noise levels of the chain, or of every k-th of its timesteps.
        noise: Source of the noise.
        variance: Of the model's steps.

    Source: Ho et al. 2020, eq. 5.
    """
    terms = []
    for step, sigma in enumerate(table.tolist()):
        level = torch.full((len(x0),), sigma, dtype=x0.dtype, device=x0.device)
        out = denoise(x0 + sigma * noise(x0), level)
        t = torch.full((len(x0),), step, device=x0.device)
        terms.append(bound(out, x0, t, table, variance=variance))
    bar = 1 / (1 + table[-1].item() ** 2)
    nats = 0.5 * (bar * x0.square() - bar - math.log1p(-bar))
    prior, steps = nats.flatten(1).mean(1) / math.log(2), torch.stack(terms, 1)
    return Bits(prior + steps.sum(1), prior, steps)
