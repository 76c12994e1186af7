"""The autoregressive prior: what is written reads back, no code hears a later one, draws are fair."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core import checkpoint, embeddings, images
from dd_core.cascade import CascadeState, run
from dd_core.nets.code_prior import CodePrior, CodePriorSpec
from dd_core.samplers import SamplingSpec, sample
from dd_core.stage import Budget, OptimizerSpec, PairBatch, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.autoregressive_prior import (
    AutoregressivePriorHop,
    AutoregressivePriorSpec,
    AutoregressivePriorStage,
)
from dd_core.stages.clip import clip_of
from dd_core.text import tokens
from dd_core.training import TrainState, train
from tests.unit.dd_core.test_stages import CLIP

SPEC = AutoregressivePriorSpec(
    net=CodePriorSpec(
        width=16,
        layers=1,
        head_width=8,
        text_width=16,
        embedding_width=8,
        context_length=12,
        axes=6,
        buckets=32,
    ),
    image_size=16,
    measured_images=20,
)
OPTIMIZER = OptimizerSpec(learning_rate=5e-3, precision="fp32", warmup_steps=2, ema_images=400)
PLAIN = SamplingSpec(guidance_scale=1.0, draws=2)


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, 12))


def unit(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def pictures(count: int = 8) -> Iterator[PairBatch]:
    """Noisy red or blue pictures and their captions."""
    generator = torch.Generator().manual_seed(0)
    captions = told("a red square", "a blue square")
    while True:
        blue = torch.randint(0, 2, (count,), generator=generator)
        image = torch.randint(0, 40, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
        image[torch.arange(count), 2 * blue] += 200
        yield PairBatch(image, captions[blue])


@pytest.fixture(scope="module")
def clip() -> Trained:
    torch.manual_seed(0)
    return Trained(CLIP, build_stage(CLIP, {}).model.state_dict())


def network(spec: CodePriorSpec = SPEC.net) -> CodePrior:
    """Axes found, no weight at rest."""
    torch.manual_seed(1)
    net = CodePrior(spec)
    net.measure(embeddings.fit_pca(unit(500), spec.axes), torch.linspace(-0.2, 0.6, 500))
    return net.eval().requires_grad_(False)


def hop(clip: Trained, net: CodePrior | None = None) -> AutoregressivePriorHop:
    made = load_hop(Trained(SPEC, (net or network()).state_dict()), {"clip": clip}, device="cpu")
    assert isinstance(made, AutoregressivePriorHop)
    return made


def drawn(made: AutoregressivePriorHop, state: CascadeState, how: SamplingSpec) -> Tensor:
    """Both draws of each caption, before the choice."""
    draw = made.start(state, how)
    return sample(draw.sampling, made.denoiser(draw.rows))


def test_an_embedding_written_reads_back_to_half_a_bucket_on_each_axis() -> None:
    net, seen = network(SPEC.net.but(axes=8, buckets=1024)), unit(500)
    back = net.embedding(net.codes(seen))
    half = (net.high - net.low) / 1024 / 2
    apart = ((back - seen) @ net.main).abs()
    assert (apart <= 1.01 * half + 1e-6).all()
    assert (F.cosine_similarity(back, seen) > 0.9999).all()
    coarse = network(SPEC.net.but(axes=8, buckets=4))
    assert (F.cosine_similarity(coarse.embedding(coarse.codes(seen)), seen) < 0.9999).any()


def test_no_code_hears_a_later_one_and_each_hears_all_before() -> None:
    net = network()
    caption = torch.randn(1, 13, 16)
    codes = torch.randint(0, 32, (1, 5), generator=torch.Generator().manual_seed(0))
    product = torch.tensor([20])
    plain = net(caption, product, codes)
    for place in range(5):
        other = codes.clone()
        other[0, place] = (other[0, place] + 16) % 32
        changed = (net(caption, product, other) - plain).abs().amax(-1)[0] > 1e-6
        assert changed.tolist() == [False] * (place + 1) + [True] * (5 - place)
    for other_told in (net(caption.roll(1, -1), product, codes), net(caption, product - 9, codes)):
        assert ((other_told - plain).abs().amax(-1) > 1e-6).all()
    assert torch.allclose(net(caption, product, codes[:, :2]), plain[:, :3], atol=1e-5)


def test_a_sentence_read_code_by_code_says_what_it_says_when_read_at_once() -> None:
    net = network()
    caption = torch.randn(3, 13, 16)
    codes = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(0))
    product, memories = torch.tensor([20, 3, 31]), net.memories()
    found = [net.logits(net.begin(caption, product), memories)[:, -1:]]
    found += [net.logits(net.said(codes[:, i : i + 1]), memories) for i in range(5)]
    assert [memory.length for memory in memories] == [13 + 1 + 5] * len(memories)
    torch.testing.assert_close(torch.cat(found, 1), net(caption, product, codes), atol=1e-5, rtol=1e-5)


def test_codes_are_drawn_as_the_network_says(clip: Trained) -> None:
    """Whatever it hears, this one says the same of every code."""
    net, logits = network(), torch.linspace(-2, 2, 32)
    net.out.weight.zero_()
    net.out.bias.copy_(logits)
    made = hop(clip, net)
    count = 1500
    state = CascadeState(seeds=list(range(count)), tokens=told("a star").expand(count, -1))
    for scale in (1.0, 3.0):  # guided by nothing, as both captions say the same
        codes = net.codes(drawn(made, state, SamplingSpec(guidance_scale=scale, draws=2)))
        shares = codes.flatten().bincount(minlength=32) / codes.numel()
        torch.testing.assert_close(shares, logits.softmax(0), atol=0.01, rtol=0)


def test_the_nearness_asked_for_is_of_the_nearer_half(clip: Trained) -> None:
    net = network()
    net.products.zero_()
    net.products[[3, 10, 20, 30]] = torch.tensor([4, 8, 6, 2])
    codes = hop(clip, net).near(torch.randn(40_000, generator=torch.Generator().manual_seed(0)))
    shares = codes.bincount(minlength=32) / len(codes)
    expected = torch.zeros(32)
    expected[[10, 20, 30]] = torch.tensor([0.2, 0.6, 0.2])  # 2, 6 and 2 of the upper ten
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)


def test_at_scale_zero_no_caption_is_heard_and_at_one_no_negative(clip: Trained) -> None:
    made = hop(clip)
    one, other = (
        CascadeState(seeds=[1, 2, 3], tokens=told(*[text] * 3)) for text in ("a red", "a blue star")
    )
    deaf = SamplingSpec(guidance_scale=0.0)
    assert torch.equal(drawn(made, one, deaf), drawn(made, other, deaf))
    assert not torch.equal(drawn(made, one, PLAIN), drawn(made, other, PLAIN))
    negative = one._replace(negative=other.tokens)
    assert torch.equal(drawn(made, one, PLAIN), drawn(made, negative, PLAIN))
    loud = SamplingSpec(guidance_scale=20.0)
    assert not torch.equal(drawn(made, one, loud), drawn(made, negative, loud))


def test_a_seed_gives_the_same_embedding_alone_and_in_company(clip: Trained) -> None:
    made, how = hop(clip), SamplingSpec(guidance_scale=2.0, draws=2)
    captions = told("a red circle", "a blue star", "a cross")
    together = run(made, CascadeState(seeds=[5, 6, 7], tokens=captions), how).image_embedding
    alone = run(made, CascadeState(seeds=[6], tokens=captions[1:2]), how).image_embedding
    assert together is not None
    assert alone is not None
    torch.testing.assert_close(together[1:2], alone)
    first, second = drawn(made, CascadeState(seeds=[6], tokens=captions[1:2]), how)
    assert not torch.equal(first, second)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(1))


def stage(clip: Trained, spec: AutoregressivePriorSpec = SPEC) -> AutoregressivePriorStage:
    torch.manual_seed(2)
    made = build_stage(spec, {"clip": clip})
    assert isinstance(made, AutoregressivePriorStage)
    return made


def steps(state: TrainState, last: int, *, of: int) -> list[float]:
    supply = itertools.islice(pictures(), state.step, None)
    reports = train(state, supply, optimizer=OPTIMIZER, budget=Budget(steps=of, checkpoint_every=999))
    return [report.read()["loss"] for report in itertools.islice(reports, last - state.step)]


def test_it_looks_before_it_learns_and_ships_the_axes_it_found(clip: Trained) -> None:
    made = stage(clip)
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    state = TrainState(made, OPTIMIZER)
    curve = steps(state, 3, of=8)  # 3 x 8 images, of which 20 are measured
    assert curve == [0.0, 0.0, 0.0]
    assert all(torch.equal(before[name], value) for name, value in made.model.named_parameters())
    first = torch.cat([one.image for one in itertools.islice(pictures(), 3)])[:20]
    seen = clip_of(clip).embed_image(images.to_unit(first))
    expected = embeddings.fit_pca(seen, 6)
    torch.testing.assert_close(made.model.main, expected.axes, atol=1e-4, rtol=0)
    torch.testing.assert_close(made.model.low, expected.low, atol=1e-5, rtol=0)
    assert made.model.products.sum() == 20
    assert all(loss > 0 for loss in steps(state, 8, of=8))
    weights = made.model.state_dict()
    for name in ("mean", "main", "low", "high", "products"):
        assert torch.equal(state.average[name], weights[name])
    assert not torch.equal(state.average["out.weight"], weights["out.weight"])


@pytest.mark.parametrize("cut", [2, 5])
def test_a_resumed_training_finds_the_same_axes_and_weights(clip: Trained, cut: int, tmp_path: Path) -> None:
    whole = TrainState(stage(clip), OPTIMIZER)
    curve = steps(whole, 7, of=7)
    first = TrainState(stage(clip), OPTIMIZER)
    head = steps(first, cut, of=7)
    checkpoint.write(tmp_path / "c", first.tensors(), {"step": first.step, "images": first.images})
    torch.manual_seed(99)
    second = TrainState(build_stage(SPEC, {"clip": clip}), OPTIMIZER)
    tensors = second.tensors()
    second.restored(tensors, **checkpoint.read(tmp_path / "c", tensors))
    assert head + steps(second, 7, of=7) == curve
    ours, theirs = second.tensors(), whole.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_weight_can_learn(clip: Trained) -> None:
    made = stage(clip)
    made.model.measure(embeddings.fit_pca(unit(500), 6), torch.linspace(-0.2, 0.6, 500))
    made.count.fill_(20)
    made(next(pictures())).total.backward()
    assert [name for name, p in made.model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.slow
def test_it_learns_which_embeddings_go_with_which_caption() -> None:
    torch.manual_seed(0)
    towers = TrainState(build_stage(CLIP, {}), OPTIMIZER)
    steps(towers, 60, of=60)
    clip = Trained(CLIP, towers.average)
    spec = SPEC.but(measured_images=64, net=SPEC.net.but(buckets=8))  # so coarse that all are as near
    state = TrainState(stage(clip, spec), OPTIMIZER)
    curve = steps(state, 150, of=150)
    assert sum(curve[-10:]) < 0.92 * sum(curve[10:20])  # most of it is the pictures' noise
    made = load_hop(Trained(spec, state.average), {"clip": clip}, device="cpu")
    captions = told("a red square", "a blue square")
    asked = CascadeState(seeds=list(range(16)), tokens=captions.repeat_interleave(8, 0))
    found = run(made, asked, PLAIN).image_embedding
    assert found is not None
    image = torch.full((2, 3, 16, 16), 20, dtype=torch.uint8)
    image[0, 0], image[1, 2] = 220, 220
    truth = clip_of(clip).embed_image(images.to_unit(image))
    right = (found @ truth.T).argmax(1) == torch.arange(2).repeat_interleave(8)
    assert right.float().mean() > 0.9


def test_what_cannot_be_used_is_refused_with_what_to_do(clip: Trained) -> None:
    with pytest.raises(ValueError, match="so it has no axes; train it longer"):
        load_hop(Trained(SPEC, CodePrior(SPEC.net).state_dict()), {"clip": clip}, device="cpu")
    with pytest.raises(ValueError, match="axes 9 must be at most embedding_width 8"):
        SPEC.net.but(axes=9)
    with pytest.raises(ValueError, match="too few for 6 axes; take 12 or more"):
        SPEC.but(measured_images=11)
    state = CascadeState(seeds=[1], tokens=told("a star"))
    with pytest.raises(ValueError, match="has no noise levels"):
        hop(clip).start(state, SamplingSpec(guidance_interval=(0.0, 1.0)))
    with pytest.raises(ValueError, match="autoregressive_prior: needs the parent 'clip'"):
        build_stage(SPEC, {})
