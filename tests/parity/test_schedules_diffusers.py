"""Betas, alpha-bars and timesteps are those of diffusers' schedulers."""

import pytest
import torch

from dd_core.schedules import ScheduleSpec, Spacing, alpha_bars, betas, sigmas, timesteps, walk

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

CHAINS = {
    "linear": (ScheduleSpec(), {"beta_schedule": "linear"}),
    "linear 4000": (
        ScheduleSpec(num_timesteps=4000),
        {
            "beta_schedule": "linear",
            "num_train_timesteps": 4000,
            "beta_start": 2.5e-5,
            "beta_end": 0.005,
        },
    ),
    "cosine": (ScheduleSpec(betas="cosine"), {"beta_schedule": "squaredcos_cap_v2"}),
    "cosine 4000": (
        ScheduleSpec(betas="cosine", num_timesteps=4000),
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000},
    ),
    "stable diffusion": (
        ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_betas_and_alpha_bars(name: str) -> None:
    spec, theirs = CHAINS[name]
    scheduler = diffusers.DDPMScheduler(**theirs)
    for mine, other in ((betas(spec), scheduler.betas), (alpha_bars(spec), scheduler.alphas_cumprod)):
        print(f"{name}: largest difference {(mine - other.double()).abs().max():.2e}")  # noqa: T201
        torch.testing.assert_close(mine, other.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "theirs", "counts"),
    [
        ("linspace", {"timestep_spacing": "linspace"}, (2, 10, 21, 25, 27, 50, 100, 250, 999, 1000)),
        ("ddim_leading", {"timestep_spacing": "leading"}, (2, 10, 25, 50, 100, 250, 500, 1000)),
        ("ldm_plus_one", {"timestep_spacing": "leading", "steps_offset": 1}, (2, 10, 25, 50, 100, 250, 500)),
        ("trailing", {"timestep_spacing": "trailing"}, (1, 2, 7, 10, 25, 30, 50, 100, 250, 999, 1000)),
    ],
)
def test_timesteps(spacing: Spacing, theirs: dict[str, object], counts: tuple[int, ...]) -> None:
    scheduler = diffusers.DDIMScheduler(**theirs)
    for count in counts:
        scheduler.set_timesteps(count)
        assert timesteps(spacing, 1000, count).flip(0).tolist() == scheduler.timesteps.tolist()


def test_linspace_is_that_of_unclip() -> None:
    scheduler = diffusers.UnCLIPScheduler()
    for count in (2, 7, 25, 27, 50, 64, 250):
        scheduler.set_timesteps(count)
        assert timesteps("linspace", 1000, count).flip(0).tolist() == scheduler.timesteps.tolist()


def test_the_walk_of_stable_diffusion_is_that_of_eulers_scheduler() -> None:
    spec, theirs = CHAINS["stable diffusion"]
    scheduler = diffusers.EulerDiscreteScheduler(**theirs, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(50)
    way = walk(spec, "ldm_plus_one", 50)
    torch.testing.assert_close(way.sigmas.float(), scheduler.sigmas, rtol=1e-5, atol=0)
    assert scheduler.timesteps.tolist() == way.timesteps.tolist()
    torch.testing.assert_close(sigmas(spec)[way.timesteps], way.sigmas[:-1], rtol=0, atol=0)
