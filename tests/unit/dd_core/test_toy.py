"""The S of points: its closed forms, how near the network comes to them in seconds, and the film."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dd_core import toy
from dd_core.noise import spread
from dd_core.schedules import sigmas
from jobs.cli import main


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(level=st.floats(0.05, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_exact_denoiser_climbs_the_exact_density(level: float, seed: int) -> None:
    """Tweedie: E[x0 | x] = x + sigma**2 grad log p(x)."""
    points, sigma = toy.fine(300), torch.full((5,), level, dtype=torch.float64)
    x = ((1 + level) * drawn(5, seed)).requires_grad_()
    (score,) = torch.autograd.grad(toy.log_density(points, x, sigma).sum(), x)
    expected = x + spread(sigma.square(), x) * score
    torch.testing.assert_close(toy.exact(points)(x, sigma).x0, expected, atol=1e-8, rtol=1e-8)


def test_the_density_of_one_point_is_a_gaussian_and_of_the_s_integrates_to_one() -> None:
    x, sigma = drawn(4), torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros(2).double(), sigma[:, None])
    one = toy.log_density(torch.zeros(1, 2).double(), x, sigma)
    torch.testing.assert_close(one, normal.log_prob(x).sum(1))
    axis = torch.linspace(-4, 4, 201, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    density = toy.log_density(toy.fine(200), plane, torch.full((len(plane),), 0.3).double()).exp()
    assert density.sum().item() * 0.04**2 == pytest.approx(1.0, abs=1e-6)


def test_the_s_is_as_dense_as_its_smallest_noise_needs() -> None:
    few, many = toy.fine(1000), toy.fine(4000)
    x, sigma = toy.s_curve(torch.linspace(0, 1, 50).double()), sigmas(toy.SCHEDULE)[:1].expand(50)
    torch.testing.assert_close(
        toy.log_density(few, x, sigma), toy.log_density(many, x, sigma), atol=1e-3, rtol=0
    )


def test_ancestral_steps_of_the_exact_denoiser_end_on_the_s_and_everywhere_on_it() -> None:
    made = toy.reverse_frames(toy.exact(toy.fine()), 400)[-1]
    assert toy.distance_to_curve(made).quantile(0.95) < 0.02
    nearest = torch.cdist(made.double(), toy.fine(100)).argmin(1)
    shares = torch.histc(nearest.double(), bins=5, min=0, max=100) / 400
    assert shares.min() > 0.12  # of 0.2 each


def test_what_drowns_ends_as_normal_noise_and_begins_clean() -> None:
    frames = toy.forward_frames(2000)
    assert len(frames) == toy.SCHEDULE.num_timesteps + 1
    assert toy.distance_to_curve(frames[0]).max() < 1e-2
    torch.testing.assert_close(frames[-1].std(0), torch.ones(2), atol=0.05, rtol=0)
    torch.testing.assert_close(frames[-1].mean(0), torch.zeros(2), atol=0.08, rtol=0)


@pytest.mark.slow
def test_the_network_comes_near_the_best_possible_denoiser_and_a_seed_repeats_it() -> None:
    *_, last = toy.train_points(steps=600)
    assert toy.excess(last.denoise) < 0.02
    assert toy.excess(toy.exact(toy.fine(1))) > 0.5  # who believes that all points are one
    losses = [[step.loss for step in toy.train_points(steps=5, seed=3)] for _ in range(2)]
    assert losses[0] == losses[1]
    assert all(math.isfinite(loss) for loss in losses[0])


@pytest.mark.slow
def test_the_command_films_both_ways_and_says_how_good_the_points_are(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    done = CliRunner().invoke(main, ["toy", "--out", str(out), "--steps", "40", "--points", "60", "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts.keys() == {"gif", "seconds", "loss", "excess", "distance"}
    with Image.open(facts["gif"]) as film:
        assert (film.n_frames, film.size) == (51, (640, 320))
        first = film.convert("RGB").tobytes()
        film.seek(50)
        assert first != film.convert("RGB").tobytes()
    assert [path.name for path in out.iterdir()] == ["toy.gif"]
