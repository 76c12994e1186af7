"""Guidance against the published formulas of DDPM's frame, and laws of what is done to an estimate."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dd_core import edits
from dd_core.denoiser import Conditioning, Denoised
from dd_core.guidance import (
    Rank,
    Rows,
    bounded,
    by_gradient,
    classifier_free,
    clip_x0,
    dynamic_threshold,
    rows_of,
    stack,
)
from dd_core.noise import from_vp, to_vp
from dd_core.samplers import SamplingSpec, begin, ddim, ddpm, sample
from dd_core.schedules import ScheduleSpec, alpha_bars, sigmas

BAR, TABLE = alpha_bars(ScheduleSpec()), sigmas(ScheduleSpec()).tolist()
SCALE = 1.7


def estimate(x: Tensor, sigma: Tensor) -> Denoised:
    """A denoiser that is nobody's posterior mean."""
    return Denoised(torch.tanh(x / (1 + sigma[:, None] ** 2).sqrt()), torch.full_like(x, 0.3))


def log_p_vp(x_vp: Tensor) -> Tensor:
    """A classifier as published, which reads images of DDPM's frame."""
    return torch.cos(2 * x_vp).sum(1)


def log_p(x: Tensor, sigma: Tensor) -> Tensor:
    return log_p_vp(x / (1 + sigma[:, None] ** 2).sqrt())


def grad_vp(x_vp: Tensor) -> Tensor:
    return -2 * torch.sin(2 * x_vp)


class NoNoise:
    """Ancestral steps without their noise: the mean."""

    def __call__(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (500, 460), (40, 0)])
def test_in_ddim_it_is_condition_score(t: int, s: int) -> None:
    """eps - sqrt(1 - alpha_bar) grad, x0 derived again, then DDIM (Dhariwal & Nichol 2021, algorithm 2)."""
    x_vp = torch.randn(4, 3, dtype=torch.float64)
    x = from_vp(x_vp, TABLE[t])
    guided = by_gradient(clip_x0(estimate), log_p, scale=torch.full((4,), SCALE))
    sampling = ddim(x, torch.tensor([TABLE[t], TABLE[s]], dtype=torch.float64), NoNoise())
    found = to_vp(sample(sampling, guided), TABLE[s])

    x0 = estimate(x, torch.full((4,), TABLE[t], dtype=torch.float64)).x0.clamp(-1, 1)
    eps = (x_vp - BAR[t].sqrt() * x0) / (1 - BAR[t]).sqrt() - (1 - BAR[t]).sqrt() * SCALE * grad_vp(x_vp)
    x0 = (x_vp - (1 - BAR[t]).sqrt() * eps) / BAR[t].sqrt()
    torch.testing.assert_close(found, BAR[s].sqrt() * x0 + (1 - BAR[s]).sqrt() * eps)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (500, 460), (40, 0)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_with_mean_shift_it_is_condition_mean(t: int, s: int, variance: str) -> None:
    """mean + variance * grad (Dhariwal & Nichol 2021, algorithm 1), for any variance."""
    x_vp = torch.randn(4, 3, dtype=torch.float64)
    x = from_vp(x_vp, TABLE[t])
    guided = by_gradient(clip_x0(estimate), log_p, scale=torch.full((4,), SCALE))
    levels = torch.tensor([TABLE[t], TABLE[s]], dtype=torch.float64)
    found = to_vp(sample(ddpm(x, levels, NoNoise(), variance=variance, mean_shift=True), guided), TABLE[s])

    x0 = estimate(x, torch.full((4,), TABLE[t], dtype=torch.float64)).x0.clamp(-1, 1)
    beta = 1 - BAR[t] / BAR[s]
    mean = (BAR[s].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - BAR[s]) * x_vp) / (1 - BAR[t])
    tilde = beta * (1 - BAR[s]) / (1 - BAR[t])
    var = {"fixed_small": tilde, "fixed_large": beta, "learned": beta**0.3 * tilde**0.7}[variance]
    torch.testing.assert_close(found, mean + var * SCALE * grad_vp(x_vp))


@pytest.mark.parametrize(("t", "s"), [(999, 998), (500, 499), (500, 460)])
def test_bayes_rule_moves_the_mean_by_the_published_shift_over_the_root_of_alpha(t: int, s: int) -> None:
    """So for variance beta the two forms meet as steps grow small; that is all they differ in."""
    x = from_vp(torch.randn(4, 3, dtype=torch.float64), TABLE[t])
    levels = torch.tensor([TABLE[t], TABLE[s]], dtype=torch.float64)

    def mean(scale: float, mean_shift: bool) -> Tensor:
        guided = by_gradient(estimate, log_p, scale=torch.full((4,), scale))
        sampling = ddpm(x, levels, NoNoise(), variance="fixed_large", mean_shift=mean_shift)
        return sample(sampling, guided)

    exact, published = (mean(1.0, shift) - mean(0.0, shift) for shift in (False, True))
    torch.testing.assert_close(published, (BAR[t] / BAR[s]).sqrt() * exact)


