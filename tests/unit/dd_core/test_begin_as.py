"""Any stage may begin with the weights of another training of it, and of no other."""

import pytest
import torch

from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.autoencoder import AutoencoderSpec, AutoencoderStage
from dd_core.stages.noised_clip import NoisedClipSpec
from tests.unit.dd_core.test_autoencoder import batches
from tests.unit.dd_core.test_autoregressive_prior import SPEC as CODES
from tests.unit.dd_core.test_autoregressive_prior import pictures
from tests.unit.dd_core.test_classifier_stage import SPEC as CLASSIFIER
from tests.unit.dd_core.test_stages import BASE, CLIP, DRAFT, PRIOR, UPSAMPLER, parents

AUTOENCODER = AutoencoderSpec(
    net=AutoencoderNetSpec(width=8, channel_mult=(1, 2), blocks=1, groups=4),
    image_size=16,
    crop=16,
    perceptual="none",
)
VQ = AUTOENCODER.but(net=AUTOENCODER.net.but(codes=32), image_size=32)
NOISED = NoisedClipSpec(net=CLIP.net)
SPECS = (CLIP, AUTOENCODER, DRAFT, BASE, UPSAMPLER, PRIOR, CODES, NOISED, CLASSIFIER)


def trained(spec: StageSpec) -> Trained:
    """With weights that no new network has."""
    torch.manual_seed(3)
    state = build_stage(spec, parents(spec)).model.state_dict()
    return Trained(
        spec, {name: torch.randn_like(w) if w.is_floating_point() else w for name, w in state.items()}
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_stage_begins_with_the_weights_of_another_training_of_it(spec: StageSpec) -> None:
    before = trained(spec)
    begun = build_stage(spec, parents(spec) | {"start": before}).model.state_dict()
    assert begun.keys() == before.weights.keys()
    assert all(torch.equal(weight, before.weights[name]) for name, weight in begun.items())
    assert "start" in spec.roles


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_what_is_of_another_kind_is_no_start(spec: StageSpec) -> None:
    other = DRAFT if spec is not DRAFT else CLIP
    with pytest.raises(ValueError, match=f"{spec.kind}: the parent 'start' is neither a {spec.kind} nor"):
        build_stage(spec, parents(spec) | {"start": trained(other)})


def test_another_network_is_no_start_and_its_field_is_named() -> None:
    wider = UPSAMPLER.but(net=UPSAMPLER.net.but(width=16))
    with pytest.raises(ValueError, match=r"'start' has another network: net\.width is 16 there and 8 here"):
        build_stage(UPSAMPLER, {"start": trained(wider)})


def test_weights_that_do_not_fit_are_no_start() -> None:
    bare = BASE.but(from_draft=False)  # the same net, in no refiner
    with pytest.raises(ValueError, match="base: the parent 'start' has other weights: "):
        build_stage(BASE, parents(BASE) | {"start": trained(bare)})


def test_a_codebook_that_has_been_trained_is_not_begun_anew() -> None:
    start = trained(VQ)
    for given, kept in (({"start": start}, True), ({}, False)):
        stage = build_stage(VQ, given)
        assert isinstance(stage, AutoencoderStage)
        assert stage.model.quantiser is not None
        before = stage.model.quantiser.vectors.weight.clone()
        stage.train()(next(batches()))
        assert torch.equal(before, stage.model.quantiser.vectors.weight) is kept


def test_axes_that_have_been_measured_are_not_measured_anew() -> None:
    start, batch = trained(CODES), next(pictures(CODES.measured_images))
    for given, kept in (({"start": start}, True), ({}, False)):
        stage = build_stage(CODES, parents(CODES) | given)
        before = {name: value.clone() for name, value in stage.model.named_buffers()}
        loss = stage.train()(batch).total
        assert bool(loss > 0) is kept  # it learns at once
        same = all(torch.equal(before[name], value) for name, value in stage.model.named_buffers())
        assert same is kept


def test_weights_that_predict_or_are_told_something_else_are_no_start() -> None:
    plain = BASE.but(from_draft=False, predicts="x0")
    with pytest.raises(ValueError, match="was trained otherwise: predicts is 'v' there and 'x0' here"):
        build_stage(plain, parents(plain) | {"start": trained(plain.but(predicts="v"))})
    net = CLASSIFIER.net.but(unet=CLASSIFIER.net.unet.but(level_scale=1))
    linear = CLASSIFIER.but(net=net, schedule=ScheduleSpec())
    cosine = linear.but(schedule=ScheduleSpec(betas="cosine", num_timesteps=4000))
    with pytest.raises(ValueError, match=r"schedule\.betas is 'linear' there and 'cosine' here"):
        build_stage(cosine, {"start": trained(linear)})
    build_stage(linear, {"start": trained(linear)})
