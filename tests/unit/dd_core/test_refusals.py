"""What cannot be painted is refused before any network is asked, and the way out is named."""

import pytest
import torch
from torch import Tensor, nn

from dd_core.cascade import Hop, HopSpec, followed
from dd_core.samplers import SamplingSpec, sigmas_of
from dd_core.stages import StageSpec
from dd_core.stages.chain_spec import ChainSpec
from tests.unit.dd_core.test_chain import (
    CLASSES,
    DDPM,
    EDM,
    ENLARGING,
    GLIDE,
    INPAINTING,
    LATENT,
    TRANSFORMER,
    UNCLIP,
    asked,
    hop,
    plain,
    told,
)
from tests.unit.dd_core.test_stages import BASE, PRIOR, UPSAMPLER
from tests.unit.dd_core.test_stages import asked as asked_of_base
from tests.unit.dd_core.test_stages import hop as other_hop

KNOWN, HOLE = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.bool)
PLAIN = SamplingSpec(guidance_scale=1.0)


def silent(made: Hop) -> Hop:
    """The same hop, whose networks must not be asked."""

    def asked_anyway(*_: object) -> None:
        raise AssertionError("a network was asked")

    for part in vars(made).values():
        if isinstance(part, nn.Module):
            for module in part.modules():
                module.register_forward_pre_hook(asked_anyway)
    return made


@pytest.mark.parametrize(
    ("spec", "how", "more", "remedy"),
    [
        (DDPM, {"guidance_scale": 3.0}, {}, "set guidance_scale: 1, or train with told_dropout"),
        (DDPM, {"sampler": "ddpm"}, {}, "does not learn its variance .* fixed_small"),
        (DDPM, {"sampler": "consistency"}, {}, "no consistency model; use ddim or dpmpp_2m"),
        (DDPM, {"spacing": "ddim_leading", "num_steps": 300}, {}, "no whole stride takes 300 .*use linspace"),
        (DDPM, {"spacing": "ldm_plus_one", "num_steps": 30}, {}, "that divides it, got 30"),
        (DDPM, {"spacing": "linspace", "num_steps": 1}, {}, "one step of linspace .* use trailing"),
        (
            DDPM,
            {},
            {"gray": KNOWN[:, :1]},
            "a chain does not keep the brightness of a picture; take a consistency model",
        ),
        (DDPM, {"strength": 0.5}, {}, "strength 0.5 needs the picture that it is of"),
        (DDPM, {"strength": 0.01, "num_steps": 20}, {"known": KNOWN}, "of 20 steps is no step; raise either"),
        (DDPM, {}, {"hole": HOLE}, "a hole needs the picture that it is of"),
        (DDPM, {}, {"known": KNOWN, "hole": HOLE}, "no mask channels; set inpainting: projection"),
        (DDPM, {}, {"known": KNOWN[:, :1]}, "not RGB; convert it to RGB"),
        (
            INPAINTING,
            {},
            {"known": KNOWN, "hole": HOLE[..., :8]},
            r"hole is \(16, 8\), the picture \(16, 16\)",
        ),
        (GLIDE, {}, {"tokens": told("a")[:, :7]}, "captions of 7 tokens, but the model reads 12"),
        (CLASSES, {}, {"label": torch.tensor([3])}, "classes are 0 to 2"),
        (CLASSES.but(net=plain(labels=3), told_dropout=0.0), {}, {"label": None}, "give a label"),
        (ENLARGING, {}, {"image": None}, "enlarges 4 px and got None"),
        (ENLARGING, {}, {"image": torch.zeros(1, 3, 8, 8)}, r"enlarges 4 px and got \(3, 8, 8\)"),
        (UNCLIP.but(embedding_dropout=0.0), {}, {}, "embedding_dropout 0.* and got None; put a prior before"),
        (EDM, {"spacing": "linspace"}, {}, "trained on all noise levels; use karras"),
        (EDM, {}, {"label": None}, "give a label"),
        (EDM, {}, {"label": torch.tensor([-1])}, r"label \[-1\]: classes are 0 to 2"),  # no null class
        (LATENT, {"dynamic_threshold": 0.9}, {}, "for pixels, and this model paints latents"),
        (LATENT, {"clip": "estimate"}, {}, "clip estimate is for pixels, and this model paints latents"),
        (LATENT, {"sampler": "ddim", "clip": "image"}, {}, "clip image is for pixels, and this model"),
    ],
)
def test_a_chain_refuses(
    spec: ChainSpec, how: dict[str, object], more: dict[str, Tensor | None], remedy: str
) -> None:
    made = silent(hop(spec))
    with pytest.raises(ValueError, match=remedy):
        made.start(asked([1], "a")._replace(**more), PLAIN.but(**how))


