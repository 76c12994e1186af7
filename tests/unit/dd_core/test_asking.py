"""What specs alone can say: who hears a negative prompt, and what of a request a hop would refuse."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from pydantic import ValidationError

from dd_core.cascade import CascadeState, Hop, Role, requested
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, load_hop
from dd_core.stages.asking import hears_negative, led_away, refuse_guides, refuse_request, refuse_sampling
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from dd_core.stages.refusals import HEARS
from dd_core.steering import GradientSpec
from tests.unit.dd_core import test_causal_prior as causal
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core import test_guides as led
from tests.unit.dd_core import test_stages as stages
from tests.unit.dd_core.students import JUMPING, SPEC, on_classes
from tests.unit.serve.tiny import STAGES


@pytest.mark.parametrize("name", chains.SPECS)
def test_a_chain_hears_a_negative_prompt_just_where_that_changes_what_guidance_leads_away_from(
    name: str,
) -> None:
    spec = chains.SPECS[name]
    how = chains.how_of(spec)
    if how.guidance_scale == 1:
        assert not led_away(spec, how)
        return
    hop = chains.hop(spec)
    assert isinstance(hop, ChainHop)

    def asked(*negatives: str) -> CascadeState:
        state = requested(["a star"], [1], chains.LENGTH, negatives=negatives)
        side = spec.image_size // spec.factor
        small = torch.zeros(1, 3, side, side)
        return state._replace(label=torch.tensor([0]), image=small)

    told = [hop.rows(state, how).null for state in (asked(), asked("a red box"))]
    same = all(
        one is other or torch.equal(one, other)
        for one, other in zip(*told, strict=True)
        if one is not None and other is not None
    )
    assert led_away(spec, how) == hears_negative(spec) == (not same)
    assert not led_away(spec, how.but(guidance_scale=1.0))


def test_bases_priors_and_what_is_distilled_from_them_hear_it_and_upsamplers_do_not() -> None:
    heard = {name for name, spec in STAGES.items() if hears_negative(spec)}
    assert heard == {"prior", "base"}
    assert hears_negative(SPEC)
    assert not hears_negative(JUMPING)
    assert not led_away(SPEC, SamplingSpec(guidance_scale=1.0))


def told(refuse: Callable[[], None]) -> str:
    """What is said of what is refused; empty if nothing is."""
    try:
        refuse()
    except ValueError as error:
        return str(error)
    return ""


def possible(how: SamplingSpec, **more: object) -> SamplingSpec | None:
    """A sampling with this, if its sampler can be asked for it at all."""
    try:
        return how.but(**more)
    except ValidationError:
        return None


def causal_prior() -> Hop:
    clip = Trained(causal.CLIP, chains.made(causal.CLIP, {}).model.state_dict())
    return load_hop(Trained(causal.SPEC, causal.stage(clip).model.state_dict()), {"clip": clip}, device="cpu")


def consistency() -> Hop:
    parents = on_classes()
    return load_hop(Trained(JUMPING, parents["base"].weights), parents, device="cpu")


WALKING: dict[str, tuple[StageSpec, Callable[[], Hop]]] = {
    "chain": (chains.DDPM, lambda: chains.hop(chains.DDPM)),
    "base": (stages.BASE, lambda: stages.hop(stages.BASE)),
    "upsampler": (stages.UPSAMPLER, lambda: stages.hop(stages.UPSAMPLER)),
    "prior": (stages.PRIOR, lambda: stages.hop(stages.PRIOR)),
    "causal_prior": (causal.SPEC, causal_prior),
    "consistency": (JUMPING, consistency),
}
"""Kind of a stage whose hop walks noise levels -> one such spec, and its hop."""
LEVELS: list[dict[str, object]] = [
    {"num_steps": 1, "spacing": "linspace"},
    {"num_steps": 3, "spacing": "linspace"},
    {"num_steps": 27, "spacing": "fast27"},
    {"num_steps": 7, "spacing": "ldm_plus_one"},
    {"num_steps": 2},
    {"num_steps": 300},
]


@pytest.mark.parametrize("kind", [kind for kind, hears in HEARS.items() if hears.levels])
def test_noise_levels_that_a_hop_cannot_visit_are_refused_by_its_spec(kind: str) -> None:
    """Before it is trained, that is, and not at its first sample grid."""
    spec, make = WALKING[kind]
    hop, state = make(), stages.asked([1], "a star", label=torch.tensor([1]))
    usual = SamplingSpec(guidance_scale=1.0, sampler="consistency" if kind == "consistency" else "ddim")
    ways = [how for one in LEVELS if (how := possible(usual, **one))]
    found = [told(partial(refuse_sampling, spec, how, ())) for how in ways]
    assert found == [told(partial(hop.refuse, state, how)) for how in ways]
    assert any(found)
    assert not all(found)


def said(hop: Hop, spec: StageSpec, how: SamplingSpec, state: CascadeState) -> tuple[str, str]:
    """What the hop says of a request, and what its spec alone says; empty if nothing is refused."""
    guides: dict[Role, StageSpec] = {"classifier": led.CLASSIFIER}
    return (
        told(lambda: hop.refuse(state, how)),
        told(lambda: refuse_request(spec, how, guides, state._replace(image=None, image_embedding=None))),
    )


@pytest.mark.parametrize("label", [None, -1, 0, 2, 3, 8])
def test_what_a_spec_says_of_a_request_is_what_its_hop_says(label: int | None) -> None:
    classes, edm = chains.CLASSES, chains.EDM
    jumping = ConsistencySpec(base=edm, teacher=TeacherSpec(guidance_scale=1.0))
    jumps = SamplingSpec(sampler="consistency", num_steps=1, guidance_scale=1.0)
    plain = SamplingSpec(guidance_scale=1.0)
    rows: list[tuple[Hop, StageSpec, SamplingSpec]] = [
        (chains.hop(classes), classes, plain),
        (chains.hop(edm), edm, plain),
        (chains.hop(chains.DDPM), chains.DDPM, plain),
        (load_hop(Trained(jumping, chains.trained(edm).weights), {}, device="cpu"), jumping, jumps),
        *((led.HOP, chains.GLIDE, plain.but(gradient=GradientSpec(**{name: 1.0}))) for name in led.SCORES),
    ]
    state = requested(["a star"], [1], chains.LENGTH)
    state = state._replace(label=None if label is None else torch.tensor([label]))
    found = [said(hop, spec, how, state) for hop, spec, how in rows]
    assert [by_spec for _, by_spec in found] == [by_hop for by_hop, _ in found]
    assert any(found[1]) == (label not in (0, 2))


@pytest.mark.parametrize("reads", [8, 16, 32])
@pytest.mark.parametrize("scores", [("classes",), ("style",), ("classes", "caption")])
@pytest.mark.parametrize("spec", [chains.GLIDE, chains.LATENT], ids=["pixels", "latents"])
def test_a_guide_of_another_size_is_refused_by_specs_and_by_the_hop(
    spec: ChainSpec, scores: tuple[str, ...], reads: int
) -> None:
    """A classifier of 8, 16 or 32 px beside a noised CLIP of 16, for pictures of 16."""
    classifier = led.CLASSIFIER.but(net=led.CLASSIFIER.net.but(image_size=reads))
    weights = chains.made(classifier, {}).model.state_dict()
    how = SamplingSpec(guidance_scale=1.0, gradient=GradientSpec(**dict.fromkeys(scores, 1.0)))
    hop = load_hop(
        chains.trained(spec), led.PARENTS | {"classifier": Trained(classifier, weights)}, device="cpu"
    )
    guides: dict[Role, StageSpec] = {"classifier": classifier, "clip": chains.CLIP, "noised_clip": led.NOISED}
    by_hop = told(lambda: hop.refuse(led.asked(1), how))
    assert told(lambda: refuse_guides(spec, how, guides)) == by_hop
    assert told(lambda: refuse_request(spec, how, guides, led.asked(1))) == by_hop
    asked_of_it = "classes" in scores or spec is chains.LATENT
    assert bool(by_hop) == (asked_of_it and reads != 16)


@pytest.mark.parametrize(
    ("captions", "seeds", "negatives", "said"),
    [
        ((), [], (), "0 captions"),
        (("a", "b"), [1], (), "2 captions, {'seeds': 1, 'negatives': 0}: give one of each for each image"),
        (("a",), [1, 2], (), "1 captions, {'seeds': 2"),
        (("a", "b"), [1, 2], ("c",), "'negatives': 1}"),
        (("a",), [2**32], (), "each must be from 0 to 2**32 - 1"),
        (("a",), [-1], (), "each must be from 0 to 2**32 - 1"),
    ],
)
def test_what_is_asked_for_has_a_caption_and_a_seed_for_each_image(
    captions: tuple[str, ...], seeds: list[int], negatives: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        requested(captions, seeds, 12, negatives=negatives)
