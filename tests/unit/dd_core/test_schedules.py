"""Discrete chains: their printed figures, their spacings, and what a network is told."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dd_core.noise import forward_std, from_vp, posterior_std, to_vp
from dd_core.schedules import (
    Clock,
    ScheduleSpec,
    Spacing,
    alpha_bars,
    betas,
    sigma_range,
    sigmas,
    timesteps,
    walk,
)

SD = ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, last="first")
CHAINS = [
    ScheduleSpec(),
    ScheduleSpec(num_timesteps=4000),
    ScheduleSpec(betas="cosine"),
    ScheduleSpec(betas="cosine", num_timesteps=4000),
    SD,
]


@pytest.mark.parametrize(
    ("spec", "last"), [(ScheduleSpec(), 4.04e-5), (ScheduleSpec(betas="cosine"), 2.4e-9), (SD, 4.66e-3)]
)
def test_little_of_the_image_is_left_at_the_last_timestep(spec: ScheduleSpec, last: float) -> None:
    bar = alpha_bars(spec)
    assert bar[-1].item() == pytest.approx(last, rel=0.02)
    assert bar.dtype == torch.float64
    assert (bar.diff() < 0).all()
    assert (sigmas(spec).diff() > 0).all()


@pytest.mark.parametrize("spec", CHAINS)
def test_the_range_of_a_chain_is_known_even_where_tensors_are_only_imagined(spec: ScheduleSpec) -> None:
    ends = sigmas(spec)[[0, -1]].tolist()
    with FakeTensorMode():
        assert sigma_range(spec) == pytest.approx(ends, rel=1e-12)


def test_cosine_betas_follow_their_definition() -> None:
    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - bar((i + 1) / 50) / bar(i / 50), 0.999) for i in range(50)]
    found = betas(ScheduleSpec(betas="cosine", num_timesteps=50))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def test_linear_betas_are_spread_over_any_number_of_timesteps() -> None:
    found = betas(ScheduleSpec(num_timesteps=4000))
    assert found[0].item() == pytest.approx(1e-4 / 4)
    assert found[-1].item() == pytest.approx(0.02 / 4)
    with pytest.raises(ValueError, match="take more timesteps, or cosine"):
        ScheduleSpec(num_timesteps=20)


@pytest.mark.parametrize("spec", CHAINS)
@given(chosen=st.sets(st.integers(0, 999), min_size=2, max_size=40))
@settings(max_examples=20, deadline=None)
def test_respaced_betas_keep_the_alpha_bars_of_their_timesteps(spec: ScheduleSpec, chosen: set[int]) -> None:
    bar, table = alpha_bars(spec), sigmas(spec).tolist()
    kept = sorted(chosen)
    product = bar[kept[0]].item()
    for low, high in pairwise(kept):
        level, below = table[high], table[low]
        beta = forward_std(level, below) ** 2 / (1 + below**2)  # in DDPM's frame
        tilde = posterior_std(level, below) ** 2 / (1 + below**2)
        assert tilde == pytest.approx(beta * (1 - bar[low].item()) / (1 - bar[high].item()), rel=1e-6)
        product *= 1 - beta
        assert product == pytest.approx(bar[high].item(), rel=1e-6)


def test_the_two_frames_hold_the_same_image() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(to_vp(from_vp(x, 14.6), 14.6), x)
    spread = to_vp(0.5 * torch.ones(1) + 0, 3.0) ** 2 / 0.25 + to_vp(3 * torch.ones(1), 3.0) ** 2
    torch.testing.assert_close(spread, torch.ones(1))  # the shares of image and noise add up to 1


def test_spacings_are_the_published_ones() -> None:
    assert timesteps("ddim_leading", 1000, 25).tolist() == list(range(0, 1000, 40))
    assert timesteps("ldm_plus_one", 1000, 50).tolist() == list(range(1, 1000, 20))
    assert timesteps("linspace", 1000, 4).tolist() == [0, 333, 666, 999]
    assert timesteps("trailing", 1000, 4).tolist() == [249, 499, 749, 999]
    assert timesteps("quad", 1000, 10).tolist() == [int(t**2) for t in torch.linspace(0, 800**0.5, 10)]
    sections = timesteps("sections", 1000, 250, sections=(90, 60, 60, 20, 20)).tolist()
    assert [sum(t // 200 == part for t in sections) for part in range(5)] == [90, 60, 60, 20, 20]
    assert {199, 200, 399, 400, 999} <= set(sections)
    fast = timesteps("fast27", 1000, 27).tolist()
    assert (len(fast), fast[0], fast[-2:]) == (27, 0, [800, 997])


@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_quad_is_the_formula_of_the_published_code_for_every_number_of_steps(num_timesteps: int) -> None:
    """t_i = floor((i sqrt(0.8 T) / (n - 1))**2), rounded down in float64 where the true value is whole."""
    for count in range(2, num_timesteps + 1):
        roots = np.linspace(0.0, np.sqrt(num_timesteps * 0.8), count)
        written = np.floor(np.square(roots)).astype(int)
        assert timesteps("quad", num_timesteps, count).tolist() == np.unique(written).tolist(), count


def test_quad_leaves_out_steps_that_would_change_nothing() -> None:
    assert len(timesteps("quad", 1000, 100)) < 100
    assert (timesteps("quad", 1000, 100).diff() > 0).all()


@pytest.mark.parametrize(
    ("spacing", "num_steps", "sections", "remedy"),
    [
        ("ddim_leading", 60, (), "no whole stride takes 60 .* use linspace"),
        ("ldm_plus_one", 30, (), "divides it, got 30"),
        ("ldm_plus_one", 1000, (), "below 1000"),
        ("linspace", 1, (), "use trailing"),
        ("trailing", 1001, (), "from 1 to the 1000"),
        ("sections", 50, (20, 20), "sum num_steps, 50"),
        ("sections", 980, (490, 290, 200), "section 0 takes 490 steps of its 334"),
    ],
)
def test_an_impossible_spacing_says_what_to_do(
    spacing: Spacing, num_steps: int, sections: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        timesteps(spacing, 1000, num_steps, sections=sections)


@given(num_steps=st.integers(2, 1000), spacing=st.sampled_from(["linspace", "trailing", "quad"]))
@settings(max_examples=60, deadline=None)
def test_a_walk_falls_and_ends_where_the_chain_says(num_steps: int, spacing: Spacing) -> None:
    for spec in (ScheduleSpec(), ScheduleSpec(last="first")):
        way = walk(spec, spacing, num_steps)
        assert (way.timesteps.diff() < 0).all()
        assert (way.sigmas.diff() < 0)[:-1].all()
        assert way.sigmas[-1] == (0 if spec.last == "clean" else sigmas(spec)[0])
        assert len(way.sigmas) == len(way.timesteps) + 1 <= num_steps + 1


@pytest.mark.parametrize("spec", CHAINS)
@pytest.mark.parametrize("rescaled", [False, True])
def test_a_network_is_told_its_own_timesteps_exactly(spec: ScheduleSpec, rescaled: bool) -> None:
    told = Clock(spec, rescaled=rescaled)(sigmas(spec).float())
    expected = torch.arange(spec.num_timesteps, dtype=torch.float32)
    assert torch.equal(told, expected * (1000 / spec.num_timesteps if rescaled else 1))


def test_between_timesteps_it_is_told_the_share_in_log_sigma() -> None:
    table = sigmas(SD)
    sigma = torch.stack([(table[7] ** 0.75 * table[8] ** 0.25), table[0] / 2, 2 * table[-1]]).float()
    torch.testing.assert_close(Clock(SD)(sigma), torch.tensor([7.25, 0, 999]), atol=1e-3, rtol=0)
