"""The consistency stage: its paths, what it follows, what it is after training, and Algorithm 4's edits."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dd_core import checkpoint, consistency, edits
from dd_core.cascade import CascadeState, Draw, run
from dd_core.consistency import Cut, ended, following, heun_down
from dd_core.denoiser import (
    Conditioning,
    Denoised,
    NetworkDenoiser,
    Parameterization,
    Tell,
    consistency_time,
    input_scale,
    output_from,
)
from dd_core.guidance import clip_x0, rows_of
from dd_core.nets.dit import DiTSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.perceptual import ClipFeatures, Lpips, load_lpips
from dd_core.nets.unet import UNetSpec
from dd_core.noise import SeededNoise, karras_sigmas, spread
from dd_core.samplers import SamplingSpec, ddim, heun, sample
from dd_core.schedules import Clock, LogNormalSpec, ScheduleSpec
from dd_core.stage import Budget, Example, Losses, OptimizerSpec, PairBatch, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.base import BaseHop, BaseSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import clip_of
from dd_core.stages.consistency import (
    ConsistencySpec,
    ConsistencyStage,
    FixedLevels,
    GrowingLevels,
    TeacherSpec,
    bound,
)
from dd_core.stages.consistency_hop import ConsistencyHop
from dd_core.text import null_tokens, tokens
from dd_core.training import TrainState, train
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.test_stages import CLIP

STD = 0.5
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
        embedding_width=8,
    ),
    image_size=16,
    sigma_min=0.1,
)
SPEC = ConsistencySpec(base=BASE, teacher=TeacherSpec(guidance_scale=2.0), levels=FixedLevels(num_levels=8))
ALONE = SPEC.but(teacher=None, levels=GrowingLevels(steps=10, s1=20))
UNET = UNetSpec(
    width=16,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_at=(),
    attention_in_middle=False,
    groups=4,
    level_scale=1,
)
EDM = ChainSpec(
    net=PlainSpec(unet=UNET.but(labels=2, dropout=0.1)),
    image_size=16,
    schedule=LogNormalSpec(),
    predicts="edm",
    told_dropout=0.0,
)
"""The published teacher, small: told one of two classes."""
TIMED = EDM.but(schedule=ScheduleSpec(), predicts="v")
JUMPING = ConsistencySpec(
    base=EDM.but(net=PlainSpec(unet=UNET.but(labels=2))),
    teacher=TeacherSpec(guidance_scale=1.0),
    levels=FixedLevels(num_levels=8, mu=0.9),
)
"""The published student, small: without dropout."""
OPTIMIZER = OptimizerSpec(learning_rate=3e-3, precision="fp32", warmup_steps=5, ema_images=300)
JUMPS = SamplingSpec(sampler="consistency", num_steps=2, guidance_scale=1.0)


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, 12))


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """No weight left at zero, so that everything that is told may matter."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model.state_dict()


@pytest.fixture(scope="module")
def parents() -> dict[str, Trained]:
    torch.manual_seed(0)
    clip = Trained(CLIP, random_weights(build_stage(CLIP, {}).model))
    return {"clip": clip, "base": Trained(BASE, random_weights(build_stage(BASE, {"clip": clip}).model))}


@pytest.fixture(scope="module")
def edm() -> dict[str, Trained]:
    torch.manual_seed(2)
    return {"base": Trained(EDM, random_weights(build_stage(EDM, {}).model))}


def made(spec: ConsistencySpec, parents: dict[str, Trained]) -> ConsistencyStage:
    torch.manual_seed(1)
    stage = build_stage(spec, parents)
    assert isinstance(stage, ConsistencyStage)
    return stage


def hop(parents: dict[str, Trained]) -> ConsistencyHop:
    found = load_hop(Trained(SPEC, parents["base"].weights), parents, device="cpu")
    assert isinstance(found, ConsistencyHop)
    return found


def squares(count: int = 8) -> Iterator[PairBatch]:
    """A red or a blue square somewhere on grey, its caption, and its class."""
    generator = torch.Generator().manual_seed(0)
    captions = told("a red square", "a blue square")
    while True:
        blue = torch.randint(0, 2, (count,), generator=generator)
        image = torch.full((count, 3, 16, 16), 60, dtype=torch.uint8)
        for place, (y, x) in enumerate(torch.randint(0, 9, (count, 2), generator=generator).tolist()):
            image[place, 2 * int(blue[place]), y : y + 8, x : x + 8] = 240
        yield PairBatch(image, captions[blue], blue)


def posterior(x: Tensor, sigma: Tensor) -> Denoised:
    """The exact denoiser of N(0, STD**2)."""
    return Denoised(x * STD**2 / (STD**2 + spread(sigma, x) ** 2))


