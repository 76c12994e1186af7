"""Samplers in the sigma frame end where diffusers' schedulers end: same noise, same network.

Their last image is in DDPM's frame at alpha-bar 1, or, for latent diffusion, at that of timestep 0.
Their tables are float32, whose rounding an untrained network amplifies; where that hides the formulas,
they are given float64 tables.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dd_core.denoiser import Conditioning, Denoised, Denoiser, consistency_time
from dd_core.guidance import Rows, classifier_free, clip_x0, dynamic_threshold
from dd_core.noise import from_vp, karras_sigmas, to_vp
from dd_core.samplers import (
    ChurnSpec,
    Sampling,
    SamplingSpec,
    begin,
    consistency,
    ddim,
    ddpm,
    heun,
    invert,
    sample,
    sigmas_of,
)
from dd_core.schedules import Clock, ScheduleSpec, Spacing, alpha_bars, betas, sigmas, walk
from tests.parity.fake_network import SHAPE, FakeNetwork, Stream, apart, ours, start

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

LINEAR, COSINE = ScheduleSpec(), ScheduleSpec(betas="cosine")
LATENT = ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, last="first")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def theirs(scheduler: Any, num_steps: int, network: FakeNetwork, **step: Any) -> Tensor:
    """The loop of diffusers' manuals, in DDPM's frame."""
    scheduler.set_timesteps(num_steps)
    x = start()
    for t in scheduler.timesteps:
        output = network(x, t.expand(len(x)))
        x = scheduler.step(output, t, x, **step).prev_sample
    return x


def exact(scheduler: Any, chain: ScheduleSpec) -> Any:
    """The same scheduler with float64 tables."""
    scheduler.betas, scheduler.alphas_cumprod = betas(chain), alpha_bars(chain)
    scheduler.alphas, scheduler.one = 1 - scheduler.betas, torch.ones((), dtype=torch.float64)
    return scheduler


def drawn(
    sampler: Callable[..., Sampling],
    chain: ScheduleSpec,
    spacing: Spacing,
    num_steps: int,
    denoise: Callable[[Denoiser], Denoiser] = lambda denoise: denoise,
) -> Tensor:
    """Our way from the same noise, in DDPM's frame."""
    network = FakeNetwork()
    way = walk(chain, spacing, num_steps).sigmas
    told = denoise(ours(network, "eps", Clock(chain)))
    end = sample(sampler(from_vp(start(), way[0].item()), way, Stream()), told)
    return to_vp(end, way[-1].item())


