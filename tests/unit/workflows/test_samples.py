"""Sample grids of a chain: one picture a prompt, classes in turn, enlarged pictures beside the true ones."""

import pytest
import torch

from dd_core import images
from dd_core.samplers import SamplingSpec
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

KNOWN = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
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
    assert torch.equal(made[::2], images.to_unit(KNOWN))
