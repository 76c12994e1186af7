"""GLIDE's noised CLIP as a guide: Bayes' rule by its own towers, captions by its own tokens, a cascade."""

import math
from pathlib import Path

import pytest
import torch

from dd_core import bundle, schedules
from dd_core.cascade import CascadeSpec, CascadeState, HopSpec, requested, run
from dd_core.denoiser import Denoiser
from dd_core.layouts.published import published
from dd_core.nets.noised_clip import GlideClip, GlideClipSpec
from dd_core.samplers import SamplingSpec, ddpm, sample
from dd_core.stage import Trained
from dd_core.stages import load_hop
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.network import NetworkSpec
from dd_core.stages.published_clip import PublishedClip, published_clip_of
from dd_core.steering import GradientSpec
from dd_core.text import START, tokens
from tests.unit.dd_core.test_chain import GLIDE, PARENTS, trained

NET = GlideClipSpec(
    image_size=16,
    patch_size=8,
    image_width=16,
    image_layers=2,
    vocab_size=49_408,
    context_length=8,
    text_width=16,
    text_layers=2,
    head_width=8,
    embedding_width=12,
)
PROCESS = published()["glide-clip"].process
SPEC = NetworkSpec(source="glide-clip", net=NET, process=PROCESS)
CAPTION = "a red circle above a small blue square"


def network() -> GlideClip:
    torch.manual_seed(0)
    net = GlideClip(NET)
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return net.eval().requires_grad_(False)


TRAINED = Trained(SPEC, network().state_dict())


def tower() -> PublishedClip:
    found = published_clip_of(TRAINED)
    assert found is not None
    return found


def led_hop() -> ChainHop:
    parents = PARENTS | {"noised_clip": TRAINED, "clip": TRAINED}
    found = load_hop(trained(GLIDE), parents, device="cpu")
    assert isinstance(found, ChainHop)
    return found


def asked(*captions: str) -> CascadeState:
    return requested(captions, list(range(len(captions))), 12)


def test_it_is_told_the_timestep_of_each_level_and_shown_what_ddpm_would() -> None:
    table, t = schedules.sigmas(GLIDE.schedule), torch.tensor([3, 871])  # type: ignore[arg-type]
    sigma, x = table[t].float(), torch.randn(2, 3, 16, 16)
    seen = x / (1 + sigma**2).sqrt().view(2, 1, 1, 1)
    assert torch.equal(tower().timesteps(sigma), t)
    torch.testing.assert_close(tower().embed_image(x, sigma), network().embed_image(seen, t))
    edges = torch.tensor([1e-6, float(table[0]), float(table[-1]), 1e9])
    assert tower().timesteps(edges).tolist() == [0, 0, 999, 999]
    with pytest.raises(ValueError, match="reads 16 px and got"):
        tower().embed_image(torch.zeros(1, 3, 32, 32), sigma[:1])


def test_captions_end_at_their_last_token_and_what_follows_is_not_read() -> None:
    short, cut = "a star", CAPTION
    rows = torch.tensor(tokens([short, cut], 8))
    assert rows[0, 0] == START
    by_hand = network().embed_text(rows, torch.tensor([4, 8]))
    torch.testing.assert_close(tower().read([short, cut]), by_hand)
    other = rows.clone()
    other[0, 4:] = 77  # behind its end
    torch.testing.assert_close(network().embed_text(other, torch.tensor([4, 8])), by_hand)


def test_the_feature_maps_are_those_that_the_embedding_is_made_of() -> None:
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 5.0])
    maps = tower().features(x, sigma)
    assert [tuple(one.shape) for one in maps] == [(2, 16, 2, 2)] * 2
    one = tower().features(x[1:], sigma[1:])
    torch.testing.assert_close(one[1], maps[1][1:])


