"""A stage, and the hop that it becomes, take a parent CLIP that fits and refuse any other by both fields."""

import re

import pytest
import torch

from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.stage import PairBatch, Trained
from dd_core.stages import StageSpec, build_stage, load_hop
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.guides import leaders_of
from dd_core.stages.noised_clip import NoisedClipSpec
from tests.unit.dd_core import test_autoregressive_prior, test_causal_prior, test_chain, test_stages

SQUARE = test_causal_prior.CLIP
"""A CLIP whose two widths are equal, for the causal prior."""
UNCLIP = test_chain.UNCLIP
LEARNS = AutoencoderSpec(
    net=AutoencoderNetSpec(width=8, channel_mult=(1, 1), blocks=1, groups=4, mid_attention=False),
    image_size=16,
    crop=16,
)
NOISED = NoisedClipSpec(net=test_stages.CLIP.net)
JUMPING = ConsistencySpec(base=test_chain.DDPM.but(predicts="x0"), teacher=None, distance="clip")
READING = JUMPING.but(base=test_chain.FROZEN)
"""Its base needs the states of captions alone."""
CASES: list[tuple[StageSpec, ClipSpec, str, str]] = [
    (test_stages.BASE, test_stages.CLIP, "text_width", "net.text_width"),
    (test_stages.BASE, test_stages.CLIP, "embedding_width", "net.caption_width"),
    (test_stages.PRIOR, test_stages.CLIP, "text_width", "net.text_width"),
    (test_stages.PRIOR, test_stages.CLIP, "embedding_width", "net.embedding_width"),
    (test_stages.PRIOR, test_stages.CLIP, "context_length", "net.context_length"),
    (test_autoregressive_prior.SPEC, test_stages.CLIP, "text_width", "net.text_width"),
    (test_autoregressive_prior.SPEC, test_stages.CLIP, "embedding_width", "net.embedding_width"),
    (test_autoregressive_prior.SPEC, test_stages.CLIP, "context_length", "net.context_length"),
    (test_causal_prior.SPEC, SQUARE, "text_width", "net.embedding_width"),
    (test_causal_prior.SPEC, SQUARE, "embedding_width", "net.embedding_width"),
    (test_causal_prior.SPEC, SQUARE, "context_length", "net.context_length"),
    (test_chain.FROZEN, test_chain.CLIP, "text_width", "net.unet.text_width"),
    (UNCLIP, test_chain.CLIP, "text_width", "net.states_width"),
    (UNCLIP, test_chain.CLIP, "embedding_width", "net.unet.embedding_width"),
    (test_chain.TRANSFORMER, test_chain.CLIP, "text_width", "net.text_width"),
    (
        test_chain.TRANSFORMER.but(net=test_chain.TRANSFORMER.net.but(caption_width=16)),
        test_chain.CLIP,
        "embedding_width",
        "net.caption_width",
    ),
    (test_stages.DRAFT, test_stages.CLIP, "embedding_width", "embedding_width"),
    (NOISED.but(start="random"), test_stages.CLIP, "embedding_width", "net.embedding_width"),
]
FIELDS = [f"{spec.kind}-{name}-{field}" for spec, _, name, field in CASES]


def untrained(spec: ClipSpec) -> Trained:
    """A CLIP of such towers, with first weights."""
    return Trained(spec, build_stage(spec.but(captioner_layers=0), {}).model.state_dict())


def with_clip(spec: StageSpec, clip: ClipSpec) -> dict[str, Trained]:
    """The parents of a stage, with this CLIP in place of theirs."""
    return test_stages.parents(spec) | {"clip": untrained(clip)}


def text_alone(clip: ClipSpec) -> Trained:
    """The text tower of a CLIP."""
    seeing = "towers.visual", "towers.logit_scale", "towers.text_projection"
    weights = {name: value for name, value in untrained(clip).weights.items() if not name.startswith(seeing)}
    return Trained(clip.but(net=clip.net.but(towers="text")), weights)


def values(spec: ClipSpec, name: str) -> tuple[ClipSpec, int, int]:
    """The CLIP with another value of a field, the value that it had, and the new one."""
    was = getattr(spec.net, name)
    return spec.but(net=spec.net.but(**{name: was + 8})), was, was + 8