@torch.no_grad()
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("chain", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddpm(variance: str, chain: ScheduleSpec) -> None:
    scheduler = diffusers.DDPMScheduler(
        variance_type=variance,
        timestep_spacing="linspace",
        beta_schedule="linear" if chain is LINEAR else "squaredcos_cap_v2",
    )
    expected = theirs(scheduler, 25, FakeNetwork(), generator=Stream().generator)
    sampler = partial(ddpm, variance=variance)
    assert apart(drawn(sampler, chain, "linspace", 25, clip_x0), expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("chain", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddpm_with_learned_variance(chain: ScheduleSpec) -> None:
    """In float64 but for the network's answers, which both sides round."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace")
    network, way = FakeNetwork(6), walk(chain, "linspace", 25).sigmas
    exact(scheduler, chain).set_timesteps(25)
    x, generator = start().double(), Stream().generator
    for t in scheduler.timesteps:
        output = network.double()(x, t.expand(len(x))).float().double()
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    x_start = from_vp(start().double(), way[0].item())
    denoise = clip_x0(ours(network, "eps", Clock(chain)))
    assert apart(sample(ddpm(x_start, way, Stream()), denoise), x) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_ddpm_of_unclip(variance: str, predicts: str) -> None:
    """In float64 but for the network's answers; with float32 tables their last step is off by 5e-4."""
    network, way = FakeNetwork(6 if variance == "learned" else 3), walk(COSINE, "linspace", 25).sigmas
    scheduler = diffusers.UnCLIPScheduler(
        variance_type="learned_range" if variance == "learned" else "fixed_small_log",
        prediction_type="epsilon" if predicts == "eps" else "sample",
        clip_sample_range=5.0,
    )
    exact(scheduler, COSINE).set_timesteps(25)
    x, generator, ts = start().double(), Stream().generator, scheduler.timesteps
    for t, before in zip(ts, [*ts[1:], None], strict=True):
        output = network.double()(x, t.expand(len(x))).float().double()
        x = scheduler.step(output, t, x, prev_timestep=before, generator=generator).prev_sample
    denoise = clip_x0(ours(network, predicts, Clock(COSINE)), bound=5.0)
    sampling = ddpm(from_vp(start().double(), way[0].item()), way, Stream(), variance=variance)
    assert apart(sample(sampling, denoise), x) < 1e-5 * 5


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_with_eps_from_the_clipped_estimate(eta: float) -> None:
    expected = theirs(
        diffusers.DDIMScheduler(beta_schedule="linear"),
        25,
        FakeNetwork(),
        eta=eta,
        use_clipped_model_output=True,
        generator=Stream().generator,
    )
    found = drawn(partial(ddim, eta=eta), LINEAR, "ddim_leading", 25, clip_x0)
    assert apart(found, expected) < 1e-4


@torch.no_grad()
def test_ddim_with_the_networks_eps_and_a_clipped_estimate() -> None:
    """In float64 but for the network's answers, for eps without clipping wanders far off."""
    network, way = FakeNetwork(), walk(LINEAR, "ddim_leading", 25).sigmas
    scheduler = exact(diffusers.DDIMScheduler(beta_schedule="linear"), LINEAR)
    scheduler.set_timesteps(25)
    x = start().double()
    for t in scheduler.timesteps:
        output = network.double()(x, t.expand(len(x))).float().double()
        x = scheduler.step(output, t, x, eta=0.0).prev_sample
    x_start, denoise = from_vp(start().double(), way[0].item()), ours(network, "eps", Clock(LINEAR))
    kept = ddim(x_start, way, Stream(), clip=lambda x0: x0.clamp(-1, 1))
    assert apart(sample(kept, denoise), x) < 1e-5
    derived = sample(ddim(x_start, way, Stream()), clip_x0(denoise))
    assert (derived - x).abs().max() > 0.05  # the two are not the same sampler


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["ddim_leading", "trailing"])
def test_ddim_without_clipping(spacing: Spacing) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="linear", clip_sample=False, timestep_spacing=spacing.removeprefix("ddim_")
    )
    expected = theirs(scheduler, 20, FakeNetwork(), eta=0.0)
    found = drawn(ddim, LINEAR, spacing, 20)
    assert apart(found, expected) < 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_of_latent_diffusion(eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    expected = theirs(scheduler, 50, FakeNetwork(), eta=eta, generator=Stream().generator)
    found = drawn(partial(ddim, eta=eta), LATENT, "ldm_plus_one", 50)
    assert apart(found, expected) < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_inverted_ddim() -> None:
    """Each of their steps is told the network's answer at the level that the image has."""
    scheduler = diffusers.DDIMInverseScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(50)
    network, image = FakeNetwork(), 0.3 * start()
    x = image
    for t, t_next in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        x = scheduler.step(network(x, t.expand(len(x))), t_next, x).prev_sample
    way = walk(LINEAR, "ddim_leading", 50).sigmas
    found = sample(invert(from_vp(image, way[-2].item()), way), ours(network, "eps", Clock(LINEAR)))
    assert apart(to_vp(found, way[0].item()), x) < 1e-4


@torch.no_grad()
def test_heun_between_and_beyond_timesteps() -> None:
    scheduler = diffusers.HeunDiscreteScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    network, table = FakeNetwork(), sigmas(LATENT)
    x = start() * table[-1].item()
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(scaled, t.expand(len(x))), t, x).prev_sample
    way = karras_sigmas(12, sigma_min=table[0].item(), sigma_max=table[-1].item())
    found = sample(heun(start() * table[-1].item(), way), ours(network, "eps", Clock(LATENT)))
    assert apart(found, x) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("amount", [2.0, 40.0])
def test_heun_with_churn(amount: float) -> None:
    """Against the stochastic sampler of EDM, whose levels are even in log sigma there."""
    from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler  # noqa: PLC0415

    churn = ChurnSpec(amount=amount, low=0.05, high=10.0, noise=1.007)
    scheduler = KarrasVeScheduler(
        sigma_max=20.0, s_churn=churn.amount, s_min=churn.low, s_max=churn.high, s_noise=churn.noise
    )
    scheduler.set_timesteps(9)
    denoise = ours(FakeNetwork(), "edm", consistency_time)
    way = torch.cat([scheduler.schedule.double().sqrt().sort(descending=True).values, torch.zeros(1)])

    def answer(x: Tensor, sigma: float) -> Tensor:  # what their scheduler multiplies by sigma and adds
        return (denoise(x, torch.full((len(x),), sigma)).x0 - x) / sigma

    x, generator = 20 * start(), Stream().generator
    for sigma, sigma_next in zip(way[:-1].tolist(), way[1:].tolist(), strict=True):
        if churn.low <= sigma <= churn.high:
            x_hat, sigma_hat = scheduler.add_noise_to_input(x, sigma, generator=generator)
        else:
            x_hat, sigma_hat = x, sigma  # they would draw noise and multiply it by 0
        out = scheduler.step(answer(x_hat, sigma_hat), sigma_hat, sigma_next, x_hat)
        x = out.prev_sample
        if sigma_next > 0:
            again = answer(x, sigma_next)
            x = scheduler.step_correct(again, sigma_hat, sigma_next, x_hat, x, out.derivative).prev_sample
    found = sample(heun(20 * start(), way, Stream(), churn=churn), denoise)
    assert apart(found, x) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("taus", [(0, 39), (0, 22, 39), (0, 17, 30, 39)])
def test_consistency(taus: tuple[int, ...]) -> None:
    scheduler, network = diffusers.CMStochasticIterativeScheduler(), FakeNetwork()
    scheduler.set_timesteps(timesteps=list(reversed(taus[:-1])))
    x, generator = 80.0 * start(), Stream().generator
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    how = SamplingSpec(sampler="consistency", num_steps=len(taus) - 1, taus=taus)
    way = sigmas_of(how, sigma_min=0.002, sigma_max=80.0)
    denoise = clip_x0(ours(network, "consistency", consistency_time, sigma_min=0.002))
    sampling = begin(how, 80.0 * start(), way, Stream(), sigma_min=0.002)
    found = sample(sampling, denoise)
    assert apart(found, x) < 1e-5
    direct = consistency(80.0 * start(), way, Stream(), sigma_min=0.002)
    assert torch.equal(sample(direct, denoise), found)


@torch.no_grad()
def test_edm_scales() -> None:
    scheduler, network = diffusers.EDMEulerScheduler(), FakeNetwork()
    x, sigma = 3 * start(), 2.7
    told = torch.full((len(x),), sigma)
    output = network(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(told))
    expected = scheduler.precondition_outputs(x, output, sigma)
    found = ours(network, "edm", lambda sigma: sigma.log() / 4)(x, told).x0
    assert apart(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("share", "ceiling"), [(0.995, 1.0), (0.95, 1.5), (0.9, 1e9)])
def test_dynamic_threshold(share: float, ceiling: float) -> None:
    scheduler = diffusers.DDPMScheduler(dynamic_thresholding_ratio=share, sample_max_value=ceiling)
    x = start() * torch.tensor([0.3, 4.0]).view(2, 1, 1, 1)
    guided = dynamic_threshold(lambda x, sigma: Denoised(x), share=share, ceiling=ceiling)
    assert apart(guided(x, torch.ones(2)).x0, scheduler._threshold_sample(x)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("predicts", ["x0", "eps", "v"])
def test_rescaled_guidance(predicts: str) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg  # noqa: PLC0415

    with_cond, without, x = start(3), start(4), 2 * start(5)
    sigma = torch.tensor([0.5, 2.0])
    level = sigma.view(2, 1, 1, 1)
    bar = 1 / (1 + level**2)

    def x0_of(output: Tensor) -> Tensor:  # the definitions of the papers
        match predicts:
            case "eps":
                return x - level * output
            case "v":
                return bar * x - (1 - bar).sqrt() * output
            case _:
                return output

    def model(x: Tensor, sigma: Tensor, cond: Conditioning) -> Denoised:
        return Denoised(torch.cat([x0_of(with_cond), x0_of(without)]))

    rows = Rows(Conditioning(), Conditioning(), torch.full((2,), 7.5), torch.full((2,), 0.7))
    found = classifier_free(model, rows, rescaled_as=predicts)(x, sigma).x0
    guided = without + 7.5 * (with_cond - without)
    assert apart(found, x0_of(rescale_noise_cfg(guided, with_cond, guidance_rescale=0.7))) < 1e-4
    assert found.shape == SHAPE