def gradient(x: torch.Tensor, t: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Of logit_scale * <z_t, z_i(x_t, t)> by x_t, the picture as DDPM scales it."""
    leaf, wanted = x.clone().requires_grad_(), tower().read(captions)
    score = 100 * (network().embed_image(leaf, t) * wanted).sum()
    (found,) = torch.autograd.grad(score, leaf)
    return found


def test_a_led_ancestral_step_moves_the_mean_by_the_variance_times_the_gradient() -> None:
    """Nichol et al. 2022, section 2.4, in DDPM's frame: mean + s * variance * grad."""
    hop, captions, weight = led_hop(), ["a star", CAPTION], 3.0
    how = SamplingSpec(
        sampler="ddpm",
        num_steps=100,
        spacing="linspace",
        guidance_scale=1.0,
        gradient=GradientSpec(caption=weight),
    )
    level, below = (float(schedules.sigmas(GLIDE.schedule)[t]) for t in (500, 490))  # type: ignore[arg-type]
    x_vp = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    x = x_vp * math.sqrt(1 + level**2)
    rows = hop.rows(asked(*captions), how)
    free = hop.rows(asked(*captions), how.but(gradient=None))
    one, nothing = torch.tensor([level, below]), torch.zeros_like(x)

    def stepped(denoise: Denoiser) -> torch.Tensor:
        """The mean: no noise is added."""
        step = ddpm(x, one, lambda like: nothing, variance="learned", mean_shift=True)
        return sample(step, denoise) / math.sqrt(1 + below**2)

    fraction = hop.denoiser(free)(x, torch.full((2,), level)).variance_fraction
    assert fraction is not None
    bar, bar_below = 1 / (1 + level**2), 1 / (1 + below**2)
    beta = 1 - bar / bar_below
    tilde = beta * (1 - bar_below) / (1 - bar)
    variance = torch.exp(fraction * math.log(beta) + (1 - fraction) * math.log(tilde))
    moved = stepped(hop.denoiser(rows)) - stepped(hop.denoiser(free))
    wanted = weight * variance * gradient(x_vp, torch.tensor([500, 500]), captions)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(moved, wanted, rtol=2e-3, atol=2e-5)


def test_a_cascade_names_it_for_both_roles_and_it_leads_to_its_caption(tmp_path: Path) -> None:
    base = trained(GLIDE)
    bundle.save(tmp_path / "base", base.spec, base.weights, parents={}, facts={})
    bundle.save(tmp_path / "noised_clip", SPEC, TRAINED.weights, parents={}, facts={})
    clip = bundle.save(tmp_path / "clip", PARENTS["clip"].spec, PARENTS["clip"].weights, parents={}, facts={})
    assert clip
    how = SamplingSpec(
        sampler="ddim",
        num_steps=8,
        guidance_scale=1.0,
        spacing="trailing",
        gradient=GradientSpec(caption=20.0),
    )

    def saved(name: str, **guides: str) -> Path:
        hop = HopSpec(stage="base", how=how, guides=guides, follows_request=True)  # type: ignore[arg-type]
        spec = CascadeSpec(name=name, hops=(hop,), context_length=12, image_size=16)
        stages = {stage: tmp_path / stage for stage in ("base", "noised_clip", "clip")}
        bundle.save_cascade(tmp_path / name, spec, stages, card="")
        return tmp_path / name

    with pytest.raises(ValueError, match="'noised_clip' was trained with 'noised_clip'; name that"):
        saved("wrong", noised_clip="noised_clip", clip="clip")
    opened = bundle.load_cascade(saved("led", noised_clip="noised_clip", clip="noised_clip"))
    hop = opened.hops[0]
    near = {}
    for name, chosen in (("led", how), ("free", how.but(gradient=None))):
        image = run(hop, asked(CAPTION, CAPTION), chosen).image
        assert image is not None
        clean = tower().embed_image(image, torch.full((2,), 0.01))
        near[name] = float((clean * tower().read([CAPTION] * 2)).sum(1).mean())
    assert near["led"] > near["free"] + 0.05
    with pytest.raises(ValueError, match="the request has their tokens alone; give the captions"):
        hop.refuse(asked("a")._replace(captions=()), how)
