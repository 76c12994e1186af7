"""Base, upsampler, prior and CLIP: what a caption, an embedding and a seed may and may not change."""

import pytest
import torch
from torch import Tensor

from dd_core import losses
from dd_core.cascade import CascadeState, Hop, run
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.nets.draft import Draft
from dd_core.nets.prior import PriorNetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import PairBatch, Stage, Trained
from dd_core.stages import StageSpec, build_stage, load_hop
from dd_core.stages.base import BaseHop, BaseSpec, roughened
from dd_core.stages.clip import ClipSpec, ClipStage
from dd_core.stages.draft import DraftSpec, draft_of
from dd_core.stages.noised_clip import NoisedClipSpec
from dd_core.stages.prior import PriorHop, PriorSpec
from dd_core.stages.upsampler import UpsamplerSpec
from dd_core.text import tokens

CLIP = ClipSpec(
    net=ClipNetSpec(
        embedding_width=8,
        image_size=16,
        patch_size=8,
        image_width=16,
        image_layers=1,
        context_length=12,
        text_width=16,
        text_layers=1,
        head_width=8,
    ),
    captioner_layers=1,
)
DRAFT = DraftSpec(embedding_width=8, width=8, image_size=16, measured_images=4)
BASE = BaseSpec(
    net=DiTSpec(
        image_size=16,
        stem=2,
        conv_width=8,
        conv_blocks=1,
        width=16,
        layers=1,
        head_width=8,
        text_width=16,
        caption_width=8,
        embedding_width=8,
    ),
    image_size=16,
    from_draft=True,
)
UPSAMPLER = UpsamplerSpec(
    net=UNetSpec(
        width=8, channel_mult=(1,), groups=4, attention_in_middle=False, attention_at=(), image_channels=3
    ),
    image_size=64,
    crop=16,
)
PRIOR = PriorSpec(
    net=PriorNetSpec(
        width=16,
        layers=1,
        head_width=8,
        text_width=16,
        embedding_width=8,
        context_length=12,
        measured_images=4,
    ),
    image_size=16,
)
SPECS: list[StageSpec] = [CLIP, BASE, UPSAMPLER, PRIOR]
FAST = SamplingSpec(sampler="ddim", num_steps=3, guidance_scale=2.0, eta=0.5)


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, 12))


def stage(spec: StageSpec) -> Stage:
    """A stage with no weight left at zero, so that everything it is told may matter."""
    torch.manual_seed(0)
    made = build_stage(spec, parents(spec))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def parents(spec: StageSpec) -> dict[str, Trained]:
    """What a stage stands on."""
    named: dict[str, dict[str, StageSpec]] = {
        "clip": {},
        "draft": {"clip": CLIP},
        "base": {"clip": CLIP, "draft": DRAFT},
    }
    roles: dict[str, StageSpec] = named.get(spec.kind, {"clip": CLIP})
    return {role: Trained(parent, stage(parent).model.state_dict()) for role, parent in roles.items()}


def hop(spec: StageSpec) -> Hop:
    return load_hop(Trained(spec, stage(spec).model.state_dict()), parents(spec), device="cpu")


def asked(seeds: list[int], *captions: str, **more: Tensor) -> CascadeState:
    small = torch.linspace(-1, 1, 16).expand(len(seeds), 3, 16, 16)
    return CascadeState(seeds=seeds, tokens=told(*captions), image=small)._replace(**more)


