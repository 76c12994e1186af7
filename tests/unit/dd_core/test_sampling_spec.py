"""What a request may choose goes together, or is refused with a remedy."""

import pytest
import torch

from dd_core.cascade import HopSpec, followed
from dd_core.noise import karras_sigmas
from dd_core.samplers import ChurnSpec, SamplingSpec, sigmas_of
from dd_core.schedules import ScheduleSpec, sigma_range, walk
from dd_core.steering import GradientSpec


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"eta": 0.5}, "eta is for sampler ddim, not dpmpp_2m; leave it out"),
        ({"variance": "fixed_small"}, "variance is for sampler ddpm"),
        (
            {"sampler": "ddpm", "variance": "fixed_large", "num_steps": 249},
            "below 250 steps; use fixed_small",
        ),
        ({"churn": ChurnSpec()}, "churn is for sampler heun, not dpmpp_2m"),
        (
            {"churn": {"low": 50, "high": 0.05}},
            "low 50 is above high 0.05, so no noise is put back",
        ),
        ({"guidance_interval": (2.0, 1.0)}, "must rise"),
        ({"spacing": "sections"}, "need each other"),
        ({"sections": (10, 10)}, "need each other"),
        ({"spacing": "sections", "sections": (5, 5)}, "take 10 steps; set num_steps: 10"),
        ({"spacing": "fast27"}, "take 27 steps; set num_steps: 27"),
        ({"sampler": "consistency", "spacing": "linspace"}, "choose them by taus"),
        ({"taus": (0, 20)}, "taus are for sampler consistency"),
        ({"sampler": "consistency", "taus": (0, 22, 39)}, "taus take 2 steps; set num_steps: 2"),
        ({"sampler": "consistency", "taus": (1, 39), "num_steps": 1}, "must rise from 0"),
        ({"sampler": "consistency", "taus": (0, 39, 22), "num_steps": 2}, "must rise from 0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        SamplingSpec(**fields)


def test_what_goes_together_is_taken() -> None:
    SamplingSpec(sampler="ddpm", variance="fixed_large", num_steps=250)
    SamplingSpec(sampler="heun", churn=ChurnSpec(), guidance_interval=(0.3, 5.0))
    SamplingSpec(sampler="ddim", spacing="fast27", num_steps=27, eta=1.0)
    SamplingSpec(sampler="ddpm", spacing="sections", sections=(90, 60, 60, 20, 20), num_steps=250)
    SamplingSpec(sampler="consistency", taus=(0, 22, 39), num_steps=2)


def test_the_default_is_the_karras_grid() -> None:
    found = sigmas_of(SamplingSpec(num_steps=7), sigma_min=0.02, sigma_max=80.0)
    assert torch.equal(found, karras_sigmas(7, sigma_min=0.02, sigma_max=80.0))


@pytest.mark.parametrize(
    ("chain", "top"),
    [
        (ScheduleSpec(betas="cosine"), 80.0),
        (ScheduleSpec(betas="cosine", num_timesteps=4000), 80.0),
        (ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012), 14.6146),
    ],
)
def test_karras_levels_of_a_chain_begin_where_a_picture_is_to_be_seen(
    chain: ScheduleSpec, top: float
) -> None:
    low, high = sigma_range(chain)
    levels = sigmas_of(SamplingSpec(), sigma_min=low, sigma_max=high, chain=chain)
    assert float(levels[0]) == pytest.approx(top, rel=1e-4)
    assert int((levels > 10).sum()) < 8  # of 20; from the highest of cosine betas it would be 15


def test_timesteps_need_a_chain() -> None:
    how, chain = SamplingSpec(spacing="linspace", num_steps=9), ScheduleSpec()
    with pytest.raises(ValueError, match="trained on all noise levels; use karras"):
        sigmas_of(how, sigma_min=0.02, sigma_max=80.0)
    found = sigmas_of(how, sigma_min=0.02, sigma_max=80.0, chain=chain)
    assert torch.equal(found, walk(chain, "linspace", 9).sigmas)


def test_taus_are_places_on_a_grid_that_ends_with_the_last() -> None:
    how = SamplingSpec(sampler="consistency", num_steps=2, taus=(0, 22, 39))
    grid = karras_sigmas(40, sigma_min=0.002, sigma_max=80.0)
    found = sigmas_of(how, sigma_min=0.002, sigma_max=80.0)
    assert found.tolist() == [grid[0], grid[22], 0.0]


@pytest.mark.parametrize(
    ("how", "asked", "remedy"),
    [
        (SamplingSpec(sampler="ddim", spacing="fast27", num_steps=27), {"steps": 20}, "set num_steps: 27"),
        (SamplingSpec(sampler="consistency", num_steps=2, taus=(0, 22, 39)), {"steps": 4}, "num_steps: 2"),
        (
            SamplingSpec(sampler="ddpm", variance="fixed_large", num_steps=250),
            {"steps": 50},
            "use fixed_small",
        ),
    ],
)
def test_steps_that_a_sampling_cannot_take_are_refused_when_asked_for_and_a_scale_is_not(
    how: SamplingSpec, asked: dict[str, int], remedy: str
) -> None:
    hop = HopSpec(stage="base", how=how, follows_request=True)
    assert followed(hop, scale=5.0).guidance_scale == 5
    with pytest.raises(ValueError, match=f"hop base: .*{remedy}") as error:
        followed(hop, **asked)
    assert "\n" not in str(error.value)


def test_where_a_gradient_alone_guides_the_scale_of_a_request_is_its_weight() -> None:
    how = SamplingSpec(guidance_scale=1, gradient=GradientSpec(caption=3, style=7))
    guides = {"noised_clip": "noised_clip", "clip": "clip"}
    hop = HopSpec(stage="base", how=how, guides=guides, follows_request=True)
    assert followed(hop, scale=5.0) == how.but(gradient=GradientSpec(caption=5, style=7))
    both = hop.but(how=how.but(guidance_scale=2))
    assert followed(both, scale=5.0) == how.but(guidance_scale=5)
    assert followed(hop.but(follows_request=False), scale=5.0) == how
