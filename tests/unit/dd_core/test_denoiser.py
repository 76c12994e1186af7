"""What a network's output means, and what the network is told."""

import pytest
import torch
from torch import Tensor

from dd_core.denoiser import (
    SIGMA_DATA,
    Conditioning,
    NetworkDenoiser,
    Parameterization,
    consistency_time,
    input_scale,
    output_from,
    x0_from,
)
from dd_core.schedules import Clock, ScheduleSpec, sigmas

ALL: list[Parameterization] = ["eps", "x0", "v", "edm", "consistency"]
SIGMA = torch.tensor([0.01, 0.7, 30.0], dtype=torch.float64)[:, None]


class Echo(torch.nn.Module):
    """Answers with what it was given."""

    def forward(self, x: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
        self.x, self.told = x, told
        return torch.cat([torch.ones_like(x), torch.zeros_like(x)], 1)


@pytest.mark.parametrize("predicts", ALL)
def test_the_target_of_training_is_the_inverse_of_the_answer(predicts: Parameterization) -> None:
    x, output = torch.randn(2, 3, 4, dtype=torch.float64)
    x0 = x0_from(predicts, output, x, SIGMA, sigma_min=0.002)
    torch.testing.assert_close(output_from(predicts, x0, x, SIGMA, sigma_min=0.002), output)


def test_the_targets_are_the_noise_the_image_and_the_velocity() -> None:
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64)
    x, alpha = x0 + SIGMA * eps, torch.rsqrt(1 + SIGMA**2)
    torch.testing.assert_close(output_from("eps", x0, x, SIGMA), eps)
    torch.testing.assert_close(output_from("x0", x0, x, SIGMA), x0)
    torch.testing.assert_close(output_from("v", x0, x, SIGMA), alpha * eps - SIGMA * alpha * x0)


def test_a_consistency_model_is_the_identity_at_sigma_min_whatever_its_network_says() -> None:
    x, output = torch.randn(2, 3, 4)
    floor = torch.full((3, 1), 0.002)
    torch.testing.assert_close(x0_from("consistency", output, x, floor, sigma_min=0.002), x)


@pytest.mark.parametrize("predicts", ["edm", "consistency"])
def test_edm_scales_keep_input_and_target_at_unit_variance(predicts: Parameterization) -> None:
    """For images of deviation SIGMA_DATA; the consistency scales do so away from sigma_min."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 100_000, generator=generator, dtype=torch.float64)
    x0 = SIGMA_DATA * x0
    x = x0 + SIGMA * eps
    assert (input_scale(predicts, SIGMA) * x).std(1).sub(1).abs().max() < 0.01
    assert output_from(predicts, x0, x, SIGMA).std(1).sub(1).abs().max() < 0.01


def test_a_network_is_told_the_level_as_it_was_trained() -> None:
    chain, x = ScheduleSpec(num_timesteps=4000), torch.randn(2, 3, 4, 4)
    level = sigmas(chain)[[40, 3999]].float()
    for tell, told in (
        (torch.log, level.log()),
        (Clock(chain), torch.tensor([40.0, 3999.0])),
        (Clock(chain, rescaled=True), torch.tensor([10.0, 999.75])),
        (consistency_time, 250 * level.log()),
    ):
        model = NetworkDenoiser(Echo(), "eps", tell=tell, learns_variance=True)
        model(x, level, Conditioning())
        torch.testing.assert_close(model.network.told, told)


def test_the_clock_is_no_weight() -> None:
    assert not NetworkDenoiser(Echo(), "eps", tell=Clock(ScheduleSpec())).state_dict()


def test_half_of_the_channels_may_be_the_variance() -> None:
    """-1 is beta-tilde and 1 is beta."""
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    out = NetworkDenoiser(Echo(), "eps", learns_variance=True)(x, sigma, Conditioning())
    torch.testing.assert_close(out.x0, x - sigma.view(2, 1, 1, 1))
    assert out.variance_fraction.unique().tolist() == [0.5]
    assert out.rows(1, 2).variance_fraction.shape == (1, 3, 4, 4)