def drawn(spec: StageSpec, state: CascadeState, how: SamplingSpec = FAST) -> Tensor:
    end = run(hop(spec), state, how.but(guidance_scale=1.0) if spec is UPSAMPLER else how)
    result = end.image_embedding if isinstance(spec, PriorSpec) else end.image
    assert result is not None
    return result


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_every_trained_weight_can_learn(spec: StageSpec) -> None:
    size = spec.image_size
    image = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    made = stage(spec)
    for _ in range(2):  # in the first some only look
        made(PairBatch(image, told("a red circle", "a blue star", "two", "a cross"))).total.backward()
    still = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == ([] if spec != CLIP else [name for name in still if "token_embedding" in name])
    frozen = [p for parent in made.frozen for p in parent.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not {id(p) for p in frozen} & {id(p) for p in made.parameters()}


@pytest.mark.parametrize("spec", [BASE, UPSAMPLER, PRIOR], ids=lambda spec: spec.kind)
def test_a_seed_gives_the_same_draw_alone_and_in_company(spec: StageSpec) -> None:
    together = drawn(spec, asked([5, 6, 7], "a red circle", "a blue star", "a cross"))
    alone = drawn(spec, asked([6], "a blue star"))
    torch.testing.assert_close(together[1:2], alone, atol=1e-2, rtol=0)
    assert torch.equal(alone, drawn(spec, asked([6], "a blue star")))
    assert not torch.equal(alone, drawn(spec, asked([7], "a blue star")))


@pytest.mark.parametrize("spec", [BASE, PRIOR], ids=lambda spec: spec.kind)
def test_at_scale_zero_no_caption_is_heard_and_at_one_no_negative(spec: StageSpec) -> None:
    deaf = FAST.but(guidance_scale=0.0)
    assert torch.equal(*(drawn(spec, asked([1], text), deaf) for text in ("a red circle", "a big blue star")))
    plain = FAST.but(guidance_scale=1.0)
    assert torch.equal(
        drawn(spec, asked([1], "a star"), plain),
        drawn(spec, asked([1], "a star", negative=told("a red box")), plain),
    )
    assert not torch.equal(
        drawn(spec, asked([1], "a star")), drawn(spec, asked([1], "a star", negative=told("a red box")))
    )


def test_the_prior_answers_with_unit_vectors_and_keeps_the_likelier_one() -> None:
    made, state = hop(PRIOR), asked([3, 4], "a star", "a cross")
    assert isinstance(made, PriorHop)
    draw = made.start(state, FAST.but(draws=2))
    assert len(draw.rows.scale) == 4
    both = torch.randn(4, 8, generator=torch.Generator().manual_seed(5))
    kept = made.finish(state, both).image_embedding
    draws = made.model.network.whitening.back(both).unflatten(0, (2, 2))
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(2, 2))
    assert torch.equal(kept, draws[torch.arange(2), made.fit(state.tokens, draws).argmax(1)])


def test_the_base_hears_the_image_embedding() -> None:
    one, other = torch.nn.functional.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    states = [asked([1], "a star", image_embedding=e[None]) for e in (one, other, torch.zeros(8))]
    first, second, none = (drawn(BASE, state) for state in states)
    assert not torch.equal(first, second)
    assert torch.equal(none, drawn(BASE, asked([1], "a star")))


def test_a_draft_learns_what_each_vector_looks_like() -> None:
    torch.manual_seed(0)
    draft, vectors = Draft(8, 16, 8, layers=3, measured=2), torch.eye(8)[:2]
    pictures = -torch.ones(2, 3, 16, 16)
    pictures[0, :, :, :8], pictures[1, :, :, 8:] = 1, 1
    optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
    for _ in range(100):
        loss = (draft(vectors) - pictures).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01  # one picture for both would be wrong by 1


def test_the_base_is_shown_the_draft_of_the_embedding_and_gray_where_there_is_none() -> None:
    decoder = Trained(DRAFT, stage(DRAFT).model.state_dict())
    clip = Trained(CLIP, stage(CLIP).model.state_dict())
    hop = BaseHop(Trained(BASE, stage(BASE).model.state_dict()), clip, decoder, device="cpu")
    embedding = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1) * torch.tensor([[1.0], [0.0]])
    shown = hop.told(told("a star", "a star"), embedding).image
    assert shown is not None
    torch.testing.assert_close(shown[:1], draft_of(decoder)(embedding[:1]).clamp(-1, 1))
    assert not shown[1].any()


def test_an_untrained_base_paints_nearly_its_draft() -> None:
    torch.manual_seed(0)
    stands_on = parents(BASE)
    untrained = Trained(BASE, build_stage(BASE, stands_on).model.state_dict())
    embedding = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
    state = asked([1], "a star", image_embedding=embedding)
    made = run(load_hop(untrained, stands_on, device="cpu"), state, FAST.but(guidance_scale=1.0)).image
    draft = draft_of(stands_on["draft"])(embedding).clamp(-1, 1)
    assert made is not None
    assert (made - draft).abs().mean() < 0.03
    assert (draft - draft.flip(-1)).abs().mean() > 0.1


def test_guidance_of_a_base_from_drafts_leads_away_from_the_caption_and_not_from_the_draft() -> None:
    stands_on = parents(BASE)
    hop = load_hop(Trained(BASE, stage(BASE).model.state_dict()), stands_on, device="cpu")
    assert isinstance(hop, BaseHop)
    embedding = torch.nn.functional.normalize(torch.randn(1, 8), dim=-1)
    state = asked([1], "a star", image_embedding=embedding)
    said, unsaid = hop.told(state.tokens, embedding), hop.unsaid(state)
    assert said.image is not None
    assert torch.equal(said.image, unsaid.image)
    assert torch.equal(said.image_embedding, unsaid.image_embedding)
    assert not torch.equal(said.text, unsaid.text)


