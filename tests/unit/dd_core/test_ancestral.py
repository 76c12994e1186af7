"""Ancestral steps, churn and inversion, against closed forms of a Gaussian and of a mixture."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dd_core.denoiser import Conditioning, Denoised, NetworkDenoiser, learned_error
from dd_core.noise import (
    SeededNoise,
    analytic_std,
    ancestral_std,
    forward_std,
    karras_sigmas,
    posterior_std,
    spread,
)
from dd_core.samplers import ChurnSpec, Sampling, consistency, ddim, ddpm, dpmpp_2m, heun, invert, sample
from dd_core.schedules import ScheduleSpec, sigmas, walk

MEANS, STD = torch.tensor([-0.6, 0.5], dtype=torch.float64), 0.1
WEIGHTS = torch.tensor([0.25, 0.75], dtype=torch.float64)


def gaussian(x: Tensor, sigma: Tensor) -> Denoised:
    """E[x0 | x] for x0 ~ N(0.3, 0.5**2)."""
    var = spread(sigma, x) ** 2
    return Denoised((0.25 * x + var * 0.3) / (0.25 + var))


def mixture(x: Tensor, sigma: Tensor) -> Denoised:
    """E[x0 | x] for the mixture of two narrow Gaussians."""
    var = spread(sigma, x)[..., None] ** 2
    log_p = WEIGHTS.log() - (x[..., None] - MEANS) ** 2 / (2 * (STD**2 + var))
    means = (STD**2 * x[..., None] + var * MEANS) / (STD**2 + var)
    return Denoised((log_p.softmax(-1) * means).sum(-1))


def start(count: int, sigma: float, seed: int = 0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return math.sqrt(1 + sigma**2) * torch.randn(count, 1, generator=stream, dtype=torch.float64)


class Draws:
    """Quick noise for many samples."""

    def __init__(self) -> None:
        self.stream = torch.Generator().manual_seed(3)

    def __call__(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.stream, dtype=like.dtype)


SAMPLERS = {
    "ddim": ddim,
    "half ancestral": partial(ddim, eta=0.5),
    "fixed_small": partial(ddpm, variance="fixed_small"),
    "fixed_large": partial(ddpm, variance="fixed_large"),
    "churn": partial(heun, churn=ChurnSpec(amount=40.0, noise=1.0)),
    "heun": heun,
    "dpmpp_2m": lambda x, levels, noise: dpmpp_2m(x, levels),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_from_the_mixture(name: str) -> None:
    levels = walk(ScheduleSpec(), "linspace", 250).sigmas
    drawn = sample(SAMPLERS[name](start(4000, levels[0].item()), levels, Draws()), mixture)
    assert (drawn > 0).double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert drawn[drawn > 0].mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn[drawn < 0].mean().item() == pytest.approx(-0.6, abs=0.01)
    assert drawn[drawn > 0].std().item() == pytest.approx(STD, rel=0.15)


@pytest.mark.parametrize(
    "spec", [ScheduleSpec(num_timesteps=100), ScheduleSpec(betas="cosine", num_timesteps=60)]
)
def test_ddim_with_eta_one_and_all_steps_is_ddpm_with_the_small_variance(spec: ScheduleSpec) -> None:
    levels = walk(spec, "linspace", spec.num_timesteps).sigmas
    x = start(5, levels[0].item())
    ancestral = sample(ddpm(x, levels, Draws(), variance="fixed_small"), mixture)
    torch.testing.assert_close(sample(ddim(x, levels, Draws(), eta=1.0), mixture), ancestral)


def test_learned_fractions_zero_and_one_are_the_fixed_variances() -> None:
    for fraction, variance in ((0.0, "fixed_small"), (1.0, "fixed_large")):
        learned = ancestral_std("learned", torch.tensor(fraction, dtype=torch.float64), 3.0, 1.2)
        assert float(learned) == pytest.approx(float(ancestral_std(variance, None, 3.0, 1.2)))


def error(var: float, sigma: float) -> Tensor:
    """E[(x0 - E[x0 | x])**2] for x0 ~ N(0, var)."""
    return torch.tensor(var * sigma**2 / (var + sigma**2), dtype=torch.float64)


def test_a_seed_s_noise_is_the_same_whatever_numbers_are_the_default() -> None:
    like = torch.empty(1, 3, 8, 8, dtype=torch.float32)
    usual = SeededNoise([1])(like)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(SeededNoise([1])(like), usual)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("sigma", "s"), [(90.0, 80.0), (5.0, 0.1), (1.0, 0.9), (0.3, 0.01)])
@pytest.mark.parametrize("var", [0.01, 0.25, 1.0, 30.0])
def test_the_analytic_variance_is_that_of_the_true_posterior_of_a_gaussian(
    sigma: float, s: float, var: float
) -> None:
    found = float(analytic_std(error(var, sigma), sigma, s)) ** 2
    joint, there, here = var + s**2, var + s**2, var + sigma**2  # of (x_s, x_sigma); x_s; x_sigma
    assert found == pytest.approx(there - joint**2 / here)


def test_the_analytic_variance_is_that_of_the_paper_in_its_frame() -> None:
    """Theorem 1 with lambda**2 = beta-tilde, by the mean square of the score: eps = -sqrt(1 - bar) score."""
    sigma, s, var = 3.0, 1.2, 0.4
    bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + s**2)
    alpha, beta_bar, beta_bar_next = bar / bar_next, 1 - bar, 1 - bar_next
    small = beta_bar_next / beta_bar * (1 - alpha)
    gamma = 1 / (bar * var + beta_bar)  # E |score|**2 of a Gaussian
    factor = (math.sqrt(beta_bar / alpha) - math.sqrt(beta_bar_next - small)) ** 2
    theirs = small + factor * (1 - beta_bar * gamma)
    ours = float(analytic_std(error(var, sigma), sigma, s)) ** 2
    assert ours / (1 + s**2) == pytest.approx(theirs)


@pytest.mark.parametrize("steps", [4, 8])
def test_with_the_analytic_variance_few_steps_draw_the_variance_of_the_data(steps: int) -> None:
    levels = walk(ScheduleSpec(betas="cosine"), "linspace", steps).sigmas
    std, found = torch.tensor([1.0, 0.5], dtype=torch.float64), {}

    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        var = spread(sigma, x) ** 2
        exact = std**2 * var / (std**2 + var)
        return Denoised(x * std**2 / (std**2 + var), x0_variance=exact)

    for variance in ("analytic", "fixed_small", "fixed_large"):
        x = math.sqrt(1 + float(levels[0]) ** 2) * torch.randn(
            20_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        drawn = sample(ddpm(x, levels, Draws(), variance=variance), denoise)
        found[variance] = drawn.std(0) / std
    torch.testing.assert_close(found["analytic"], torch.ones(2).double(), atol=0.02, rtol=0)
    assert (found["fixed_small"] < 0.93).all(), found
    assert (found["fixed_large"] - 1).abs().max() > 0.05, found


@pytest.mark.parametrize(("sigma", "s"), [(90.0, 80.0), (5.0, 0.1), (0.3, 0.01)])
def test_a_fraction_of_an_image_s_error_is_that_fraction_between_the_fixed_variances(
    sigma: float, s: float
) -> None:
    level = torch.tensor(sigma, dtype=torch.float64)
    small, large = posterior_std(sigma, s) ** 2, forward_std(sigma, s) ** 2
    for fraction in (0.0, 0.4, 1.0, 30.0):
        error = learned_error(torch.tensor(fraction, dtype=torch.float64), level)
        found = float(analytic_std(error, sigma, s)) ** 2
        assert found == pytest.approx(small + fraction * (large - small))


def test_a_learned_variance_means_the_same_on_the_whole_chain_and_as_published() -> None:
    levels = sigmas(ScheduleSpec(betas="cosine", num_timesteps=4000))
    for place in (400, 1000, 3000):
        s, sigma = levels[place - 1 : place + 1].tolist()
        for fraction in (torch.tensor(0.3).double(), torch.tensor(1.0).double(), torch.tensor(20.0).double()):
            error = learned_error(fraction, levels[place])
            published = float(ancestral_std("learned", fraction, sigma, s))
            assert float(analytic_std(error, sigma, s)) == pytest.approx(published, rel=0.02)


class Poor(nn.Module):
    """Estimates of x0 ~ N(0, 1 / 4) that are wrong by a twentieth, and how wrong they are."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = torch.Generator().manual_seed(7)

    def forward(self, scaled: Tensor, told: Tensor, _: Conditioning) -> Tensor:
        sigma = spread(told.exp(), scaled)
        x, std = scaled * (1 + sigma**2).sqrt(), 0.5
        best = x * std**2 / (std**2 + sigma**2)
        wrong = 0.05 * torch.randn(x.shape, generator=self.stream, dtype=x.dtype)
        error = std**2 * sigma**2 / (std**2 + sigma**2) + 0.05**2
        return torch.cat([best + wrong, 2 * error * (1 + sigma**2) / sigma**2 - 1 + 0 * x], dim=1)