class Gains(nn.Module):
    """A network that can do nothing but multiply what has unit variance, by another number at every level."""

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.grid, self.gain = grid, nn.Parameter(torch.ones_like(grid))

    def forward(self, x: Tensor, sigma: Tensor) -> Denoised:
        place = (self.grid - sigma[:, None]).abs().argmin(1)
        return Denoised(spread(self.gain[place] / (STD**2 + sigma**2).sqrt(), x) * x)


class Exact(nn.Module):
    """The network of N(0, STD**2) that answers what `predicts` says, told `tell` of sigma."""

    def __init__(self, predicts: Parameterization, tell: Tell) -> None:
        super().__init__()
        self.predicts, self.sigmas = predicts, torch.logspace(-2.3, 2.3, 4000, dtype=torch.float64)
        self.told = tell(self.sigmas).double()

    def forward(self, scaled: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
        place = torch.searchsorted(self.told, told.double()).clamp(1, len(self.told) - 1)
        low, high = self.told[place - 1], self.told[place]
        sigma = torch.lerp(self.sigmas[place - 1], self.sigmas[place], (told - low) / (high - low))
        x = scaled / spread(input_scale(self.predicts, sigma), scaled)
        return output_from(self.predicts, posterior(x, sigma).x0, x, spread(sigma, x))


TEACHERS: dict[str, tuple[Parameterization, Tell]] = {
    "edm": ("edm", consistency_time),
    "eps on timesteps": ("eps", Clock(ScheduleSpec())),
    "v on timesteps": ("v", Clock(ScheduleSpec(betas="cosine"))),
}


@pytest.mark.parametrize(("name", "segments"), [*((name, 1) for name in TEACHERS), ("edm", 3)])
def test_distilling_the_exact_teacher_of_a_gaussian_gives_its_exact_consistency_function(
    name: str, segments: int
) -> None:
    """Where the path through x ends: at level 0 x STD / sqrt(STD**2 + sigma**2), or at its segment's end."""
    torch.manual_seed(0)
    predicts, tell = TEACHERS[name]
    teacher = bound(NetworkDenoiser(Exact(predicts, tell), predicts, tell=tell), Conditioning())
    count, low, high = 25, 0.05, 10.0
    grid = karras_sigmas(count - 1, sigma_min=low, sigma_max=high)[:-1]
    student, target = Gains(grid), Gains(grid)
    optimizer = torch.optim.SGD(student.parameters(), lr=8.0)
    cut, path = Cut(count, low, high, to_zero=True, segments=segments), following(teacher)
    for _ in range(250):
        x0 = STD * torch.randn(256, 4, dtype=torch.float64)
        pair = consistency.draw_pair(x0, cut)
        gap = consistency.distillation(student, ended(target), path, x0, pair, consistency.l2)
        optimizer.zero_grad()
        gap.mean().backward()
        optimizer.step()
        with torch.no_grad():
            target.gain.lerp_(student.gain, 0.5)
    each = len(grid) // segments
    ends = torch.cat([grid, torch.zeros(1)])[::each][1:].repeat_interleave(each)
    unit, left = (STD**2 + grid**2).sqrt(), ends / grid
    exact = unit * ((STD**2 + ends**2).sqrt() / unit - left) / (1 - left)
    torch.testing.assert_close(student.gain.detach(), exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("predicts", ["x0", "eps", "v", "edm"])
def test_at_level_zero_the_answer_is_what_was_shown(predicts: Parameterization) -> None:
    class Waves(nn.Module):
        def forward(self, x: Tensor, told: Tensor, cond: Conditioning) -> Tensor:
            return torch.sin(3 * x) + told[:, None] / 10

    denoise = NetworkDenoiser(Waves(), predicts)
    x = torch.randn(3, 5)

    def answer(x: Tensor, sigma: Tensor) -> Denoised:
        return denoise(x, sigma, Conditioning())

    assert torch.equal(ended(answer)(x, torch.zeros(3)).x0, x)
    some = torch.tensor([0.0, 0.3, 2.0])
    assert torch.equal(ended(answer)(x, some).x0[1:], answer(x[1:], some[1:]).x0)
    near = (answer(x, torch.full((3,), 1e-5)).x0 - x).abs().max()
    assert (near < 1e-3) == (predicts != "x0")  # the other parameterisations tend to it by themselves


def test_the_teachers_steps_are_those_of_the_heun_sampler_down_to_zero() -> None:
    grid = karras_sigmas(6, sigma_min=0.1, sigma_max=10.0)
    x = walked = 10 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for high, low in itertools.pairwise(grid):
        walked = sample(heun_down(walked, high.expand(2, 1), low.expand(2, 1)), posterior)
    torch.testing.assert_close(walked, sample(heun(x, grid), posterior))


@pytest.mark.parametrize("solver", ["heun", "ddim"])
def test_a_teacher_of_several_steps_walks_them_as_its_sampler(solver: consistency.Solver) -> None:
    grid = karras_sigmas(6, sigma_min=0.1, sigma_max=10.0)
    x = 10 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = heun(x, grid) if solver == "heun" else ddim(x, grid, SeededNoise([0, 1]))
    walked = following(posterior, solver)(x, grid.expand(2, -1))
    torch.testing.assert_close(walked, sample(sampler, posterior))


def test_levels_to_zero_are_as_many_and_their_last_is_zero() -> None:
    x = torch.zeros(500, 1, dtype=torch.float64)
    pair = consistency.draw_pair(x, Cut(5, sigma_min=0.1, sigma_max=10.0, to_zero=True))
    grid = karras_sigmas(4, sigma_min=0.1, sigma_max=10.0).tolist()
    assert set(zip(pair.high.tolist(), pair.low.tolist(), strict=True)) == set(itertools.pairwise(grid))


def test_the_teacher_is_followed_as_it_would_be_sampled(parents: dict[str, Trained]) -> None:
    """Guided at the spec's scale, then clipped: the denoiser of its own hop."""
    stage, teacher = made(SPEC, parents), load_hop(parents["base"], parents, device="cpu")
    assert isinstance(teacher, BaseHop)
    captions, embedding = told("a red circle", "a star"), torch.randn(2, 8)
    empty = torch.tensor([null_tokens(12)] * 2)
    cond, null = teacher.told(captions, embedding), teacher.told(empty, None)
    x = 3 * torch.randn(2, 3, 16, 16)
    example = Example(x, lambda _: cond, lambda _: null)
    rows = rows_of(SamplingSpec(guidance_scale=2.0), cond, null, 2)
    sigma = torch.tensor([3.0, 0.4])
    assert SPEC.teacher is not None
    with torch.no_grad():
        followed, sampled = stage.walker(SPEC.teacher, example)(x, sigma), teacher.denoiser(rows)(x, sigma)
    assert torch.equal(followed.x0, sampled.x0)


@pytest.mark.parametrize("spec", [SPEC, ALONE], ids=["distilled", "alone"])
def test_the_model_alone_is_trained_and_the_target_follows_it(
    spec: ConsistencySpec, parents: dict[str, Trained]
) -> None:
    stage = made(spec, parents)
    before = {name: value.clone() for name, value in stage.target.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in stage.model.state_dict().items())
    same = all(torch.equal(before[name], value) for name, value in parents["base"].weights.items())
    assert same == (spec.teacher is not None)
    state = TrainState(stage, OPTIMIZER)
    budget = Budget(steps=1, checkpoint_every=9)
    list(train(state, squares(), optimizer=OPTIMIZER, budget=budget))
    mu = spec.levels.at(torch.tensor(0)).mu
    for name, value in stage.model.state_dict().items():
        expected = mu * before[name] + (1 - mu) * value
        torch.testing.assert_close(stage.target.state_dict()[name], expected, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(before[name], value) for name, value in stage.model.state_dict().items())
    assert stage.steps == 1
    frozen = [p for parent in stage.frozen for p in parent.parameters()]
    assert all(p.grad is None for p in (*frozen, *stage.target.parameters()))
    assert set(state.average) == set(parents["base"].weights)


@pytest.mark.parametrize("predicts", ["eps", "v", "edm"])
def test_a_teacher_may_predict_what_it_likes(predicts: Parameterization, parents: dict[str, Trained]) -> None:
    """The last step of its path is its own estimate: there a student that starts as it has no gap."""
    base = BASE.but(predicts=predicts, sigma_max=10.0, caption_dropout=0.0, embedding_dropout=0.0)
    teacher = Trained(base, random_weights(build_stage(base, parents).model))
    spec = SPEC.but(base=base, teacher=TeacherSpec(guidance_scale=1.0))
    stage = made(spec, parents | {"base": teacher})
    batch = next(squares())
    example = stage.example(batch)
    x0 = example.x0
    assert spec.teacher is not None
    walker = stage.walker(spec.teacher, example)

    def student(x: Tensor, sigma: Tensor) -> Denoised:
        return clip_x0(bound(stage.model, example.told(stage.model.network)))(x, sigma)

    pair = consistency.draw_pair(x0, Cut(2, sigma_min=0.1, sigma_max=10.0, to_zero=True))
    gap = consistency.distillation(student, ended(student), following(walker), x0, pair, consistency.l2)
    assert gap.max() < 1e-10
    loss = stage(batch).total
    loss.backward()
    assert loss.isfinite()
    grads = [weight.grad for weight in stage.model.parameters() if weight.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)


def test_every_weight_of_the_model_can_learn(parents: dict[str, Trained]) -> None:
    base = BASE.but(net=BASE.net.but(caption_width=8))
    stage = build_stage(ALONE.but(base=base), {"clip": parents["clip"]})
    assert isinstance(stage, ConsistencyStage)
    random_weights(stage.model)
    stage(next(squares())).total.backward()
    still = [name for name, p in stage.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("spec", [ALONE, JUMPING], ids=["alone", "distilled from EDM"])
def test_the_steps_so_far_and_the_target_survive_a_restart(
    spec: ConsistencySpec, parents: dict[str, Trained], edm: dict[str, Trained], tmp_path: Path
) -> None:
    stands_on = edm if spec is JUMPING else parents

    def steps(state: TrainState, last: int) -> list[dict[str, float]]:
        supply = itertools.islice(squares(), state.step, None)
        reports = train(state, supply, optimizer=OPTIMIZER, budget=Budget(steps=6, checkpoint_every=9))
        return [report.read() for report in itertools.islice(reports, last - state.step)]

    whole = TrainState(made(spec, stands_on), OPTIMIZER)
    curve = steps(whole, 6)
    if spec.teacher is None:
        expected = [consistency.pace(k, 10, s0=2, s1=20, mu0=0.9).num_levels for k in range(6)]
        assert [int(one["levels"]) for one in curve] == expected
        assert expected[-1] > expected[0]
    first = TrainState(made(spec, stands_on), OPTIMIZER)
    head = steps(first, 3)
    facts = {"step": first.step, "images": first.images}
    checkpoint.write(tmp_path / "c", first.tensors(), facts)
    torch.manual_seed(99)  # a new process knows nothing
    second = TrainState(build_stage(spec, stands_on), OPTIMIZER)
    tensors = second.tensors()
    second.restored(tensors, **checkpoint.read(tmp_path / "c", tensors))
    assert head + steps(second, 6) == curve
    ours, theirs = second.tensors(), whole.tensors()
    assert any(name.startswith("model.target.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_chain_is_followed_as_it_would_be_sampled() -> None:
    """Guided where it was taught to guide itself, then clipped: the denoiser of its own hop."""
    labelled = EDM.but(net=PlainSpec(unet=UNET.but(labels=3)), told_dropout=0.1)
    teacher = {"base": Trained(labelled, random_weights(build_stage(labelled, {}).model))}
    spec = JUMPING.but(base=labelled, teacher=TeacherSpec(guidance_scale=2.0))
    stage, hop_of_teacher = made(spec, teacher), load_hop(teacher["base"], {}, device="cpu")
    torch.manual_seed(5)
    example = stage.example(next(squares(2)))  # with this seed neither class is kept back
    state = CascadeState(seeds=[0, 1], tokens=told("", ""), label=next(squares(2)).label)
    draw = hop_of_teacher.start(state, SamplingSpec(guidance_scale=2.0))
    x, sigma = 3 * torch.randn(2, 3, 16, 16), torch.tensor([3.0, 0.4])
    assert spec.teacher is not None
    with torch.no_grad():
        followed = stage.walker(spec.teacher, example)(x, sigma).x0
        assert torch.equal(followed, hop_of_teacher.denoiser(draw.rows)(x, sigma).x0)


@pytest.mark.parametrize("spec", [EDM, TIMED], ids=["EDM", "timesteps"])
def test_a_chain_has_no_gap_to_itself_where_its_path_ends(spec: ChainSpec) -> None:
    """The last step of its path is its own estimate, which its student begins with."""
    undropped = spec.but(net=PlainSpec(unet=UNET.but(labels=2)))
    teacher = {"base": Trained(spec, random_weights(build_stage(spec, {}).model))}
    jumping = JUMPING.but(base=undropped)
    stage = made(jumping, teacher)
    example, (low, high) = stage.example(next(squares())), spec.sigma_range
    assert jumping.teacher is not None
    walker = stage.walker(jumping.teacher, example)

    def student(x: Tensor, sigma: Tensor) -> Denoised:
        return clip_x0(bound(stage.model, example.told(stage.model.network)))(x, sigma)

    pair = consistency.draw_pair(example.x0, Cut(2, sigma_min=low, sigma_max=high, to_zero=True))
    path = following(walker)
    gap = consistency.distillation(student, ended(student), path, example.x0, pair, consistency.l2)
    assert gap.max() < 1e-10
    stage(next(squares())).total.backward()
    still = [name for name, p in stage.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.slow
def test_a_distilled_base_paints_in_one_jump_what_its_teacher_paints_in_many_steps() -> None:
    """From the same noise, nearer to it than the teacher's own first estimate."""
    torch.manual_seed(0)
    clip = Trained(CLIP, random_weights(build_stage(CLIP, {}).model))
    base = BASE.but(log_sigma_mean=0.5, weight_range=(0.5, 4.0))
    state = TrainState(build_stage(base, {"clip": clip}), OPTIMIZER)
    budget = Budget(steps=120, checkpoint_every=999)
    list(train(state, squares(24), optimizer=OPTIMIZER, budget=budget))
    parents = {"clip": clip, "base": Trained(base, state.average)}
    spec = SPEC.but(base=base, levels=FixedLevels(num_levels=8, mu=0.9))
    state = TrainState(made(spec, parents), OPTIMIZER)
    reports = train(state, squares(16), optimizer=OPTIMIZER, budget=budget.but(steps=80))
    gaps = [report.read()["gap"] for report in reports]
    assert sum(gaps[-20:]) < 0.8 * sum(gaps[:20])
    teacher = load_hop(parents["base"], parents, device="cpu")
    student = load_hop(Trained(spec, state.average), parents, device="cpu")
    asked = CascadeState(seeds=list(range(16)), tokens=told("a red square", "a blue square").repeat(8, 1))
    slow = run(teacher, asked, SamplingSpec(sampler="heun", num_steps=7, guidance_scale=2.0)).image
    hasty = run(teacher, asked, SamplingSpec(sampler="ddim", num_steps=1, guidance_scale=2.0)).image
    jumped = run(student, asked, JUMPS.but(num_steps=1)).image
    assert slow is not None
    assert hasty is not None
    assert jumped is not None
    assert (jumped - slow).square().mean() < 0.6 * (hasty - slow).square().mean()


@pytest.mark.parametrize("name", ["glide", "unclip", "frozen", "transformer", "latent", "inpainting"])
def test_whatever_a_chain_is_told_its_student_hears_and_begins_as_its_teacher(name: str) -> None:
    """Captions read by it or by CLIP, embeddings, latents, holes; a learned variance is left alone."""
    chain = chains.SPECS[name]
    parents = chains.PARENTS | {"base": chains.trained(chain)}
    spec = JUMPING.but(base=chain, teacher=TeacherSpec(guidance_scale=2.0))
    stage = made(spec, parents)
    stage(chains.batch()).total.backward()
    still = [name for name, p in stage.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still in ([], ["network.no_embedding"])  # none was kept back in this batch
    student = load_hop(Trained(spec, parents["base"].weights), parents, device="cpu")
    teacher = load_hop(parents["base"], parents, device="cpu")
    state = chains.asked([5, 6], "a red circle", "a star", image_embedding=torch.randn(2, 16))
    draw = student.start(state, JUMPS.but(num_steps=1))
    query = next(draw.sampling)
    assert query.levels().tolist() == pytest.approx([chain.sigma_range[1]] * 2)
    rows = teacher.start(state, SamplingSpec(guidance_scale=1.0)).rows
    estimates = [hop.denoiser(rows)(query.x, query.levels()).x0 for hop in (student, teacher)]
    assert torch.equal(*estimates)
    assert torch.equal(student.denoiser(draw.rows)(query.x, query.levels()).x0, estimates[0])
    image = run(student, state, JUMPS).image
    assert image is not None
    assert image.shape == (2, 3, 16, 16)
    if chain.latent_channels:
        with pytest.raises(ValueError, match="a consistency model of latents edits no picture"):
            student.start(state._replace(gray=torch.zeros(2, 1, 16, 16)), JUMPS)


def nights_and_days(count: int = 16) -> Iterator[PairBatch]:
    """Dark pictures of class 0 and bright ones of class 1, 8 x 8, each of its own grey."""
    generator = torch.Generator().manual_seed(0)
    while True:
        bright = torch.randint(0, 2, (count,), generator=generator)
        grey = 40 + 150 * bright + torch.randint(0, 40, (count,), generator=generator)
        image = grey[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8)
        yield PairBatch(image, told("").expand(count, -1), bright)


@pytest.mark.slow
def test_a_student_of_edm_paints_its_class_in_one_jump_and_in_two() -> None:
    torch.manual_seed(0)
    edm = EDM.but(net=PlainSpec(unet=UNET.but(labels=2, channel_mult=(1,))), image_size=8)
    budget = Budget(steps=60, checkpoint_every=999)
    state = TrainState(build_stage(edm, {}), OPTIMIZER)
    list(train(state, nights_and_days(), optimizer=OPTIMIZER, budget=budget))
    parents, jumping = {"base": Trained(edm, state.average)}, JUMPING.but(base=edm)
    state = TrainState(made(jumping, parents), OPTIMIZER)
    list(train(state, nights_and_days(), optimizer=OPTIMIZER, budget=budget.but(steps=20)))
    student = load_hop(Trained(jumping, state.average), {}, device="cpu")
    label = torch.tensor([0, 1]).repeat(4)
    asked = CascadeState(seeds=list(range(8)), tokens=told("").expand(8, -1), label=label)
    for jumps in (1, 2):
        jumped = run(student, asked, JUMPS.but(num_steps=jumps)).image
        assert jumped is not None
        night, day = (jumped.mean((1, 2, 3))[label == which] for which in (0, 1))
        assert night.max() + 0.4 < day.min()


@pytest.mark.parametrize(("jumps", "levels"), [(1, [80.0]), (2, None), (4, None)])
def test_n_jumps_ask_the_network_n_times_beginning_at_the_noise(
    parents: dict[str, Trained], jumps: int, levels: list[float] | None
) -> None:
    model, asked = hop(parents), CascadeState(seeds=[1], tokens=told("a star"))
    draw = model.start(asked, JUMPS.but(num_steps=jumps))
    seen = []

    def looking(x: Tensor, sigma: Tensor) -> Denoised:
        seen.append(sigma.item())
        return model.denoiser(draw.rows)(x, sigma)

    sample(draw.sampling, looking)
    grid = karras_sigmas(jumps + 1, sigma_min=0.1, sigma_max=80.0)[:jumps]
    assert seen == pytest.approx(levels or grid.tolist())


def test_a_path_in_segments_is_jumped_from_end_to_end(parents: dict[str, Trained]) -> None:
    """Drawing nothing anew; in as many jumps as there are levels its first weights are its teacher's DDIM."""
    spec = SPEC.but(levels=FixedLevels(num_levels=9), segments=4)
    student = load_hop(Trained(spec, parents["base"].weights), parents, device="cpu")
    teacher = load_hop(parents["base"], parents, device="cpu")
    asked = CascadeState(seeds=[1], tokens=told("a star"))
    grid = karras_sigmas(8, sigma_min=0.1, sigma_max=80.0)
    for jumps, levels in ((4, grid[::2]), (8, grid)):
        draw, seen = student.start(asked, JUMPS.but(num_steps=jumps)), []

        def looking(x: Tensor, sigma: Tensor, draw: Draw = draw, seen: list[float] = seen) -> Denoised:
            seen.append(sigma.item())
            return student.denoiser(draw.rows)(x, sigma)

        image = sample(draw.sampling, looking)
        assert seen == pytest.approx(levels[:-1].tolist())
    as_taught = SamplingSpec(sampler="ddim", num_steps=8, guidance_scale=1.0, clip="none")
    walked = run(teacher, asked, as_taught).image
    assert walked is not None
    torch.testing.assert_close(student.finish(asked, image).image, walked)


def test_what_does_not_end_with_the_segments_is_refused(parents: dict[str, Trained]) -> None:
    spec = SPEC.but(levels=FixedLevels(num_levels=9), segments=4)
    student = load_hop(Trained(spec, parents["base"].weights), parents, device="cpu")
    asked = CascadeState(seeds=[1], tokens=told("a star"))
    for how in (JUMPS, JUMPS.but(num_steps=12), JUMPS.but(taus=(0, 3, 8))):
        with pytest.raises(ValueError, match=r"in 4 segments: it takes 4 or 8 steps, and no taus"):
            student.start(asked, how)
    with pytest.raises(
        ValueError, match=r"8 levels are no 4 segments of one length; set levels.num_levels: 9"
    ):
        spec.but(levels=FixedLevels(num_levels=8))
    with pytest.raises(ValueError, match="4 segments cut fixed levels"):
        spec.but(teacher=None, levels=GrowingLevels(steps=10, s1=20))


def test_a_stage_trains_towards_the_ends_of_its_segments(
    edm: dict[str, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, ends = JUMPING.but(levels=FixedLevels(num_levels=9), segments=2), set()

    def draw(like: Tensor, cut: Cut) -> consistency.Pair:
        pair = consistency.draw_pair(like, cut)
        ends.update(pair.end.tolist())
        return pair

    monkeypatch.setattr("dd_core.stages.consistency.draw_pair", draw)
    made(spec, edm)(next(squares(32)))
    middle = karras_sigmas(8, sigma_min=spec.sigma_range[0], sigma_max=spec.sigma_range[1])[4]
    assert sorted(ends) == pytest.approx([0, float(middle)])


def test_where_every_interval_ends_a_segment_the_average_is_not_heard(edm: dict[str, Trained]) -> None:
    spec = JUMPING.but(levels=FixedLevels(num_levels=5), segments=4)
    stage = made(spec, edm)
    for weight in stage.target.parameters():
        weight.fill_(torch.nan)
    assert stage(next(squares())).total.isfinite()
    stage.spec = spec.but(segments=2)
    assert not stage(next(squares())).total.isfinite()


def test_paths_may_begin_below_the_highest_level_of_the_base(
    edm: dict[str, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, trained_at = JUMPING.but(sigma_max=20.0), []

    def draw(like: Tensor, cut: Cut) -> consistency.Pair:
        pair = consistency.draw_pair(like, cut)
        trained_at.append(pair)
        return pair

    monkeypatch.setattr("dd_core.stages.consistency.draw_pair", draw)
    stage = made(spec, edm)
    for batch in itertools.islice(squares(), 20):
        stage(batch)
    assert max(float(pair.high.max()) for pair in trained_at) == pytest.approx(20)
    student = load_hop(Trained(spec, edm["base"].weights), {}, device="cpu")
    asked = CascadeState(seeds=[1], tokens=told(""), label=torch.tensor([0]))
    assert next(student.start(asked, JUMPS).sampling).levels().tolist() == pytest.approx([20])
    with pytest.raises(ValueError, match=r"sigma_max 100 must be above .* and at most its highest, 80"):
        JUMPING.but(sigma_max=100.0)
    with pytest.raises(ValueError, match=r"sigma_min 30 must be .* below where paths begin, 20"):
        spec.but(sigma_min=30.0)
    assert spec.but(sigma_min=1.0).sigma_range == (1.0, 20.0)


def test_a_seed_gives_the_same_picture_alone_and_in_company(parents: dict[str, Trained]) -> None:
    model = hop(parents)
    captions = told("a red circle", "a blue star", "a cross")
    together = run(model, CascadeState(seeds=[5, 6, 7], tokens=captions), JUMPS).image
    alone = run(model, CascadeState(seeds=[6], tokens=captions[1:2]), JUMPS).image
    assert together is not None
    assert alone is not None
    torch.testing.assert_close(together[1:2], alone, atol=1e-2, rtol=0)


def unquantised(parents: dict[str, Trained], state: CascadeState, jumps: int) -> Tensor:
    """What the hop draws, before it is rounded to 256 levels and cut at the ends of the range."""
    model = hop(parents)
    draw = model.start(state, JUMPS.but(num_steps=jumps))
    return sample(draw.sampling, model.denoiser(draw.rows))


@pytest.mark.parametrize("jumps", [1, 3])
@pytest.mark.parametrize("count", [1, 3])
def test_each_edit_keeps_what_is_known_for_any_batch(
    parents: dict[str, Trained], count: int, jumps: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (count, 3, 16, 16), generator=generator) / 127.5 - 1
    hole = torch.zeros(count, 1, 16, 16, dtype=torch.bool)
    hole[..., 8:] = True
    luma = torch.tensor(edits.LUMA).view(1, 3, 1, 1)
    gray, coarse = (luma * image).sum(1, keepdim=True), nn.functional.avg_pool2d(image, 4)
    asked = CascadeState(seeds=list(range(count)), tokens=told(*["a star"] * count))
    plain = unquantised(parents, asked, jumps)
    painted = run(hop(parents), asked._replace(known=image, hole=hole), JUMPS.but(num_steps=jumps)).image
    assert painted is not None
    assert torch.equal(painted[..., :8], image[..., :8])
    assert not torch.equal(painted[..., 8:], image[..., 8:])
    other = asked._replace(known=image.masked_fill(hole, 1), hole=hole)
    assert torch.equal(run(hop(parents), other, JUMPS.but(num_steps=jumps)).image, painted)
    coloured = unquantised(parents, asked._replace(gray=gray), jumps)
    torch.testing.assert_close((luma * coloured).sum(1, keepdim=True), gray, atol=1e-5, rtol=0)
    enlarged = unquantised(parents, asked._replace(coarse=coarse), jumps)
    torch.testing.assert_close(nn.functional.avg_pool2d(enlarged, 4), coarse, atol=1e-5, rtol=0)
    for edited in (coloured, enlarged):
        assert not torch.allclose(edited, plain, atol=0.1)


def test_a_large_known_image_is_kept_at_the_side_of_the_hop(parents: dict[str, Trained]) -> None:
    gray = torch.rand(2, 1, 64, 64)
    asked = CascadeState(seeds=[1, 2], tokens=told("a star", "a box"), gray=gray)
    luma = torch.tensor(edits.LUMA).view(1, 3, 1, 1)
    kept = (luma * unquantised(parents, asked, 2)).sum(1, keepdim=True)
    torch.testing.assert_close(kept, nn.functional.avg_pool2d(gray, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, JUMPS.but(sampler="heun"), "set its sampler to consistency, not heun"),
        (
            {"gray": torch.zeros(1, 1, 16, 16), "coarse": torch.zeros(1, 3, 4, 4)},
            JUMPS,
            "one edit at a time: gray and coarse",
        ),
        ({"coarse": torch.zeros(1, 3, 5, 5)}, JUMPS, "5 x 5 does not enlarge to 16 x 16"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_network_is_asked(
    parents: dict[str, Trained], change: dict[str, Tensor], how: SamplingSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hop(parents).start(CascadeState(seeds=[1], tokens=told("a star"), **change), how)  # type: ignore[arg-type]


def test_a_teacher_must_be_the_base_that_the_spec_describes(parents: dict[str, Trained]) -> None:
    with pytest.raises(ValueError, match="needs the parent 'base'"):
        build_stage(SPEC, {"clip": parents["clip"]})
    with pytest.raises(ValueError, match="'base' is a ClipSpec, it must be a base"):
        build_stage(SPEC, parents | {"base": parents["clip"]})
    with pytest.raises(ValueError, match=r"base\.sigma_max is not that of the parent base"):
        build_stage(SPEC.but(base=BASE.but(sigma_max=40.0)), parents)
    build_stage(ALONE, {"clip": parents["clip"]})


def test_a_student_of_a_chain_may_leave_its_dropout_out_and_nothing_else(edm: dict[str, Trained]) -> None:
    made(JUMPING, edm)
    other = JUMPING.but(base=EDM.but(net=PlainSpec(unet=UNET.but(labels=2, groups=8))))
    with pytest.raises(ValueError, match=r"base\.net is not that of the parent base"):
        made(other, edm)
    with pytest.raises(ValueError, match=r"base\.kind is not that of the parent base"):
        made(JUMPING.but(teacher=TeacherSpec(guidance_scale=1.0)), {"base": Trained(BASE, {})})
    with pytest.raises(ValueError, match="needs the parent 'clip'"):
        made(JUMPING.but(distance="clip"), edm)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"teacher": TeacherSpec(guidance_scale=2.0)}, "set guidance_scale: 1, or train with told_dropout"),
        (
            {"base": EDM.but(net=PlainSpec(unet=UNET.but(labels=2, image_channels=3)), factor=2)},
            "a chain that enlarges is no consistency model; set base.factor: 1",
        ),
        (
            {
                "base": EDM.but(
                    net=PlainSpec(unet=UNET.but(labels=2), in_channels=4, out_channels=4), latent_channels=4
                ),
                "distance": "clip",
            },
            "distance clip looks at pictures, and this base paints latents; use pseudo_huber",
        ),
    ],
)
def test_a_chain_that_cannot_be_distilled_says_what_would_help(
    change: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        JUMPING.but(**change)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, JUMPS, "it paints by class, and the request names none; give a label"),
        ({"label": torch.tensor([2])}, JUMPS, r"label \[2\]: classes are 0 to 1"),
        ({"label": torch.tensor([0])}, JUMPS.but(guidance_scale=3.0), "set guidance_scale: 1"),
    ],
)
def test_a_consistency_model_of_classes_refuses_what_its_chain_would(
    edm: dict[str, Trained], change: dict[str, Tensor], how: SamplingSpec, message: str
) -> None:
    made_hop = load_hop(Trained(JUMPING, edm["base"].weights), {}, device="cpu")
    with pytest.raises(ValueError, match=message):
        made_hop.start(CascadeState(seeds=[1], tokens=told(""), **change), how)  # type: ignore[arg-type]


def test_a_spec_of_either_kind_survives_json() -> None:
    for spec in (SPEC, ALONE, JUMPING):
        assert ConsistencySpec.model_validate_json(spec.model_dump_json()) == spec


def vgg(path: Path) -> Path:
    """A file of LPIPS in published names, its weights random."""
    torch.manual_seed(3)
    lpips, layer, found = Lpips(), 0, {}
    for index, part in enumerate(lpips.stages):
        for module in part.children():
            if isinstance(module, nn.Conv2d):
                found |= {f"net.slice{index + 1}.{layer}.{k}": v for k, v in module.state_dict().items()}
            layer += 1
        width = len(lpips.weights[index])
        found[f"lin{index}.model.1.weight"] = torch.rand(1, width, 1, 1)
    save_file({name: value.contiguous() for name, value in found.items()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["lpips", "clip"])
def test_answers_are_compared_by_what_a_network_sees_of_them(
    distance: str, parents: dict[str, Trained], tmp_path: Path
) -> None:
    weights = str(vgg(tmp_path / "vgg.safetensors")) if distance == "lpips" else ""
    plain = made(SPEC, parents)
    stage = made(SPEC.but(distance=distance, lpips_weights=weights), parents)
    assert stage.state_dict().keys() == plain.state_dict().keys()  # what sees is not trained and not saved
    batch = next(squares(8 if distance == "clip" else 2))
    stage(batch).total.backward()
    lacking = [name for name, p in stage.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert lacking == []
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    sees = load_lpips(Path(weights)) if weights else ClipFeatures(clip_of(parents["clip"]))
    large = [torch.nn.functional.interpolate(one, (224, 224), mode="bilinear") for one in (a, b)]
    expected = sees(*large) if weights else sees(a, b)
    torch.testing.assert_close(stage.distance(a, b), expected)
    assert float(stage.distance(a, a).abs().max()) < 1e-6


def test_a_distance_that_lacks_its_weights_is_refused(parents: dict[str, Trained], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs lpips_weights, a path"):
        SPEC.but(distance="lpips")
    with pytest.raises(ValueError, match="there is no file"):
        made(SPEC.but(distance="lpips", lpips_weights=str(tmp_path / "absent")), parents)


def test_losses_name_the_gap(parents: dict[str, Trained]) -> None:
    found: Losses = made(SPEC, parents)(next(squares()))
    assert set(found.parts) == {"gap", "levels"}
    assert found.parts["levels"] == 8
