"""Sample grids of a chain: one picture a prompt, classes in turn, enlarged pictures beside the true ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dd_core import images
from dd_core.cascade import CascadeState, run
from dd_core.samplers import SamplingSpec
from dd_core.stage import PairBatch, Trained
from dd_core.stages import StageSpec, load_hop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.draft import draft_of
from dd_core.text import tokens
from jobs.recipes import demo, smoke
from tests.unit.dd_core import test_stages as stages
from tests.unit.dd_core.test_chain import (
    CLASSES,
    DDPM,
    ENLARGING,
    GLIDE,
    INPAINTING,
    LATENT,
    PARENTS,
    UNCLIP,
    trained,
)
from workflows.samples import drawn, heading
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


@pytest.mark.parametrize("spec", [UNCLIP, stages.BASE.but(from_draft=False)], ids=lambda spec: spec.kind)
def test_who_was_never_without_an_embedding_is_shown_with_those_of_the_data(spec: StageSpec) -> None:
    spec, what = spec.but(embedding_dropout=0.0), SamplesSpec(prompts=("a star",), how=HOW)
    chain = spec.kind == "chain"
    one = (
        trained(spec) if isinstance(spec, ChainSpec) else Trained(spec, stages.stage(spec).model.state_dict())
    )
    parents = PARENTS if chain else stages.parents(spec)
    width = 16 if chain else 8
    grids = [
        drawn(one, parents, what, KNOWN._replace(embedding=torch.eye(width)[[2 * n, 2 * n + 1]]))
        for n in range(2)
    ]
    assert grids[0] is not None
    assert grids[1] is not None
    assert torch.equal(grids[0][::2], images.to_unit(KNOWN.image))
    assert not torch.equal(grids[0][1::2], grids[1][1::2])


def grid_of(*specs: StageSpec, what: SamplesSpec, known: PairBatch = KNOWN) -> Tensor:
    """What the first of these stages draws on the others, every other one a picture of the data."""
    made_of = {spec.kind: Trained(spec, stages.stage(spec).model.state_dict()) for spec in specs}
    made = drawn(made_of[specs[0].kind], made_of, what, known)
    assert made is not None
    assert torch.equal(made[::2], images.to_unit(known.image))
    return made


def test_a_draft_is_shown_by_what_the_embeddings_of_the_data_decode_to() -> None:
    embedding = torch.eye(8)[:2]
    known = KNOWN._replace(embedding=embedding)
    made = grid_of(stages.DRAFT, stages.CLIP, what=SamplesSpec(), known=known)
    net = draft_of(Trained(stages.DRAFT, stages.stage(stages.DRAFT).model.state_dict()))
    assert torch.equal(made[1::2], net(embedding).clamp(-1, 1))


def test_a_prior_is_shown_by_the_pictures_whose_embeddings_are_nearest_to_its_draws() -> None:
    many = KNOWN._replace(
        image=torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8),
        tokens=torch.tensor(tokens([f"thing {number}" for number in range(8)], 12)),
        embedding=torch.eye(8),
    )
    what = SamplesSpec(how=HOW)
    made = grid_of(stages.PRIOR, stages.CLIP, what=what, known=many)
    truth = images.to_unit(many.image)
    prior = Trained(stages.PRIOR, stages.stage(stages.PRIOR).model.state_dict())
    clip = Trained(stages.CLIP, stages.stage(stages.CLIP).model.state_dict())
    asked = CascadeState(seeds=list(range(8)), tokens=many.tokens)
    found = run(load_hop(prior, {"clip": clip}, device="cpu"), asked, HOW).image_embedding
    assert found is not None
    for picture, embedding in zip(made[1::2], found, strict=True):
        assert torch.equal(picture, truth[embedding.argmax()])  # of unit vectors along the axes
    assert torch.equal(made, grid_of(stages.PRIOR, stages.CLIP, what=what, known=many))


@pytest.mark.parametrize(
    ("spec", "data"),
    [
        (stages.DRAFT, True),
        (stages.PRIOR, True),
        (stages.UPSAMPLER, True),
        (stages.BASE, True),
        (ENLARGING, True),
        (stages.BASE.but(from_draft=False), False),
        (stages.BASE.but(from_draft=False, embedding_dropout=0.0), True),
        (UNCLIP, False),
        (UNCLIP.but(embedding_dropout=0.0), True),
        (DDPM, False),
    ],
)
def test_a_grid_is_headed_by_what_it_shows(spec: StageSpec, data: bool) -> None:
    said = heading(spec)
    assert ("pictures of the data" in said) == data
    assert ("prompts" in said) != data


@pytest.mark.parametrize("recipe", [demo, smoke])
def test_stages_of_a_recipe_that_are_to_draw_are_of_a_kind_that_does(recipe: Any) -> None:
    for stage in recipe.run().stages:
        if stage.budget.sample_every:
            frames = stage.budget.steps // stage.budget.sample_every
            assert 2 <= frames <= 6, stage.name  # as many as a report shows
            assert "data" in heading(stage.stage) or stage.samples.prompts, stage.name