def test_a_network_that_predicts_images_may_learn_its_variance_and_take_few_steps() -> None:
    denoiser = NetworkDenoiser(Poor(), "x0", learns_variance=True)
    levels = walk(ScheduleSpec(betas="cosine", num_timesteps=4000), "linspace", 100).sigmas
    first = math.sqrt(1 + float(levels[0]) ** 2) * torch.randn(
        500, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    drawn = sample(
        ddpm(first, levels, Draws(), variance="analytic"), lambda x, sigma: denoiser(x, sigma, Conditioning())
    )
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.05)  # by logarithms 1e17


def test_an_answer_without_its_error_has_no_analytic_variance() -> None:
    with pytest.raises(ValueError, match="a network that knows how wrong it is; use ddim with eta=1"):
        sample(ddpm(start(1, 2.0), torch.tensor([2.0, 1.0, 0.0]), Draws(), variance="analytic"), gaussian)


def test_a_large_variance_on_a_short_chain_drowns_the_image() -> None:
    """Why SamplingSpec refuses it: of the last step's noise nothing is taken away again."""
    table = sigmas(ScheduleSpec())
    for steps, worst in ((1000, 1.5), (10, 20.0)):
        way = walk(ScheduleSpec(), "linspace", steps).sigmas.tolist()
        excess = max(forward_std(a, b) / b for a, b in pairwise(way[:-1]))
        assert (excess > worst) == (steps == 10)
    assert forward_std(table[111].item(), table[0].item()) > 30 * posterior_std(
        table[111].item(), table[0].item()
    )


