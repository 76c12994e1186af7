"""The bound in bits, against closed forms in DDPM's frame and against what a perfect model must cost."""

import math

import pytest
import torch
from torch import Tensor, nn

from dd_core import likelihood, losses
from dd_core.denoiser import Conditioning, Denoised
from dd_core.guidance import clip_x0
from dd_core.nets.quantiser import straight_through
from dd_core.noise import SeededNoise, karras_sigmas, spread
from dd_core.schedules import ScheduleSpec, alpha_bars, betas, sigmas

NOTHING = Conditioning()


class Linear(nn.Module):
    """A fixed linear network that predicts eps and a variance, in the frame and terms of the papers."""

    def __init__(self) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(0)
        self.eps = nn.Parameter(0.3 * torch.randn(12, 12, generator=stream, dtype=torch.float64))
        self.variance = nn.Parameter(0.3 * torch.randn(12, 12, generator=stream, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning = NOTHING) -> Denoised:
        level = spread(sigma, x)
        x_vp = x / (1 + level**2).sqrt()
        return Denoised(x - level * (x_vp @ self.eps), (x_vp @ self.variance + 1) / 2)


def by_hand(chain: ScheduleSpec, network: Linear, x0: Tensor, t: int, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and bound of the papers, with their posteriors, in float64."""
    beta, bar = betas(chain)[t], alpha_bars(chain)
    before = bar[t - 1] if t else torch.tensor(1.0).double()
    tilde = beta * (1 - before) / (1 - bar[t])
    floor = tilde if t else betas(chain)[1] * (1 - bar[0]) / (1 - bar[1])
    x = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * eps
    eps_hat, v = x @ network.eps, x @ network.variance
    x0_hat = (x - (1 - bar[t]).sqrt() * eps_hat) / bar[t].sqrt()
    log_var = (v + 1) / 2 * beta.log() + (1 - v) / 2 * floor.log()
    if t:
        mean, mean_hat = (
            before.sqrt() * beta / (1 - bar[t]) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar[t]) * x
            for x0 in (x0, x0_hat)
        )
        nats = 0.5 * (log_var - tilde.log() - 1 + (tilde + (mean - mean_hat) ** 2) / log_var.exp())
    else:
        normal = torch.distributions.Normal(x0_hat, (log_var / 2).exp())
        upper = torch.where(x0 > 0.999, 1.0, normal.cdf(x0 + 1 / 255))
        lower = torch.where(x0 < -0.999, 0.0, normal.cdf(x0 - 1 / 255))
        nats = -(upper - lower).clamp(min=1e-12).log()
    return (eps_hat - eps).square().mean(1), nats.mean(1) / math.log(2)


def pixels(count: int) -> Tensor:
    stream = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 12), generator=stream).double() / 127.5 - 1


@pytest.mark.parametrize("num_timesteps", [1000, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("t", [0, 1, 17, 500, 999])
def test_the_hybrid_loss_is_that_of_the_papers(num_timesteps: int, name: str, t: int) -> None:
    chain = ScheduleSpec(betas=name, num_timesteps=num_timesteps)
    network, x0, at = Linear(), pixels(5), torch.full((5,), t)
    torch.manual_seed(3)
    mse, bits = likelihood.hybrid(network, x0, at, sigmas(chain), NOTHING)
    torch.manual_seed(3)
    expected = by_hand(chain, network, x0, t, torch.randn_like(x0))
    torch.testing.assert_close(mse, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(bits, expected[1], rtol=1e-5, atol=1e-9)
    torch.manual_seed(3)
    _, rescaled = likelihood.hybrid(network, x0, at, sigmas(chain), NOTHING, rescaled=True)
    torch.testing.assert_close(rescaled / bits, torch.full((5,), num_timesteps / 1000).double())
    torch.manual_seed(3)
    whole = likelihood.vlb(network, x0, at, sigmas(chain), NOTHING)
    torch.testing.assert_close(whole, num_timesteps * bits)


def test_in_the_hybrid_loss_the_bound_trains_the_variance_alone() -> None:
    network, x0, t = Linear(), pixels(3), torch.tensor([0, 3, 40])
    table = sigmas(ScheduleSpec())
    _, bits = likelihood.hybrid(network, x0, t, table, NOTHING)
    by_bound = torch.autograd.grad(bits.sum(), (network.eps, network.variance), allow_unused=True)
    assert by_bound[0] is None
    assert by_bound[1].abs().max() > 0
    whole = likelihood.vlb(network, x0, t, table, NOTHING)
    by_vlb = torch.autograd.grad(whole.sum(), (network.eps, network.variance))
    assert min(part.abs().max() for part in by_vlb) > 0


def test_the_probabilities_of_the_256_pixels_add_up_to_one() -> None:
    levels = (torch.arange(256).double() / 127.5 - 1).expand(3, 256)
    means, stds = torch.tensor([-1.1, 0.2, 0.99]).double(), torch.tensor([0.02, 0.5, 0.1]).double()
    log_p = likelihood.log_pixel(levels, means[:, None].expand(3, 256), stds.log()[:, None])
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3).double(), atol=1e-9, rtol=0)


def test_single_precision_is_exact_far_from_the_mean() -> None:
    x0, mean = torch.full((1, 1), 0.5), torch.full((1, 1), -0.003)
    std = torch.full((1, 1), 0.08)
    exact = likelihood.log_pixel(x0.double(), mean.double(), std.double().log())
    torch.testing.assert_close(likelihood.log_pixel(x0, mean, std.log()).double(), exact, rtol=1e-5, atol=0)


def test_a_perfect_model_of_coin_tosses_pays_for_each_toss_about_a_bit() -> None:
    """Pixels that are black or white: on many fine steps the bound is 1 bit and a little."""
    stream = torch.Generator().manual_seed(0)
    x0 = torch.randint(2, (64, 16), generator=stream).float() * 2 - 1

    def posterior(x: Tensor, sigma: Tensor) -> Denoised:
        return Denoised(torch.tanh(x / spread(sigma, x) ** 2))

    table = karras_sigmas(400, sigma_min=1e-3, sigma_max=80.0)[:-1].flip(0)
    bits = likelihood.bits_per_dim(
        clip_x0(posterior), x0, table, SeededNoise(range(64)), variance="fixed_small"
    )
    assert 0.99 < bits.total.mean().item() < 1.1
    torch.testing.assert_close(bits.total, bits.prior + bits.steps.sum(1))
    assert bits.steps.shape == (64, 400)
    assert bits.prior.max() < 1e-3


def test_timesteps_are_uniform_until_all_were_seen_ten_times() -> None:
    sampler = likelihood.TimestepSampler(4)
    assert sampler.probabilities().tolist() == [0.25] * 4
    for _ in range(9):
        sampler.observe(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    sampler.observe(torch.tensor([0, 1, 2, 2, 2]), torch.tensor([1.0, 2.0, 3.0, 3.0, 3.0]))
    assert sampler.probabilities().tolist() == [0.25] * 4
    sampler.observe(torch.tensor([3]), torch.tensor([4.0]))
    mixed = 0.999 * torch.tensor([0.1, 0.2, 0.3, 0.4]) + 0.001 / 4
    torch.testing.assert_close(sampler.probabilities().float(), mixed)
    for _ in range(10):
        sampler.observe(torch.tensor([0]), torch.tensor([4.0]))  # the old losses are forgotten
    assert sampler.probabilities()[0] == sampler.probabilities()[3]


@pytest.mark.parametrize("count", [0, 1, 5, 64])
def test_losses_of_a_batch_are_remembered_as_one_after_the_other(count: int) -> None:
    torch.manual_seed(count)
    batch, alone = (likelihood.TimestepSampler(6, history=3) for _ in range(2))
    for _ in range(4):
        t, loss = torch.randint(6, (count,)), torch.rand(count)
        loss[1::7] = math.nan
        batch.observe(t, loss)
        for one in range(count):
            alone.observe(t[one : one + 1], loss[one : one + 1])
    assert torch.equal(batch.losses, alone.losses)
    assert torch.equal(batch.seen, alone.seen)
    for history in alone.losses[alone.seen >= 3]:
        assert history.unique().numel() == 3


def test_one_after_the_other_is_in_the_order_of_the_batch() -> None:
    sampler = likelihood.TimestepSampler(2, history=3)
    sampler.observe(torch.tensor([1, 0, 1, 1, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert sampler.losses.tolist() == [[0, 0, 2], [3, 4, 5]]
    sampler.observe(torch.tensor([0, 1]), torch.tensor([6.0, 7.0]))
    assert sampler.losses.tolist() == [[0, 2, 6], [4, 5, 7]]


def test_losses_are_remembered_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("__index__", "item", "tolist"):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, ask=ask: asked.append(self) or ask(self))
    sampler = likelihood.TimestepSampler(16)
    sampler.observe(torch.arange(16), torch.rand(16))
    assert not asked
    assert sampler.seen.eq(1).all()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_remembered(broken: float) -> None:
    sampler, other = (likelihood.TimestepSampler(2, history=2) for _ in range(2))
    sampler.observe(torch.tensor([0, 1, 0, 0, 1]), torch.tensor([1.0, 3.0, broken, 1.0, 3.0]))
    other.observe(torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 3.0, 1.0, 3.0]))
    assert torch.equal(sampler.probabilities(), other.probabilities())
    assert sampler.seen.tolist() == [2, 2]
    sampler.draw(8)


def test_weights_keep_the_mean_of_the_loss() -> None:
    torch.manual_seed(0)
    loss = torch.tensor([0.1, 1.0, 5.0, 10.0])
    sampler = likelihood.TimestepSampler(4, history=2)
    for _ in range(2):
        sampler.observe(torch.arange(4), loss)
    t, weights = sampler.draw(50_000)
    assert (weights * loss[t]).mean().item() == pytest.approx(loss.mean().item(), rel=0.01)
    assert (weights * loss[t]).std() < loss[torch.randint(4, (50_000,))].std() / 10


def test_the_history_is_resumed() -> None:
    sampler, resumed = likelihood.TimestepSampler(3), likelihood.TimestepSampler(3)
    for _ in range(10):
        sampler.observe(torch.arange(3), torch.rand(3))
    resumed.load_state_dict(sampler.state_dict())
    assert torch.equal(sampler.probabilities(), resumed.probabilities())


def test_the_legacy_commitment_has_beta_on_the_other_term() -> None:
    """Gradients of encoder and codebook are 1 : 4 when fixed and 4 : 1 when legacy."""
    z = torch.randn(3, 4, 2, 2, requires_grad=True)
    codebook = torch.randn(9, 4, requires_grad=True)
    quantized = codebook[torch.tensor([3, 0, 8]).view(3, 1, 1).expand(3, 2, 2)].movedim(-1, 1)
    pulls = {}
    for form in ("fixed", "legacy"):
        value = losses.vq_commitment(z, quantized, form=form).sum()
        pulls[form] = torch.autograd.grad(value, (z, codebook), retain_graph=True)
    torch.testing.assert_close(pulls["legacy"][0], 4 * pulls["fixed"][0])
    torch.testing.assert_close(pulls["fixed"][1], 4 * pulls["legacy"][1])


def test_a_quantized_value_passes_its_gradient_straight_through() -> None:
    z, weight = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    quantized = z.detach().round().requires_grad_()
    through = straight_through(z, quantized)
    assert torch.equal(through.detach().round(), quantized.detach())
    given = torch.autograd.grad((weight * through).sum(), (z, quantized), allow_unused=True)
    assert torch.equal(given[0], weight)
    assert given[1] is None