@pytest.mark.parametrize("with_draft", [True, False])
def test_a_base_hears_embeddings_as_rough_as_its_spec_says_and_leaves_some_out(with_draft: bool) -> None:
    torch.manual_seed(0)
    spec = BASE.but(embedding_noise=0.1, embedding_dropout=0.25)
    draft = draft_of(parents(BASE)["draft"]) if with_draft else None
    exact = torch.nn.functional.normalize(torch.randn(4_000, 8), dim=-1)
    dropped = torch.arange(4_000)[:, None] % 2 == 0
    heard = roughened(spec, draft, exact, dropped)
    there = heard.any(1)
    assert there.float().mean().item() == pytest.approx(0.75 if with_draft else 0.375, abs=0.02)
    off = heard[there] - exact[there]
    if draft is None:
        assert off.norm(dim=1).mean().item() == pytest.approx(0.1, rel=0.05)
    else:
        torch.testing.assert_close(heard[there].norm(dim=1), torch.ones(int(there.sum())))
        assert (
            0.05 < off.norm(dim=1).mean() < 0.3
        )  # .1 on each of 8 coordinates, less what lies along the vector


def test_edges_are_the_squared_error_of_steps_between_neighbours() -> None:
    flat, step = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    assert losses.edge_mse(flat + 0.5, flat) == 0
    assert losses.edge_mse(step, flat).item() == pytest.approx(1 / 3)  # 4 of 12 steps across, none down
    assert losses.edge_mse(step.mT, flat).item() == pytest.approx(1 / 3)


def test_a_draft_only_looks_at_first_and_learns_from_what_it_has_whitened() -> None:
    made, weights = stage(DRAFT), stage(DRAFT).state_dict()
    image = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    batch = PairBatch(image, told("one", "two", "three", "four"))
    first = made(batch)
    first.total.backward()
    assert not first.parts
    assert first.total == 0
    assert not any(p.grad.any() for p in made.parameters() if p.grad is not None)
    assert not torch.equal(made.state_dict()["model.whitening.axes"], weights["model.whitening.axes"])
    assert made(batch).parts["x0_mse"] > 0


def test_a_base_from_drafts_refuses_to_be_without_or_with_one_of_another_size() -> None:
    clip = Trained(CLIP, stage(CLIP).model.state_dict())
    with pytest.raises(ValueError, match="needs the parent 'draft'"):
        build_stage(BASE, {"clip": clip})
    large = DRAFT.but(image_size=32)
    with pytest.raises(ValueError, match="make them equal"):
        build_stage(BASE, {"clip": clip, "draft": Trained(large, stage(large).model.state_dict())})
    other = DRAFT.but(embedded_at=32)
    with pytest.raises(ValueError, match="images of 16 px, its parent draft of images of 32 px; make emb"):
        build_stage(BASE, {"clip": clip, "draft": Trained(other, stage(DRAFT).model.state_dict())})


@pytest.mark.parametrize("spec", [DRAFT.but(embedded_at=32), BASE.but(embedded_at=32, from_draft=False)])
def test_embeddings_of_larger_images_come_with_the_batch_and_those_of_its_own_are_not_taken(
    spec: StageSpec,
) -> None:
    made, pairs = stage(spec), PairBatch(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), told(*["a star"] * 4))
    assert made(pairs._replace(embedding=torch.eye(8)[:4])).total.isfinite()
    with pytest.raises(ValueError, match="embedded_at is 32, and the batch has images of 16 px and no emb"):
        made(pairs)
    alone = BASE.but(net=BASE.net.but(embedding_width=0), from_draft=False)
    with pytest.raises(ValueError, match="embedded_at is of image embeddings, but"):
        alone.but(embedded_at=32)


def test_a_variation_by_the_base_stays_the_nearer_the_fewer_steps_it_takes() -> None:
    known = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    how = FAST.but(num_steps=20, guidance_scale=1.0, eta=0.0)
    spec = BASE.but(
        predicts="eps", from_draft=False
    )  # the estimate of an untrained one is near x where there is little noise
    far = [
        (drawn(spec, asked([1], "a star", known=known), how.but(strength=s)) - known).square().mean().item()
        for s in (0.05, 0.6, 1.0)
    ]
    assert far[0] < 0.25 * far[1]
    assert far[0] < 0.25 * far[2]
    with pytest.raises(ValueError, match="needs the picture that it is of"):
        drawn(BASE, asked([1], "a star"), how.but(strength=0.5))


def test_what_is_known_comes_through_an_edit_untouched() -> None:
    known = torch.rand(1, 3, 64, 64).mul(255).round().div(127.5) - 1
    hole = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    hole[..., 32:] = True
    how = FAST.but(inpainting="projection")
    image = drawn(UPSAMPLER, asked([1], "a star", known=known, hole=hole), how)
    torch.testing.assert_close(image[..., :32], known[..., :32], atol=1e-6, rtol=0)
    assert not torch.equal(image[..., 32:], known[..., 32:])


