"""What guidance leads away from: nothing said, but for what training never kept back, which stays said."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dd_core.cascade import CascadeState, Hop, requested
from dd_core.denoiser import Conditioning
from dd_core.guidance import stack
from dd_core.labels import UNLABELLED
from dd_core.nets.clip import Clip
from dd_core.samplers import SamplingSpec
from dd_core.stages import StageSpec
from dd_core.stages.asking import refuse_sampling
from dd_core.stages.base import BaseHop, BaseSpec
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_told import Heard
from dd_core.stages.prior import PriorSpec
from tests.unit.dd_core import test_autoregressive_prior as codes
from tests.unit.dd_core import test_causal_prior as causal
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.test_asking import causal_prior
from tests.unit.dd_core.test_chain import UNCLIP
from tests.unit.dd_core.test_stages import BASE, FAST, PRIOR, asked, hop, parents, stage, told


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


READING: dict[str, Callable[[], Hop]] = {
    "base": lambda: hop(BASE),
    "chain": lambda: chains.hop(UNCLIP),
    "prior": lambda: hop(PRIOR),
    "causal_prior": causal_prior,
    "autoregressive_prior": lambda: codes.hop(parents(PRIOR)["clip"]),
}
"""Kind of a stage -> such a hop, whose captions CLIP reads."""


def wanting(kind: str, *captions: str) -> CascadeState:
    """A request of such a hop that names what it does not want."""
    length, width = {"causal_prior": (causal.LENGTH, 0), "chain": (chains.LENGTH, 16)}.get(kind, (12, 8))
    state = requested(captions, [*range(len(captions))], length, negatives=["a red box"] * len(captions))
    return state._replace(image_embedding=torch.ones(len(captions), width) / 4)


@pytest.mark.parametrize("kind", READING)
def test_who_is_not_guided_has_it_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, reads = READING[kind](), list[int]()

    def counted(read: Callable[[Clip, Tensor], object]) -> Callable[[Clip, Tensor], object]:
        def reading(clip: Clip, tokens: Tensor) -> object:
            reads.append(len(tokens))
            return read(clip, tokens)

        return reading

    for name in ("read", "read_packed"):
        monkeypatch.setattr(Clip, name, counted(getattr(Clip, name)))
    for scale, expected in ((1.0, [2]), (2.0, [2, 2])):
        reads.clear()
        made.start(wanting(kind, "a star", "a cat"), SamplingSpec(guidance_scale=scale))
        assert reads == expected


@pytest.mark.parametrize("kind", READING)
@torch.no_grad()
def test_beside_guided_requests_too_it_is_not_heard_by_who_is_not_guided(kind: str) -> None:
    """Whatever stands in its place, as many and the same rows are asked."""
    made = READING[kind]()
    guided, plain = (
        made.start(wanting(kind, "a star", "a cat"), SamplingSpec(guidance_scale=scale))
        for scale in (2.0, 1.0)
    )
    lost = Conditioning(
        *(None if part is None else torch.full_like(part, torch.nan) for part in plain.rows.null)
    )
    queries = [next(draw.sampling) for draw in (guided, plain)]
    x, levels = torch.cat([one.x for one in queries]), torch.cat([one.levels() for one in queries])
    answers = [
        made.denoiser(stack([guided.rows, plain.rows._replace(null=null)]))(x, levels).x0
        for null in (plain.rows.cond, lost, guided.rows.null)
    ]
    assert answers[0].isfinite().all()
    assert all(torch.equal(answers[0], other) for other in answers[1:])
