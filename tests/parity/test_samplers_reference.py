"""Timesteps, samplers, edits, losses and paces against the published code: same noise, same network.

In float64 but for the network's answers, which both sides round; their tables are float64, and code that
would round them as it reads them is told not to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dd_core import edits, likelihood
from dd_core.consistency import pace
from dd_core.denoiser import Conditioning, Denoised, Denoiser, consistency_time
from dd_core.guidance import clip_x0
from dd_core.noise import from_vp, karras_sigmas
from dd_core.samplers import (
    ChurnSpec,
    Sampling,
    SamplingSpec,
    begin,
    ddim,
    ddpm,
    heun,
    sample,
    sigmas_of,
)
from dd_core.schedules import Clock, ScheduleSpec, Spacing, Walk, sigmas, timesteps, walk
from tests.parity.fake_network import SHAPE, FakeNetwork, Stream, apart, ours, start
from tests.parity.reference import SHIMS, checkout, importing

pytestmark = pytest.mark.parity

LINEAR, COSINE = ScheduleSpec(), ScheduleSpec(betas="cosine")
SEED = 1
EDM = {"sigma_min": 0.002, "sigma_max": 80.0}


@contextmanager
def guided_diffusion() -> Iterator[Callable[[str], Any]]:
    """An importer of it, whose tables stay float64."""
    path = checkout("openai/guided-diffusion", "guided_diffusion/gaussian_diffusion.py")
    with importing(path, shims=SHIMS) as load, pytest.MonkeyPatch.context() as patch:
        patch.setattr(load("guided_diffusion.gaussian_diffusion"), "_extract_into_tensor", entries)
        yield load


def entries(table: Any, t: Tensor, shape: Any) -> Tensor:
    """Of a table, at each sample's timestep."""
    return torch.as_tensor(table)[t].view(-1, *[1] * (len(shape) - 1)).expand(shape)


def rounded(network: FakeNetwork) -> Callable[..., Tensor]:
    """A network that takes float64 and rounds its answers, as ours do."""
    network = network.double()
    return lambda x, t, **told: network(x, t).float().double()


class Drawn:
    """The generator that samplers of consistency models are given: our first noise, then our stream."""

    def __init__(self) -> None:
        self.stream = Stream(SEED)

    def randn_like(self, like: Tensor) -> Tensor:
        return self.stream(like)

    def randn(self, *shape: int, device: Any = None) -> Tensor:
        return start().view(shape)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What published code draws with torch.randn_like comes from the stream that ours draws from."""
    monkeypatch.setattr(torch, "randn_like", Stream(SEED))


def from_noise(sampler: Callable[..., Sampling], way: Tensor, denoise: Denoiser) -> Tensor:
    """Our picture of the same first noise."""
    return sample(sampler(from_vp(start().double(), way[0].item()), way, Stream(SEED)), denoise)


@pytest.mark.parametrize("num_timesteps", [1000, 4000])
def test_one_section_is_one_stride_but_for_the_rounding_of_their_sum(num_timesteps: int) -> None:
    """Theirs adds up a stride, whose rounding takes the other neighbour of a half for some counts."""
    published = (2, 10, 25, 27, 50, 64, 100, 128, 200, 250, 256, 400, 500, 1000)
    with guided_diffusion() as load:
        theirs = load("guided_diffusion.respace").space_timesteps
        for count in (*published, *range(2, 300)):
            found = timesteps("linspace", num_timesteps, count).tolist()
            wanted = sorted(theirs(num_timesteps, str(count)))
            if count in published:
                assert found == wanted, count
            assert np.abs(np.subtract(found, wanted)).max() <= 1, count


def test_strides_and_sections() -> None:
    with guided_diffusion() as load:
        theirs = load("guided_diffusion.respace").space_timesteps
        for count in (2, 10, 20, 25, 40, 50, 63, 100, 125, 143, 200, 250, 334, 500, 1000):
            assert timesteps("ddim_leading", 1000, count).tolist() == sorted(theirs(1000, f"ddim{count}"))
        for sections in (
            (90, 60, 60, 20, 20),
            (40, 40, 20, 10, 10),
            (10, 15, 20),
            (1, 1, 8),
            (250,),
            (7,) * 7,
        ):
            found = timesteps("sections", 1000, sum(sections), sections=sections).tolist()
            assert found == sorted(theirs(1000, list(sections))), sections
        with pytest.raises(ValueError, match="no whole stride"):
            timesteps("ddim_leading", 1000, 51)
        with pytest.raises(ValueError, match="cannot create exactly"):
            theirs(1000, "ddim51")


def test_fast27() -> None:
    path = checkout("openai/glide-text2im", "glide_text2im/respace.py")
    with importing(path) as load:
        wanted = sorted(load("glide_text2im.respace").space_timesteps(1000, "fast27"))
    assert timesteps("fast27", 1000, 27).tolist() == wanted


@torch.no_grad()
@pytest.mark.parametrize("chain", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", ["learned", "fixed_small", "fixed_large"])
def test_ancestral_sampling_of_guided_diffusion(variance: Any, chain: ScheduleSpec, drawing: None) -> None:
    with guided_diffusion() as load:
        diffusion = load("guided_diffusion.script_util").create_gaussian_diffusion(
            noise_schedule=chain.betas,
            learn_sigma=variance == "learned",
            sigma_small=variance == "fixed_small",
            timestep_respacing="25",
        )
        network = FakeNetwork(6 if variance == "learned" else 3)
        x = start().double()
        expected = diffusion.p_sample_loop(rounded(network), SHAPE, noise=x, device="cpu")
    denoise = clip_x0(ours(network, "eps", Clock(chain)))
    found = from_noise(partial(ddpm, variance=variance), walk(chain, "linspace", 25).sigmas, denoise)
    assert apart(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_of_guided_diffusion(eta: float, drawing: None) -> None:
    with guided_diffusion() as load:
        make = load("guided_diffusion.script_util").create_gaussian_diffusion
        diffusion = make(learn_sigma=True, timestep_respacing="ddim25")
        network = FakeNetwork(6)
        expected = diffusion.ddim_sample_loop(
            rounded(network), SHAPE, noise=start().double(), device="cpu", eta=eta
        )
    denoise = clip_x0(ours(network, "eps", Clock(LINEAR)))
    found = from_noise(partial(ddim, eta=eta), walk(LINEAR, "ddim_leading", 25).sigmas, denoise)
    assert apart(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["ddim_leading", "quad"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_of_its_authors(
    spacing: Spacing, eta: float, drawing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is clipped, so that values grow; their code sends tensors to a GPU, which is left out."""
    network, way = FakeNetwork(), walk(LINEAR, spacing, 20)
    expected = by_the_authors_of_ddim("generalized_steps", network, way, eta=eta)
    denoise = ours(network, "eps", Clock(LINEAR))
    found = from_noise(partial(ddim, eta=eta), way.sigmas, denoise)
    assert apart(found, expected) < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_ancestral_sampling_of_the_authors_of_ddim(drawing: None) -> None:
    network, way = FakeNetwork(), walk(LINEAR, "ddim_leading", 250)
    expected = by_the_authors_of_ddim("ddpm_steps", network, way)
    denoise = clip_x0(ours(network, "eps", Clock(LINEAR)))
    found = from_noise(partial(ddpm, variance="fixed_large"), way.sigmas, denoise)
    assert apart(found, expected) < 1e-5