@pytest.mark.parametrize("spec", [BASE, UPSAMPLER], ids=lambda spec: spec.kind)
def test_a_hole_in_a_model_without_mask_channels_needs_the_training_free_way(spec: object) -> None:
    made = silent(other_hop(spec))
    known, hole = torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool)
    with pytest.raises(ValueError, match="set inpainting: projection"):
        made.start(asked_of_base([1], "a", known=known, hole=hole), PLAIN)


@pytest.mark.parametrize(
    ("spec", "how", "more", "remedy"),
    [
        (BASE, {"sampler": "consistency"}, {}, "a base is no consistency model; use ddim or dpmpp_2m"),
        (BASE, {"sampler": "ddpm"}, {}, "this base does not learn its variance .* sampler: ddim"),
        (BASE, {"sampler": "ddpm", "variance": "analytic"}, {}, "errors are not measured; set variance"),
        (BASE, {"temperature": 0.9}, {}, "for the noise that a chain begins with, not a base; leave it out"),
        (
            BASE,
            {},
            {"gray": KNOWN[:, :1]},
            "a base does not keep the brightness of a picture; take a consistency",
        ),
        (
            BASE,
            {},
            {"coarse": KNOWN},
            "a base does not keep the pixels of a smaller picture; take a consistency",
        ),
        (UPSAMPLER, {}, {"image": None}, "enlarges 16 px and got None; put the hop that paints it before"),
        (UPSAMPLER, {}, {"image": torch.zeros(1, 3, 8, 8)}, r"enlarges 16 px and got \(3, 8, 8\)"),
        (BASE.but(embedding_dropout=0.0), {}, {}, "embedding_dropout 0.* and got None; put a prior before"),
        (UPSAMPLER, {"sampler": "consistency"}, {}, "an upsampler is no consistency model; use ddim"),
        (UPSAMPLER, {"sampler": "ddpm"}, {}, "this upsampler does not learn its variance"),
        (
            UPSAMPLER,
            {"guidance_scale": 2.0},
            {},
            "is told no caption, so none guides it; set guidance_scale: 1",
        ),
        (UPSAMPLER, {"guidance_rescale": 0.5}, {}, "leave guidance_rescale and guidance_interval out"),
        (PRIOR, {"sampler": "consistency"}, {}, "a prior is no consistency model; use ddim"),
        (PRIOR, {"clip": "none"}, {}, "are for pixels, and a prior draws embeddings; leave them out"),
        (PRIOR, {"dynamic_threshold": 0.9}, {}, "are for pixels, and a prior draws embeddings"),
    ],
)
def test_what_a_hop_does_not_hear_is_refused_and_what_is_usual_is_not(
    spec: StageSpec, how: dict[str, object], more: dict[str, Tensor | None], remedy: str
) -> None:
    made = silent(other_hop(spec))
    state = asked_of_base([1], "a", image=torch.zeros(1, 3, 16, 16))
    made.refuse(state, SamplingSpec())
    with pytest.raises(ValueError, match=remedy):
        made.start(state._replace(**more), PLAIN.but(**how))


def test_an_upsampler_clips_as_it_is_asked() -> None:
    made = other_hop(UPSAMPLER)
    state = asked_of_base([1], "a", image=torch.ones(1, 3, 16, 16))
    x, sigma = 30 * torch.randn(1, 3, 64, 64), torch.tensor([20.0])
    usual, free = (made.start(state, how) for how in (PLAIN, PLAIN.but(clip="none")))
    loud = made.denoiser(free.rows)(x, sigma).x0
    torch.testing.assert_close(made.denoiser(usual.rows)(x, sigma).x0, loud.clamp(-1, 1))
    assert loud.abs().max() > 1