@pytest.mark.parametrize(
    ("spec", "side"),
    [(BASE.but(predicts="eps", from_draft=False), 16), (UPSAMPLER, 64)],  # untrained these hear x too
    ids=["base", "upsampler"],
)
def test_what_a_hole_hides_has_no_part_in_the_picture(spec: BaseSpec | UpsamplerSpec, side: int) -> None:
    known = torch.zeros(1, 3, side, side)
    hole = torch.zeros(1, 1, side, side, dtype=torch.bool)
    hole[..., side // 2 :] = True
    how = FAST.but(inpainting="projection")
    hidden = [
        drawn(spec, asked([1], "a star", known=known.masked_fill(hole, value), hole=hole), how)
        for value in (-1, 1)
    ]
    assert torch.equal(*hidden)


def test_info_nce_of_a_perfect_match_is_zero_and_equal_captions_are_no_negatives() -> None:
    eye, scale = torch.eye(4), torch.tensor(100.0)
    assert losses.info_nce(eye, eye, scale, torch.eye(4, dtype=torch.bool)) < 1e-6
    twins = eye[[0, 0, 2, 3]]
    same = (twins @ twins.T).bool()
    assert losses.info_nce(twins, twins, scale, same) < 1e-6
    assert losses.info_nce(twins, twins, scale, torch.eye(4, dtype=torch.bool)) > 0.3


def test_a_missing_or_wrong_parent_is_named() -> None:
    with pytest.raises(ValueError, match="base: needs the parent 'clip'"):
        build_stage(BASE, {})
    with pytest.raises(ValueError, match="the parent 'clip' is a BaseSpec, it must be a CLIP"):
        build_stage(PRIOR, {"clip": Trained(BASE, {})})
    with pytest.raises(ValueError, match="ClipSpec is no link of a cascade"):
        load_hop(Trained(CLIP, {}), {}, device="cpu")


@pytest.mark.parametrize(
    ("spec", "wrong", "remedy"),
    [
        (BASE, {"sigma_min": 100.0}, "sigma_min 100.0 must be below sigma_max 80.0"),
        (PRIOR, {"sigma_min": 80.0}, "sigma_min 80.0 must be below sigma_max 80.0"),
        (UPSAMPLER, {"sigma_max": 0.01}, "sigma_min 0.02 must be below sigma_max 0.01"),
        (BASE, {"weight_range": (5.0, 0.05)}, r"weight_range \(5.0, 0.05\) .* must not fall"),
        (UPSAMPLER, {"weight_range": (-1.0, 5.0)}, r"weight_range \(-1.0, 5.0\) must be at least 0"),
        (UPSAMPLER, {"factor": 3}, "image_size 64 must divide by factor 3"),
        (UPSAMPLER, {"crop": 128}, "crop 128 is larger than image_size 64"),
        (UPSAMPLER, {"crop": 18}, "crop 18 must divide by 4"),
    ],
)
def test_a_spec_that_could_not_be_trained_or_sampled_says_what_would_do(
    spec: StageSpec, wrong: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        spec.but(**wrong)


@pytest.mark.parametrize(
    ("net", "wrong", "remedy"),
    [
        (BASE.net, {"head_width": 12}, "width 16 must divide by head_width 12"),
        (BASE.net, {"conv_width": 56}, "conv_width 56 does not split into 3 groups; take 64"),
        (BASE.net, {"image_size": 18}, "image_size 18 must divide by 4, twice the stem"),
        (BASE.net, {"text_width": 0}, "caption_width without text_width tells no caption"),
        (PRIOR.net, {"head_width": 12}, "width 16 must divide by head_width 12"),
    ],
)
def test_sizes_that_make_no_network_are_refused_before_it_is_made(
    net: DiTSpec | PriorNetSpec, wrong: dict[str, int], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        net.but(**wrong)


def test_cosines_are_those_of_float32_under_autocast() -> None:
    image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=1) for _ in range(2))
    same, scale = torch.eye(8, dtype=torch.bool), torch.tensor(100.0)
    expected = losses.info_nce(image, text, scale, same), losses.found(image, text, same)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.info_nce(image, text, scale, same), losses.found(image, text, same)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("spec", [CLIP, NoisedClipSpec(net=CLIP.net)], ids=lambda spec: spec.kind)
def test_the_factor_of_cosines_ends_at_a_hundred_and_can_leave_it_again(spec: StageSpec) -> None:
    stage = build_stage(spec, parents(spec))
    clip = isinstance(stage, ClipStage)
    scale: Tensor = stage.model.towers.logit_scale if clip else stage.model.log_scale  # type: ignore[assignment]
    scale.data.fill_(5.0)
    stage.after_step()
    assert scale.exp().item() == pytest.approx(100)
    image = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    stage(PairBatch(image, torch.tensor(tokens(list("abcdefgh"), 12)))).total.backward()
    assert scale.grad is not None
    assert scale.grad > 0  # pictures without meaning: it is to fall