def test_a_clip_ends_the_claim_on_the_mean() -> None:
    """Where the estimate was overwritten there is no gradient left to take out of it again."""
    guided = by_gradient(estimate, log_p, scale=torch.ones(2))
    assert clip_x0(guided)(torch.randn(2, 3), torch.ones(2)).gradient is None


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_a_hole_is_led_as_hard_as_a_whole_image_and_what_is_known_is_not(variance: str) -> None:
    """The pull stays by the estimates of the hole, so the mean moves by variance * gradient there."""
    levels = torch.tensor([TABLE[500], TABLE[490]], dtype=torch.float64)
    x, known = torch.randn(4, 3, dtype=torch.float64), torch.full((4, 3), 0.5, dtype=torch.float64)
    hole = torch.tensor([True, False, True]).expand(4, 3)
    sampling = partial(ddpm, x, levels, NoNoise(), variance=variance, mean_shift=True)

    def drawn(scale: float, edit: edits.Edit | None) -> Tensor:
        guided = by_gradient(estimate, log_p, scale=torch.full((4,), scale))
        return sample(sampling() if edit is None else edits.edited(sampling(), edit), guided)

    def fill(x0: Tensor) -> Tensor:
        return torch.where(hole, x0, known)

    torch.testing.assert_close(drawn(SCALE, fill)[hole], drawn(SCALE, None)[hole])
    torch.testing.assert_close(drawn(SCALE, fill)[~hole], drawn(0.0, fill)[~hole])


def test_guidance_by_two_scores_is_guidance_by_their_sum() -> None:
    x, sigma = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    ones = torch.ones(4)
    twice = by_gradient(by_gradient(estimate, log_p, scale=ones), lambda x, s: -(x**2).sum(1), scale=2 * ones)
    both = by_gradient(estimate, lambda x, s: log_p(x, s) - 2 * (x**2).sum(1), scale=ones)
    torch.testing.assert_close(twice(x, sigma).x0, both(x, sigma).x0)
    torch.testing.assert_close(twice(x, sigma).gradient, both(x, sigma).gradient)