def by_the_authors_of_ddim(name: str, network: FakeNetwork, way: Walk, **how: float) -> Tensor:
    """The last picture of one of their samplers, on the chain of DDPM."""
    path = checkout("ermongroup/ddim", "functions/denoising.py")
    visited, betas = way.timesteps.flip(0).tolist(), torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    with importing(path) as load, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
        steps = getattr(load("functions.denoising"), name)
        pictures, _ = steps(start().double(), visited, rounded(network), betas, **how)
    return pictures[-1]


@contextmanager
def consistency_models(*, distilled: bool) -> Iterator[tuple[Any, Any]]:
    """Their module of samplers, and a diffusion."""
    path = checkout("openai/consistency_models", "cm/karras_diffusion.py")
    with importing(path, shims=SHIMS) as load:
        karras = load("cm.karras_diffusion")
        yield karras, karras.KarrasDenoiser(sigma_data=0.5, distillation=distilled, loss_norm="l2")


@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs", "taus"),
    [
        ({"sampler": "onestep", "steps": 40}, (0, 39)),
        ({"sampler": "multistep", "steps": 40, "ts": (0, 22, 39)}, (0, 22, 39)),
        ({"sampler": "multistep", "steps": 151, "ts": (0, 67, 150)}, (0, 67, 150)),
    ],
    ids=["one step", "two of 40", "two of 151"],
)
def test_sampling_of_consistency_models(theirs: dict[str, Any], taus: tuple[int, ...]) -> None:
    with consistency_models(distilled=True) as (karras, diffusion):
        network = FakeNetwork()
        expected = karras.karras_sample(
            diffusion, network, SHAPE, generator=Drawn(), model_kwargs={}, **theirs, **EDM
        )
    how = SamplingSpec(sampler="consistency", num_steps=len(taus) - 1, taus=taus)
    denoise = clip_x0(ours(network, "consistency", consistency_time, sigma_min=0.002))
    sampling = begin(how, 80.0 * start(), sigmas_of(how, **EDM), Stream(SEED), sigma_min=0.002)
    assert apart(sample(sampling, denoise), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("churn", [None, ChurnSpec(amount=8.0, low=0.0, high=1e9, noise=1.007)])
def test_heun_of_consistency_models(churn: ChurnSpec | None) -> None:
    """Of their EDM teachers; told to churn, at every level."""
    how = {} if churn is None else {"s_churn": churn.amount, "s_noise": churn.noise}
    with consistency_models(distilled=False) as (karras, diffusion):
        network = FakeNetwork()
        expected = karras.karras_sample(
            diffusion, network, SHAPE, steps=18, generator=Drawn(), model_kwargs={}, **how, **EDM
        )
    denoise = clip_x0(ours(network, "edm", consistency_time))
    sampling = heun(80.0 * start(), karras_sigmas(18, **EDM), Stream(SEED), churn=churn)
    assert apart(sample(sampling, denoise), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["iterative_colorization", "iterative_superres"])
def test_edits_of_consistency_models(name: str) -> None:
    picture, taus = start(5).clamp(-1, 1), (0, 22, 39)
    with consistency_models(distilled=True) as (karras, diffusion):
        network = FakeNetwork()

        def jump(x: Tensor, sigma: Tensor) -> Tensor:
            return diffusion.denoise(network, x, sigma)[1]

        expected, _ = getattr(karras, name)(jump, picture, 80.0 * start(), taus, generator=Drawn(), steps=40)
    if name == "iterative_superres":
        edit = edits.upscale(torch.nn.functional.avg_pool2d(picture, 8), 8)
    else:
        edit = edits.colorize((torch.tensor(edits.LUMA).view(1, 3, 1, 1) * picture).sum(1, keepdim=True))
    how = SamplingSpec(sampler="consistency", num_steps=2, taus=taus)
    denoise = clip_x0(ours(network, "consistency", consistency_time, sigma_min=0.002))
    sampling = begin(how, 80.0 * start(), sigmas_of(how, **EDM), Stream(SEED), sigma_min=0.002)
    assert apart(sample(edits.edited(sampling, edit), denoise), expected) < 1e-5


@pytest.mark.parametrize(("s0", "s1", "mu0"), [(2, 150, 0.9), (2, 200, 0.95), (10, 160, 0.9)])
def test_the_pace_of_consistency_training(s0: int, s1: int, mu0: float) -> None:
    path = checkout("openai/consistency_models", "cm/script_util.py")
    with importing(path, shims=SHIMS) as load:
        theirs = load("cm.script_util").create_ema_and_scales_fn(
            "adaptive", mu0, "progressive", s0, s1, total_steps=800_000, distill_steps_per_iter=0
        )
        for step in (*range(0, 800_000, 997), 799_999, 800_000):
            mu, levels = theirs(step)
            found = pace(step, 800_000, s0=s0, s1=s1, mu0=mu0, form="openai_code")
            assert (found.num_levels, found.mu) == (levels, pytest.approx(mu, rel=1e-14)), step


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(("num_timesteps", "schedule"), [(1000, "linear"), (4000, "cosine")])
def test_the_hybrid_loss(num_timesteps: int, schedule: Any, rescaled: bool, drawing: None) -> None:
    """At timestep 0 theirs has a tanh in place of the normal distribution function, to 1e-2."""
    chain = ScheduleSpec(betas=schedule, num_timesteps=num_timesteps)
    x0, t = start(3).double().clamp(-1, 1), torch.tensor([num_timesteps // 3, num_timesteps - 1])

    def linear(x: Tensor, told: Tensor | None = None) -> Tensor:
        return torch.cat([0.8 * x + 0.1, 0.3 * x.clamp(-2, 2) - 0.2], 1)

    def denoise(x: Tensor, sigma: Tensor, cond: Conditioning) -> Denoised:
        level = sigma.view(-1, 1, 1, 1)
        eps, variance = linear(x / (1 + level**2).sqrt()).chunk(2, 1)
        return Denoised(x - level * eps, (variance + 1) / 2)

    with guided_diffusion() as load:
        diffusion = load("guided_diffusion.script_util").create_gaussian_diffusion(
            steps=num_timesteps, learn_sigma=True, noise_schedule=schedule, rescale_learned_sigmas=rescaled
        )
        for at, tolerance in ((t, 1e-5), (torch.tensor([1, 2]), 1e-5), (torch.tensor([0, 0]), 1e-2)):
            noise = Stream(SEED)(x0)
            wanted = diffusion.training_losses(linear, x0, at, noise=noise)
            torch.randn_like.generator.manual_seed(SEED)  # type: ignore[attr-defined]
            mse, bits = likelihood.hybrid(denoise, x0, at, sigmas(chain), Conditioning(), rescaled=rescaled)
            torch.testing.assert_close(mse, wanted["mse"], rtol=1e-5, atol=0)
            torch.testing.assert_close(bits, wanted["vb"], rtol=tolerance, atol=0)