@pytest.mark.parametrize("denoise", [gaussian, mixture])
def test_inverting_and_drawing_again_returns_the_image(denoise: object) -> None:
    image = torch.tensor([-0.75, -0.6, -0.5, 0.4, 0.5, 0.62], dtype=torch.float64)[:, None]

    def error(steps: int) -> float:
        levels = karras_sigmas(steps, sigma_min=2e-3, sigma_max=80.0)
        noise = sample(invert(image, levels), denoise)
        return (sample(ddim(noise, levels, Draws()), denoise) - image).abs().max().item()

    assert error(400) < 0.03
    assert error(200) / error(400) == pytest.approx(2.0, rel=0.4)


def test_the_inverse_is_the_noise_of_the_exact_flow() -> None:
    image = torch.tensor([[-0.4], [0.3], [1.1]], dtype=torch.float64)
    levels = karras_sigmas(800, sigma_min=2e-3, sigma_max=80.0)
    exact = 0.3 + (image - 0.3) * math.sqrt(0.25 + 80.0**2) / 0.5
    torch.testing.assert_close(sample(invert(image, levels), gaussian), exact, rtol=0.02, atol=0.02)


def test_churn_raises_the_level_by_the_noise_it_adds() -> None:
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    churn = ChurnSpec(amount=1.0, low=1.0, high=3.0, noise=1.1)
    levels = torch.tensor([5.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    sampling, asked = heun(x, levels, Draws(), churn=churn), []
    asked.append(next(sampling))
    for _ in range(4):
        asked.append(sampling.send(Denoised(asked[-1].x)))  # x is its own image, so only churn moves it
    assert [query.sigma for query in asked] == pytest.approx([5.0, 2.0, 2.0 * (1 + 1 / 3), 0.5, 0.5])
    added = 1.1 * 2.0 * math.sqrt((1 + 1 / 3) ** 2 - 1)
    assert asked[2].x.std().item() == pytest.approx(added, rel=0.02)
    assert torch.equal(asked[4].x, asked[2].x)


def test_heun_without_churn_draws_no_noise() -> None:
    x, levels = start(3, 80.0), karras_sigmas(5, sigma_min=0.02, sigma_max=80.0)
    assert torch.equal(sample(heun(x, levels), gaussian), sample(heun(x, levels, Draws()), gaussian))


def test_consistency_tops_up_the_noise_that_its_answers_have() -> None:
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    sampling = consistency(x, torch.tensor([9.0, 0.5, 0.0]).double(), Draws(), sigma_min=0.3)
    next(sampling)
    assert sampling.send(Denoised(x)).x.std().item() == pytest.approx(0.4, rel=0.02)  # 0.5, 0.4, 0.3


def test_a_clip_of_the_estimate_alone_leaves_the_direction() -> None:
    def step(clip: object) -> Tensor:
        sampling: Sampling = ddim(torch.full((1, 1), 6.0), torch.tensor([2.0, 1.0, 0.0]), Draws(), clip=clip)
        next(sampling)
        return sampling.send(Denoised(torch.full((1, 1), 2.0))).x

    assert step(None).item() == pytest.approx(2 + (6 - 2) / 2)
    assert step(lambda x0: x0.clamp(-1, 1)).item() == pytest.approx(1 + (6 - 2) / 2)


def test_an_ancestral_sample_does_not_depend_on_its_batch() -> None:
    def drawn(seeds: list[int]) -> Tensor:
        noise = SeededNoise(seeds)
        x = 80.0 * noise(torch.empty(len(seeds), 3))
        levels = karras_sigmas(8, sigma_min=2e-3, sigma_max=80.0)
        x = sample(ddpm(x, levels, noise, variance="fixed_small"), gaussian)
        return sample(heun(80.0 * noise(x), levels, noise, churn=ChurnSpec()), gaussian) + x

    torch.testing.assert_close(drawn([7]), drawn([3, 7, 9])[1:2])