@given(share=st.floats(0.01, 1.0), size=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_quantiles_are_those_of_torch(share: float, size: int, seed: int) -> None:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(
        Rank.of(share, *values.shape, values.device).read(values), values.quantile(share, dim=1)
    )


def test_dynamic_threshold_treats_each_sample_by_itself() -> None:
    x = torch.randn(3, 2, 8, 8) * torch.tensor([0.2, 1.0, 5.0]).view(3, 1, 1, 1)
    threshold = dynamic_threshold(lambda x, sigma: Denoised(x), share=0.9)
    together = threshold(x, torch.ones(3)).x0
    alone = torch.cat([threshold(x[i : i + 1], torch.ones(1)).x0 for i in range(3)])
    assert torch.equal(together, alone)
    assert torch.equal(together[0], x[0])  # within the pixels' range: left alone
    assert together.abs().max() <= 1
    assert (together[2].abs() == 1).float().mean().item() == pytest.approx(0.1, abs=0.02)
    static = dynamic_threshold(lambda x, sigma: Denoised(x), share=0.9, ceiling=1.0)
    assert torch.equal(static(x, torch.ones(3)).x0, x.clamp(-1, 1))


def test_each_row_is_kept_within_its_own_limits() -> None:
    cond = Conditioning(text=torch.zeros(1, 1, 1))
    asked = [
        SamplingSpec(),
        SamplingSpec(dynamic_threshold=0.9),
        SamplingSpec(sampler="ddim", clip="none"),
        SamplingSpec(dynamic_threshold=0.5),
        SamplingSpec(dynamic_threshold=0.9, threshold_ceiling=1.5),
    ]
    parts = [rows_of(how, cond, cond, 1) for how in asked]
    assert parts[0].limits is None
    x, sigma = 3 * torch.randn(5, 3, 8, 8), torch.ones(5)
    found = bounded(lambda x, sigma: Denoised(x), stack(parts))(x, sigma).x0
    assert torch.equal(found[0], x[0].clamp(-1, 1))
    assert torch.equal(found[2], x[2])
    torch.testing.assert_close(found[4], x[4].clamp(-1.5, 1.5) / 1.5)  # nine tenths are within about 5
    for place, share in ((1, 0.9), (3, 0.5)):
        alone = dynamic_threshold(lambda x, sigma: Denoised(x), share=share)(
            x[place : place + 1], sigma[:1]
        ).x0
        torch.testing.assert_close(found[place : place + 1], alone)
    for place, part in enumerate(parts):
        alone = bounded(lambda x, sigma: Denoised(x), part)(x[place : place + 1], sigma[:1]).x0
        torch.testing.assert_close(found[place : place + 1], alone)


def test_clip_image_keeps_the_direction_of_the_network() -> None:
    """Song et al. 2021: x0 clipped, eps as the network says; ADM derives eps from the clipped x0."""
    x, sigmas = 5 * torch.randn(2, 3), torch.tensor([2.0, 1.0])
    images = {}
    for clip in ("image", "none", "estimate"):
        how = SamplingSpec(sampler="ddim", clip=clip)
        rows = rows_of(how, Conditioning(text=torch.zeros(2, 1, 1)), Conditioning(), 2)
        denoise = bounded(lambda x, sigma: Denoised(0.9 * x), rows)
        images[clip] = sample(begin(how, x, sigmas, NoNoise()), denoise)
    eps, x0 = 0.05 * x, 0.9 * x
    torch.testing.assert_close(images["none"], x0 + eps)
    torch.testing.assert_close(images["image"], x0.clamp(-1, 1) + eps)
    torch.testing.assert_close(images["estimate"], x0.clamp(-1, 1) + (x - x0.clamp(-1, 1)) / 2)


def constants(x: Tensor, sigma: Tensor, cond: Conditioning) -> Denoised:
    """A model that draws its text."""
    assert cond.text is not None
    return Denoised(cond.text.mean((1, 2))[:, None] * x, cond.text.mean((1, 2))[:, None].expand_as(x))


def rows(count: int, **parts: Tensor) -> Rows:
    cond, null = (Conditioning(text=torch.full((count, 2, 1), value)) for value in (4.0, 1.0))
    return Rows(cond, null, torch.full((count,), 3.0), **parts)


def test_guidance_is_on_within_its_interval_only() -> None:
    interval = torch.tensor([[1.0, 2.0]]).expand(4, 2)
    sigma = torch.tensor([1.0, 1.5, 2.0, 2.5])
    found = classifier_free(constants, rows(4, interval=interval))(torch.ones(4, 3), sigma)
    assert found.x0[:, 0].tolist() == [4.0, 10.0, 10.0, 4.0]
    assert found.variance_fraction.unique().tolist() == [4.0]


def test_rescaled_guidance_has_the_contrast_of_the_model() -> None:
    x = torch.randn(3, 50, dtype=torch.float64)
    share = torch.tensor([0.0, 0.5, 1.0])
    found = classifier_free(constants, rows(3, rescale=share))(x, torch.ones(3).double()).x0
    ratio = found.std(1) / (4 * x).std(1)
    torch.testing.assert_close(ratio, torch.tensor([2.5, 1.75, 1.0]).double())


def test_requests_with_and_without_options_share_a_batch() -> None:
    one = rows(1, rescale=torch.tensor([0.7]), interval=torch.tensor([[0.0, 1.0]]))
    both = stack([rows(2), one])
    assert both.rescale.tolist() == pytest.approx([0, 0, 0.7])
    x, sigma = torch.randn(3, 20), torch.tensor([0.5, 2.0, 0.5])
    together = classifier_free(constants, both)(x, sigma).x0
    torch.testing.assert_close(together[:2], classifier_free(constants, rows(2))(x[:2], sigma[:2]).x0)
    torch.testing.assert_close(together[2:], classifier_free(constants, one)(x[2:], sigma[2:]).x0)
    assert stack([rows(1), rows(2)]).rescale is None


def test_the_rows_of_a_request_say_nothing_that_it_did_not() -> None:
    cond = Conditioning(text=torch.zeros(2, 1, 1))
    plain = rows_of(SamplingSpec(guidance_scale=2.0), cond, cond, 2)
    assert (plain.scale.tolist(), plain.rescale, plain.interval) == ([2.0, 2.0], None, None)
    how = SamplingSpec(guidance_rescale=0.5, guidance_interval=(0.2, 3.0))
    full = rows_of(how, cond, cond, 2)
    assert full.rescale.tolist() == [0.5, 0.5]
    torch.testing.assert_close(full.interval, torch.tensor([[0.2, 3.0], [0.2, 3.0]]))
