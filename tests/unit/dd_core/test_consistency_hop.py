"""A consistency model as a hop: painting in one jump or a few, and Algorithm 4's edits."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from dd_core import edits
from dd_core.cascade import CascadeState, Draw, run
from dd_core.consistency import FixedLevels, GrowingLevels, draw_pair
from dd_core.denoiser import Denoised
from dd_core.nets.network import PlainSpec
from dd_core.noise import SeededNoise, karras_sigmas
from dd_core.samplers import SamplingSpec, ddim, sample
from dd_core.stage import Budget, PairBatch, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.consistency_hop import ConsistencyHop, refuse_jumps
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.training import TrainState, train
from tests.unit.dd_core import students
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.students import (
    BASE,
    EDM,
    JUMPING,
    JUMPS,
    OPTIMIZER,
    SPEC,
    UNET,
    made,
    random_weights,
    squares,
    told,
)
from tests.unit.dd_core.test_stages import CLIP

LATENTS = ConsistencySpec(base=chains.LATENT, teacher=None, levels=GrowingLevels(steps=10, s1=20))


@pytest.fixture(scope="module")
def parents() -> dict[str, Trained]:
    return students.on_a_base()


@pytest.fixture(scope="module")
def edm() -> dict[str, Trained]:
    return students.on_classes()


def hop(parents: dict[str, Trained]) -> ConsistencyHop:
    found = load_hop(Trained(SPEC, parents["base"].weights), parents, device="cpu")
    assert isinstance(found, ConsistencyHop)
    return found


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


@pytest.mark.parametrize(
    ("jumps", "taus", "levels"),
    [
        (1, (), [0]),
        (2, (), [0, 4]),
        (4, (), [0, 2, 4, 5]),
        (7, (), range(7)),
        (2, (0, 2, 7), [0, 2]),
    ],
)
def test_n_jumps_ask_the_network_n_times_at_levels_that_it_was_trained_at(
    parents: dict[str, Trained], jumps: int, taus: tuple[int, ...], levels: Sequence[int]
) -> None:
    model, asked = hop(parents), CascadeState(seeds=[1], tokens=told("a star"))
    draw = model.start(asked, JUMPS.but(num_steps=jumps, taus=taus))
    seen = []

    def looking(x: Tensor, sigma: Tensor) -> Denoised:
        seen.append(sigma.item())
        return model.denoiser(draw.rows)(x, sigma)

    sample(draw.sampling, looking)
    trained = draw_pair(torch.zeros(500, 1), SPEC.cut(8)).high.unique().flip(0)
    assert seen == pytest.approx(trained[list(levels)].tolist())


def test_what_it_was_not_trained_for_is_refused(parents: dict[str, Trained]) -> None:
    asked = CascadeState(seeds=[1], tokens=told("a star"))
    for how, remedy in (
        (JUMPS.but(num_steps=8), "trained at 8 levels; set num_steps to at most 7"),
        (JUMPS.but(taus=(0, 3, 8)), "let taus, if there are any, end in 7"),
    ):
        with pytest.raises(ValueError, match=remedy):
            hop(parents).start(asked, how)
    for spec in (SPEC.but(levels=FixedLevels(num_levels=9), segments=2), LATENTS):
        with pytest.raises(ValueError, match="dynamic_threshold is for pictures, and this model answers"):
            refuse_jumps(spec, JUMPS.but(dynamic_threshold=0.9))
        with pytest.raises(ValueError, match="clip estimate is for pictures, and this model answers"):
            refuse_jumps(spec, JUMPS.but(clip="estimate"))
    refuse_jumps(SPEC, JUMPS.but(clip="estimate"))
    refuse_jumps(SPEC, JUMPS.but(dynamic_threshold=0.9))


def test_a_path_in_segments_is_jumped_from_end_to_end(parents: dict[str, Trained]) -> None:
    """In one jump for each its first weights walk as DDIM does, and draw nothing anew."""
    spec = SPEC.but(levels=FixedLevels(num_levels=9), segments=4)
    student = load_hop(Trained(spec, parents["base"].weights), parents, device="cpu")
    asked = CascadeState(seeds=[1], tokens=told("a star"))
    grid = karras_sigmas(8, sigma_min=0.1, sigma_max=80.0)
    for jumps, levels in ((8, grid), (4, grid[::2])):
        draw, seen = student.start(asked, JUMPS.but(num_steps=jumps)), list[float]()

        def looking(x: Tensor, sigma: Tensor, draw: Draw = draw, seen: list[float] = seen) -> Denoised:
            seen.append(sigma.item())
            return student.denoiser(draw.rows)(x, sigma)

        image = sample(draw.sampling, looking)
        assert seen == pytest.approx(levels[:-1].tolist())
    noise = SeededNoise([1])
    begun = float(grid[0]) * noise(torch.empty(image.shape))
    walked = sample(ddim(begun, grid[::2], noise), student.denoiser(draw.rows))
    torch.testing.assert_close(image, walked)


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
        ({"noise": torch.zeros(1, 3, 16, 16)}, JUMPS, "its noise from the seeds alone; leave noise out, or"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_network_is_asked(
    parents: dict[str, Trained], change: dict[str, Tensor], how: SamplingSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hop(parents).start(CascadeState(seeds=[1], tokens=told("a star"), **change), how)  # type: ignore[arg-type]


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