@pytest.mark.parametrize(("spec", "clip", "name", "field"), CASES, ids=FIELDS)
def test_a_stage_refuses_a_clip_that_does_not_fit(
    spec: StageSpec, clip: ClipSpec, name: str, field: str
) -> None:
    build_stage(spec, with_clip(spec, clip))
    other, mine, theirs = values(clip, name)
    wanted = f"{spec.kind}: {field} is {mine}, net.{name} of its parent clip is {theirs}; make them equal"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}"):
        build_stage(spec, with_clip(spec, other))


@pytest.mark.parametrize(("spec", "clip", "name", "field"), CASES[:-2], ids=FIELDS[:-2])  # two are no hops
def test_a_hop_refuses_a_clip_that_does_not_fit(
    spec: StageSpec, clip: ClipSpec, name: str, field: str
) -> None:
    weights = build_stage(spec, with_clip(spec, clip)).model.state_dict()
    if "products" in weights:
        weights["products"][0] = 1  # as if it had seen its first images
    trained, (other, mine, theirs) = Trained(spec, weights), values(clip, name)
    load_hop(trained, with_clip(spec, clip), device="cpu")
    wanted = f"{spec.kind}: {field} is {mine}, net.{name} of its parent clip is {theirs}; make them equal"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}"):
        load_hop(trained, with_clip(spec, other), device="cpu")


def test_a_guide_refuses_a_clip_that_it_was_not_trained_with() -> None:
    noised = Trained(NOISED, build_stage(NOISED, with_clip(NOISED, test_stages.CLIP)).model.state_dict())
    other, mine, theirs = values(test_stages.CLIP, "embedding_width")
    leaders_of({"noised_clip": noised, "clip": untrained(test_stages.CLIP)}, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=f"width is {mine}, net.embedding_width of its parent clip is {theirs}"
    ):
        leaders_of({"noised_clip": noised, "clip": untrained(other)}, torch.device("cpu"))


@pytest.mark.parametrize(
    "spec",
    [
        test_stages.BASE,
        test_stages.PRIOR,
        test_causal_prior.SPEC,
        test_chain.FROZEN,
        test_stages.DRAFT,
        NOISED,
    ],
    ids=lambda spec: spec.kind,
)
def test_what_is_no_clip_is_refused_as_such(spec: StageSpec) -> None:
    parents = test_stages.parents(spec) | {"clip": Trained(test_stages.DRAFT, {})}
    with pytest.raises(ValueError, match="the parent 'clip' is a DraftSpec, it must be a CLIP"):
        build_stage(spec, parents)


def test_states_alone_are_enough_where_no_embedding_is_told() -> None:
    reader = text_alone(test_chain.CLIP)
    batch = PairBatch(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), test_chain.told("a star", ""))
    for spec in (test_chain.FROZEN, test_chain.TRANSFORMER):
        assert build_stage(spec, {"clip": reader})(batch).total.isfinite()


@pytest.mark.parametrize(
    "spec",
    [
        test_stages.BASE,
        test_stages.PRIOR,
        test_chain.UNCLIP,
        test_stages.DRAFT,
        NOISED,
        LEARNS,
        JUMPING,
        READING,
    ],
    ids=lambda spec: spec.kind,
)
def test_a_text_tower_alone_embeds_nothing(spec: StageSpec) -> None:
    parents = test_stages.parents(spec) | {"clip": text_alone(test_chain.CLIP)}
    with pytest.raises(ValueError, match="this CLIP is a text tower alone"):
        build_stage(spec, parents)


def test_a_consistency_model_needs_what_its_base_needs() -> None:
    spec = READING.but(distance="l2")
    assert spec.clip_needs is not None
    assert spec.clip_needs.states == {"base.net.unet.text_width": 16}
    assert spec.clip_needs.captions
    assert not spec.clip_needs.both_towers
    assert JUMPING.but(distance="l2").clip_needs is None
    assert JUMPING.but(base=test_chain.GLIDE).tokens == {"base.net.text.context_length": test_chain.LENGTH}
