"""What guidance leads away from: nothing said, but for what training never kept back, which stays said."""

import pytest
import torch

from dd_core.cascade import CascadeState
from dd_core.denoiser import Conditioning
from dd_core.labels import UNLABELLED
from dd_core.samplers import SamplingSpec
from dd_core.stages import StageSpec
from dd_core.stages.asking import refuse_sampling
from dd_core.stages.base import BaseHop, BaseSpec
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_told import Heard
from dd_core.stages.prior import PriorSpec
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.test_chain import UNCLIP
from tests.unit.dd_core.test_stages import BASE, FAST, PRIOR, asked, hop, stage, told


def same(found: Conditioning, expected: Conditioning) -> bool:
    return all(
        one is other or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(("captions", "embeddings"), [(0.5, 0.1), (0.5, 0.0), (0.0, 0.1)])
def test_of_a_chain_it_is_what_was_kept_back_in_training(captions: float, embeddings: float) -> None:
    spec = UNCLIP.but(told_dropout=captions, embedding_dropout=embeddings)
    heard = Heard(told("a star"), torch.tensor([UNLABELLED]), torch.ones(1, 16))
    state = CascadeState(seeds=[1], tokens=heard.tokens, image_embedding=heard.embedding)
    made = chains.hop(spec)
    assert isinstance(made, ChainHop)
    silent = heard._replace(
        tokens=told("") if captions else heard.tokens,
        embedding=0 * heard.embedding if embeddings else heard.embedding,
    )
    assert same(made.rows(state, SamplingSpec(guidance_scale=2.0)).null, made.told(silent, None))


def test_a_chain_that_heard_everything_does_not_guide_itself() -> None:
    assert not UNCLIP.but(told_dropout=0.0, embedding_dropout=0.0).guides_itself


@pytest.mark.parametrize("spec", [UNCLIP, BASE.but(from_draft=False)], ids=lambda spec: spec.kind)
def test_a_teacher_is_led_away_from_the_same(spec: StageSpec) -> None:
    """In distillation: without dropout of captions all but the embedding stays said."""
    field = "told_dropout" if spec is UNCLIP else "caption_dropout"
    spec = spec.but(**{field: 0.0}, embedding_dropout=0.5)
    made = chains.made(spec, chains.PARENTS) if spec.kind == "chain" else stage(spec)
    network = made.model.network
    batch = chains.batch()
    other = batch._replace(tokens=batch.tokens.flip(0))
    untold, others = (made.example(one).untold(network).text for one in (batch, other))
    assert not torch.equal(untold, others)


def test_of_a_base_it_is_what_was_left_out_in_training() -> None:
    """Without drafts: an empty caption comes without an embedding, and what is never left out stays said."""
    bare = BASE.but(from_draft=False, net=BASE.net.but(caption_width=0))
    embedding = torch.ones(1, 8) / 8**0.5
    state = asked([1], "a star", image_embedding=embedding)
    unwanted = state._replace(negative=told("a red box"))
    for captions, embeddings, nothing, with_unwanted in (
        (0.1, 0.1, ("", False), ("a red box", False)),
        (0.1, 0.0, ("", False), ("a red box", True)),
        (0.0, 0.1, ("a star", False), ("a red box", False)),
    ):
        made = hop(bare.but(caption_dropout=captions, embedding_dropout=embeddings))
        assert isinstance(made, BaseHop)
        for request, (caption, stays) in ((state, nothing), (unwanted, with_unwanted)):
            expected = made.told(told(caption), embedding if stays else None)
            assert same(made.rows(request, FAST).null, expected)


@pytest.mark.parametrize(
    "spec",
    [BASE.but(caption_dropout=0.0), PRIOR.but(caption_dropout=0.0)],
    ids=lambda spec: spec.kind,
)
def test_who_has_heard_every_caption_does_not_guide_itself(spec: BaseSpec | PriorSpec) -> None:
    made = hop(spec)
    for refuse in (
        lambda how: made.start(asked([1], "a star"), how),
        lambda how: refuse_sampling(spec, how, ()),
    ):
        refuse(FAST.but(guidance_scale=1.0))
        with pytest.raises(ValueError, match="set guidance_scale: 1, or train with caption_dropout"):
            refuse(FAST)
