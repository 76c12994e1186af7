"""The published prior as a stage: it measures, learns, resumes, and keeps the nearer of two draws."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import checkpoint, images, schedules
from dd_core.cascade import CascadeState, run
from dd_core.guidance import stack
from dd_core.layouts.published import Process
from dd_core.nets.network import build
from dd_core.nets.prior import CausalPriorSpec
from dd_core.samplers import SamplingSpec, sample
from dd_core.stage import Budget, OptimizerSpec, PairBatch, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.causal_prior import CausalPriorHop, CausalPriorStage, CausalPriorStageSpec
from dd_core.stages.clip import clip_of
from dd_core.stages.network import NetworkSpec
from dd_core.text import tokens
from dd_core.training import TrainState, train
from tests.unit.dd_core import test_chain

LENGTH = 8
CLIP = test_chain.CLIP.but(net=test_chain.CLIP.net.but(context_length=LENGTH))
SPEC = CausalPriorStageSpec(
    net=CausalPriorSpec(width=32, layers=2, heads=2, context_length=LENGTH, embedding_width=16),
    image_size=16,
    measured_images=20,
)
HOW = SamplingSpec(sampler="ddpm", variance="fixed_small", num_steps=10, spacing="linspace", draws=2)
OPTIMIZER = OptimizerSpec(learning_rate=5e-3, warmup_steps=2, ema_images=400, precision="fp32")


def test_a_prior_that_would_end_in_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not at schedule\.last first; leave that out"):
        SPEC.but(schedule=SPEC.schedule.but(last="first"))


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, LENGTH))


def pictures(seed: int = 0, count: int = 8) -> Iterator[PairBatch]:
    """Noisy red or blue pictures and their captions."""
    generator = torch.Generator().manual_seed(seed)
    captions = told("a red square", "a blue square")
    while True:
        blue = torch.randint(0, 2, (count,), generator=generator)
        image = torch.randint(0, 40, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
        image[torch.arange(count), 2 * blue] += 200
        yield PairBatch(image, captions[blue])


def steps(state: TrainState, count: int, of: int) -> list[float]:
    """The losses of some steps, from where the training is."""
    data = itertools.islice(pictures(), state.step, None)
    budget = Budget(steps=of, checkpoint_every=1)
    reports = train(state, data, optimizer=OPTIMIZER, budget=budget)
    return [float(report.metrics["loss"]) for report in itertools.islice(reports, count)]


@pytest.fixture(scope="module")
def clip() -> Trained:
    """Not trained: its pictures and captions lie close together, but each picture where it always lies."""
    torch.manual_seed(0)
    model = build_stage(CLIP, {}).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return Trained(CLIP, model.state_dict())


def stage(clip: Trained, **parents: Trained) -> CausalPriorStage:
    torch.manual_seed(1)
    made = build_stage(SPEC, {"clip": clip, **parents})
    assert isinstance(made, CausalPriorStage)
    return made


def hop(clip: Trained, weights: dict[str, Tensor]) -> CausalPriorHop:
    made = load_hop(Trained(SPEC, weights), {"clip": clip}, device="cpu")
    assert isinstance(made, CausalPriorHop)
    return made


def asked(seeds: list[int], *captions: str) -> CascadeState:
    return CascadeState(seeds=seeds, tokens=told(*captions))


def test_embeddings_are_whitened_by_those_first_seen_and_come_back(clip: Trained) -> None:
    made, towers = stage(clip), clip_of(clip)
    batches = list(itertools.islice(pictures(), 3))
    losses = [float(made(batch).total.detach()) for batch in batches]
    assert losses == [0, 0, 0]  # 24 of 20 were looked at
    assert float(made(batches[0]).total.detach()) > 0.1
    net = made.model.network
    seen = torch.cat([towers.embed_image(images.to_unit(batch.image)) for batch in batches])
    white = net.whitened(seen)
    torch.testing.assert_close(white.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.std(0, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(net.coloured(white), seen)


@pytest.mark.parametrize("cut", [2, 4])
def test_a_resumed_training_measures_and_learns_the_same(clip: Trained, cut: int, tmp_path: Path) -> None:
    whole = TrainState(stage(clip), OPTIMIZER)
    curve = steps(whole, 6, of=6)
    first = TrainState(stage(clip), OPTIMIZER)
    head = steps(first, cut, of=6)
    checkpoint.write(tmp_path / "c", first.tensors(), {"step": first.step, "images": first.images})
    torch.manual_seed(99)
    second = TrainState(build_stage(SPEC, {"clip": clip}), OPTIMIZER)
    tensors = second.tensors()
    second.restored(tensors, **checkpoint.read(tmp_path / "c", tensors))
    assert head + steps(second, 6 - cut, of=6) == curve
    ours, theirs = second.tensors(), whole.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_errors_are_averaged_where_they_were_made_and_old_ones_are_forgotten(clip: Trained) -> None:
    model, table = stage(clip).model, schedules.sigmas(SPEC.schedule)
    stream = torch.Generator().manual_seed(0)

    def x0_variance(t: int) -> float:
        cond = model.network.read(torch.zeros(1, LENGTH, 16), torch.zeros(1, 16))
        found = model(torch.zeros(1, 16), table[[t]].float(), cond).x0_variance
        assert found is not None
        return float(found)

    for scale in (9.0, 1.0):  # errors of data N(0, 1), at first nine times as large
        for _ in range(60):
            t = torch.randint(1000, (128,), generator=stream)
            sigma = table[t]
            noise = 0.8 + 0.4 * torch.rand(128, generator=stream)
            told = torch.rand(128, generator=stream) < 0.9
            error = torch.where(told, scale * noise, 1e6) * sigma**2 / (1 + sigma**2)
            model.measure(t, sigma, error, told)
    for t in (30, 500, 970):
        exact = float(table[t] ** 2 / (1 + table[t] ** 2))
        assert x0_variance(t) == pytest.approx(exact, rel=0.6)  # all of it would be 5 times too large
        assert x0_variance(t) > 0.9 * exact


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_is_not_taken_in(clip: Trained, error: float) -> None:
    model, t = stage(clip).model, torch.tensor([10, 500, 990])
    sigma, told = schedules.sigmas(SPEC.schedule)[t], torch.ones(3, dtype=torch.bool)
    model.measure(t, sigma, torch.tensor([1.0, error, 1.0]), told)
    model.measure(t[[0, 2]], sigma[[0, 2]], torch.ones(2), told[:2])
    assert model.errors.isfinite().all()
    assert int((model.counts > 0).sum()) == 2


@pytest.mark.slow
def test_how_wrong_it_is_was_measured_in_training_and_is_the_variance_it_is_sampled_with(
    clip: Trained,
) -> None:
    state = TrainState(stage(clip), OPTIMIZER)
    steps(state, 160, of=160)
    made, towers = hop(clip, state.average), clip_of(clip)
    data = next(pictures(seed=5, count=400))
    x0 = made.model.network.whitened(towers.embed_image(images.to_unit(data.image)))
    cond, table = made.told(data.tokens), schedules.sigmas(SPEC.schedule).float()
    for t in (100, 400, 700, 900):
        sigma = table[t].expand(len(x0))
        answer = made.model(x0 + table[t] * torch.randn_like(x0), sigma, cond)
        assert answer.x0_variance is not None
        error = float((answer.x0 - x0).square().mean())
        assert 0.6 * error < float(answer.x0_variance[0]) < 1.8 * error, t  # while it still learned
    words = ["a red square", "a blue square"] * 60
    spread_of = {}
    for variance in ("analytic", "fixed_small"):
        how = HOW.but(variance=variance, num_steps=4, guidance_scale=1.0, draws=1)
        draw = made.start(asked(list(range(120)), *words), how)
        spread_of[variance] = sample(draw.sampling, made.denoiser(draw.rows)).var(0).mean()
    assert abs(spread_of["analytic"] - 1) < abs(spread_of["fixed_small"] - 1), spread_of


@pytest.mark.slow
def test_it_draws_embeddings_that_go_with_their_captions(clip: Trained) -> None:
    state = TrainState(stage(clip), OPTIMIZER)
    curve = steps(state, 160, of=160)
    assert sum(curve[-10:]) < 0.9 * sum(curve[4:14])
    made = hop(clip, state.average)
    data, words = next(pictures(seed=3, count=64)), ["a red square", "a blue square"]
    white = made.model.network.whitened(made.clip.embed_image(images.to_unit(data.image)))
    red = (data.tokens == told(words[0])).all(1)
    centres = torch.stack([white[red].mean(0), white[~red].mean(0)])
    found = run(made, asked([1, 2, 3, 4], *words, *words), HOW.but(guidance_scale=1.0)).image_embedding
    assert found is not None
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    apart = torch.cdist(made.model.network.whitened(found), centres)
    assert (apart.argmin(1) == torch.tensor([0, 1, 0, 1])).all(), apart


def test_of_two_draws_the_nearer_is_kept_and_rows_do_not_mix(clip: Trained) -> None:
    made = stage(clip)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    hopped = hop(clip, made.model.state_dict())
    draw = hopped.start(asked([5], "a red square"), HOW)
    both = torch.nn.functional.normalize(sample(draw.sampling, hopped.denoiser(draw.rows)), dim=1)
    wanted = hopped.clip.read(told("a red square")).embedding[0]
    kept = run(hopped, asked([5], "a red square"), HOW).image_embedding
    assert kept is not None
    torch.testing.assert_close(kept[0], both[int((both @ wanted).argmax())])
    pair = [hopped.start(asked([seed], word), HOW) for seed, word in ((5, "a red square"), (6, "two"))]
    x, sigma = torch.randn(4, 16), torch.tensor([2.0, 2.0, 0.5, 0.5])
    together = hopped.denoiser(stack([one.rows for one in pair]))(x, sigma).x0
    alone = hopped.denoiser(pair[1].rows)(x[2:], sigma[2:]).x0
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-4)


def test_weights_start_it_with_their_own_mean_and_deviation(clip: Trained) -> None:
    before = stage(clip).model
    before.network.mean.fill_(0.25)
    before.network.std.fill_(3.0)
    before.counts.fill_(1.0)
    made = stage(clip, start=Trained(SPEC, before.state_dict()))
    assert float(made(next(pictures())).total.detach()) > 0  # nothing is measured first
    hopped = hop(clip, stage(clip, start=Trained(SPEC, before.state_dict())).model.state_dict())
    with pytest.raises(ValueError, match="errors of this prior have not been measured at all noise levels"):
        hopped.start(asked([1], "a"), HOW.but(variance="analytic"))  # other weights will err otherwise
    assert torch.equal(made.model.network.mean, before.network.mean)
    assert torch.equal(made.model.network.out.weight, before.network.out.weight)


def test_karlos_prior_whose_embeddings_are_no_unit_vectors_is_no_start(clip: Trained) -> None:
    spec = NetworkSpec(source="karlo-prior", net=SPEC.net, process=Process(schedule="cosine", predicts="x0"))
    with pytest.raises(ValueError, match=r"karlo-prior, which .* unit vectors; leave start out"):
        stage(clip, start=Trained(spec, build(SPEC.net).state_dict()))


def test_a_prior_of_other_heads_or_another_chain_is_no_start(clip: Trained) -> None:
    weights = stage(clip).model.state_dict()
    for other, said in (
        (SPEC.but(net=SPEC.net.but(heads=4)), r"net\.heads is 4 there and 2 here"),
        (SPEC.but(schedule=schedules.ScheduleSpec()), r"schedule\.betas is 'linear' there and 'cosine' here"),
    ):
        with pytest.raises(ValueError, match=said):
            stage(clip, start=Trained(other, weights))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"variance": "learned"}, "set variance: analytic or fixed_small"),
        (
            {"sampler": "ddim", "variance": "learned", "spacing": "ddim_leading", "num_steps": 300},
            "no whole stride",
        ),
        ({"gradient": {"classes": 1.0}}, "leave its gradient out"),
    ],
)
def test_what_it_cannot_do_is_refused(clip: Trained, how: dict[str, object], said: str) -> None:
    hopped = hop(clip, stage(clip).model.state_dict())
    with pytest.raises(ValueError, match=said):
        hopped.start(asked([1], "a"), SamplingSpec.model_validate(HOW.model_dump() | how))


def test_another_clip_is_refused(clip: Trained) -> None:
    wide = SPEC.but(net=SPEC.net.but(embedding_width=8))
    with pytest.raises(
        ValueError, match=r"width is 8, net.text_width of its parent clip is 16; .* kind prior"
    ):
        build_stage(wide, {"clip": clip})
    with pytest.raises(
        ValueError, match=r"net.context_length is 9, net.context_length of its parent clip is 8;"
    ):
        build_stage(SPEC.but(net=SPEC.net.but(context_length=9)), {"clip": clip})
