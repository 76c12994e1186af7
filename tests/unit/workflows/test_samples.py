"""Sample grids of a chain: one picture a prompt, classes in turn, enlarged pictures beside the true ones."""

import pytest
import torch

from dd_core import images
from dd_core.samplers import SamplingSpec
from dd_core.stage import PairBatch, Trained
from dd_core.text import tokens
from tests.unit.dd_core import test_stages as stages
from tests.unit.dd_core.test_chain import (
    CLASSES,
    DDPM,
    ENLARGING,
    GLIDE,
    INPAINTING,
    LATENT,
    PARENTS,
    trained,
)
from workflows.samples import drawn
from workflows.train_spec import SamplesSpec

KNOWN = PairBatch(
    image=torch.randint(
        0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    ),
    tokens=torch.tensor(tokens(["a star", "a cross"], 12)),
)
HOW = SamplingSpec(sampler="ddim", num_steps=2, guidance_scale=1.0)


@pytest.mark.parametrize("spec", [DDPM, GLIDE, CLASSES, LATENT, INPAINTING])
def test_a_chain_draws_one_picture_for_each_prompt(spec: object) -> None:
    what = SamplesSpec(prompts=("a star", "a cross", ""), how=HOW)
    made = drawn(trained(spec), PARENTS, what, KNOWN)
    assert made is not None
    assert made.shape == (3, 3, 16, 16)
    assert drawn(trained(spec), PARENTS, SamplesSpec(how=HOW), KNOWN) is None


def test_an_enlarging_chain_shows_the_pictures_of_the_data_and_its_own_in_turn() -> None:
    made = drawn(trained(ENLARGING), {}, SamplesSpec(how=HOW), KNOWN)
    assert made is not None
    assert made.shape == (4, 3, 16, 16)
    assert torch.equal(made[::2], images.to_unit(KNOWN.image))


def test_a_base_from_drafts_paints_the_pictures_of_the_data_from_their_own_embeddings() -> None:
    torch.manual_seed(0)
    made_of = {
        spec.kind: Trained(spec, stages.stage(spec).model.state_dict())
        for spec in (stages.CLIP, stages.DRAFT, stages.BASE)
    }
    what = SamplesSpec(prompts=("a star", "a cross", "two"), how=HOW.but(sampler="dpmpp_2m"))
    made = drawn(made_of["base"], made_of, what, KNOWN)
    assert made is not None
    assert torch.equal(made[::2], images.to_unit(KNOWN.image))
    other = drawn(made_of["base"], made_of, what, KNOWN._replace(image=255 - KNOWN.image))
    assert other is not None
    assert not torch.equal(made[1::2], other[1::2])
    brought = drawn(made_of["base"], made_of, what, KNOWN._replace(embedding=torch.eye(8)[:2]))
    assert brought is not None
    assert not torch.equal(
        made[1::2], brought[1::2]
    )  # what the training is told of a larger picture, it paints
