"""The image that a replica draws before it says that it is ready: every kind of hop can draw it."""

import pytest
import torch

from dd_core.cascade import run
from dd_core.consistency import FixedLevels
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import load_hop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from dd_core.steering import GradientSpec
from serve.replicas import rehearsal, shortest
from tests.unit.dd_core.test_chain import (
    CLASSES,
    EDM,
    ENLARGING,
    GLIDE,
    INPAINTING,
    LATENT,
    PARENTS,
    UNCLIP,
    trained,
)
from tests.unit.dd_core.test_guides import HOP

FAST27 = SamplingSpec(sampler="ddim", num_steps=27, spacing="fast27", guidance_scale=1.0)


@pytest.mark.parametrize(
    ("spec", "how"),
    [
        (UNCLIP.but(embedding_dropout=0.0), SamplingSpec(num_steps=10)),
        (GLIDE, SamplingSpec(sampler="ddpm", num_steps=100, spacing="linspace")),
        (ENLARGING, FAST27),
        (LATENT, SamplingSpec(sampler="ddim", num_steps=50, spacing="ldm_plus_one")),
        (CLASSES, SamplingSpec(num_steps=10)),
        (INPAINTING, SamplingSpec(num_steps=10, strength=0.1)),
    ],
)
def test_every_chain_can_rehearse(spec: ChainSpec, how: SamplingSpec) -> None:
    hop = load_hop(trained(spec), PARENTS, device="cpu")
    short = shortest(how)
    assert short.num_steps == 2
    image = run(hop, rehearsal(spec, 12, how), short).image
    assert image is not None
    assert image.shape == (1, 3, 16, 16)
    assert image.isfinite().all()


@pytest.mark.parametrize(("taus", "segments"), [((0, 9, 22, 39), 1), ((), 3)], ids=["levels", "segments"])
def test_a_consistency_model_rehearses_in_its_own_jumps(taus: tuple[int, ...], segments: int) -> None:
    how = SamplingSpec(sampler="consistency", num_steps=3, taus=taus, guidance_scale=1.0)
    assert shortest(how) == how
    levels = FixedLevels(num_levels=40)
    spec = ConsistencySpec(
        base=EDM, teacher=TeacherSpec(guidance_scale=1.0), levels=levels, segments=segments
    )
    hop = load_hop(Trained(spec, trained(EDM).weights), {}, device="cpu")
    image = run(hop, rehearsal(spec, 12, how), shortest(how)).image
    assert image is not None
    assert image.shape == (1, 3, 16, 16)


def test_a_led_hop_asks_its_guides_while_it_rehearses() -> None:
    led = GradientSpec(classes=1.0, caption=1.0, style=1.0)
    how = SamplingSpec(sampler="ddpm", num_steps=100, spacing="linspace", guidance_scale=1.0, gradient=led)
    assert shortest(how).gradient == led
    image = run(HOP, rehearsal(GLIDE, 12, how), shortest(how)).image
    assert image is not None
    assert torch.isfinite(image).all()