def test_a_hole_in_a_base_is_filled_from_as_far_as_asked() -> None:
    made, how = other_hop(BASE), PLAIN.but(inpainting="projection", num_steps=10, strength=0.5)
    known, hole = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16, dtype=torch.bool)
    draw = made.start(asked_of_base([1], "a", known=known, hole=hole), how)
    first = next(draw.sampling)
    levels = sigmas_of(how, sigma_min=BASE.sigma_min, sigma_max=BASE.sigma_max)
    assert first.sigma == pytest.approx(float(levels[5]))
    assert float(first.x.std()) == pytest.approx(float(levels[5]), rel=0.1)


@pytest.mark.parametrize(
    ("spec", "change", "remedy"),
    [
        (DDPM, {"loss": "hybrid"}, "out_channels is 3; loss hybrid takes 6"),
        (DDPM, {"inpaints": True}, "image_channels is 0, set it to 4"),
        (DDPM, {"factor": 3, "image_size": 16}, "must divide by 3"),
        (LATENT, {"loss": "vlb"}, "counts the bits of pixels; use simple"),
        (LATENT, {"predicts": "edm"}, "predicts edm scales for pixels"),
        (LATENT, {"factor": 2}, "an enlarging model paints pixels"),
        (DDPM, {"degrades": "bsr"}, "is for a model that enlarges; set factor"),
        (ENLARGING, {"crop": 32}, "crop 32 is larger than image_size 16"),
        (ENLARGING, {"crop": 4}, "crop 4 must divide by 8"),
        (LATENT, {"crop": 8}, "for a UNet that paints pixels; set crop: 0"),
        (EDM, {"loss": "vlb"}, "counts the bits of timesteps; use simple"),
        (EDM, {"rescaled_time": True}, "is for networks that are told timesteps; leave it out"),
        (TRANSFORMER, {"rescaled_time": True}, "is for networks that are told timesteps; leave it out"),
        (TRANSFORMER, {"image_size": 32}, "net.image_size is 16, image_size 32; make them equal"),
    ],
)
def test_a_spec_whose_parts_do_not_fit_says_how_they_would(
    spec: ChainSpec, change: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        spec.but(**change)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"guidance_scale": -1.0}, "greater than or equal to 0"),
        ({"sampler": "ddim", "eta": 1.5}, "less than or equal to 1"),
        ({"sampler": "ddim", "eta": -0.5}, "greater than or equal to 0"),
        ({"clip": "image"}, "clip image is for sampler ddim"),
        ({"sampler": "ddim", "clip": "none", "dynamic_threshold": 0.9}, "leave one out"),
        ({"dynamic_threshold": 1.5}, "less than or equal to 1"),
        ({"gradient": {"clip": 2.0}}, "GradientSpec has no field 'clip'"),
        ({"gradient": {"caption": -1.0}}, "greater than or equal to 0"),
    ],
)
def test_a_sampling_that_is_none_is_refused(fields: dict[str, object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        SamplingSpec.model_validate(fields)


def test_a_scale_of_three_is_refused_where_it_is_said_and_not_where_a_file_names_every_field() -> None:
    made, state = other_hop(UPSAMPLER), asked_of_base([1], "a", image=torch.zeros(1, 3, 16, 16))
    unsaid = SamplingSpec(num_steps=4)
    filed = SamplingSpec.model_validate_json(unsaid.model_dump_json())
    for how in (unsaid, unsaid.but(num_steps=5), filed, HopSpec(stage="upsampler", how=filed).how):
        assert how.guidance_scale == 3
        made.refuse(state, how)
    request = HopSpec(stage="upsampler", how=filed, follows_request=True)
    for how in (SamplingSpec(guidance_scale=3), unsaid.but(guidance_scale=3), followed(request, scale=3.0)):
        with pytest.raises(ValueError, match="set guidance_scale: 1"):
            made.refuse(state, how)
