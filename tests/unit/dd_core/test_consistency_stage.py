"""The consistency stage: whom it follows, what it learns, and what a restart finds."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dd_core import checkpoint, consistency
from dd_core.cascade import CascadeState, run
from dd_core.consistency import Cut, FixedLevels, draw_pair, ended, following
from dd_core.denoiser import Denoised, Parameterization
from dd_core.guidance import clip_x0, rows_of
from dd_core.nets.clip import Clip, ReadCaption
from dd_core.nets.network import PlainSpec
from dd_core.nets.perceptual import ClipFeatures, Lpips, load_lpips
from dd_core.noise import karras_sigmas
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, Example, Losses, Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.base import BaseHop, BaseSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import clip_of
from dd_core.stages.consistency import ConsistencyStage, bound
from dd_core.stages.consistency_hop import levels_of
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from dd_core.text import null_tokens
from dd_core.training import TrainState, train
from tests.unit.dd_core import students
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.students import (
    ALONE,
    BASE,
    EDM,
    JUMPING,
    JUMPS,
    OPTIMIZER,
    SPEC,
    TIMED,
    UNET,
    made,
    random_weights,
    squares,
    told,
)


@pytest.fixture(scope="module")
def parents() -> dict[str, Trained]:
    return students.on_a_base()


@pytest.fixture(scope="module")
def edm() -> dict[str, Trained]:
    return students.on_classes()


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


def test_a_teacher_whose_estimates_are_not_clipped_is_followed_beyond_the_range_of_pixels(
    parents: dict[str, Trained],
) -> None:
    stage, x, sigma = made(SPEC, parents), 30 * torch.randn(2, 3, 16, 16), torch.tensor([3.0, 0.4])
    example, how = stage.example(next(squares(2))), TeacherSpec(guidance_scale=1.0)
    with torch.no_grad():
        kept, free = (stage.walker(how.but(clipped=on), example)(x, sigma).x0 for on in (True, False))
    assert free.abs().max() > 1
    assert torch.equal(kept, free.clamp(-1, 1))


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


def test_a_student_keeps_the_text_transformer_that_its_teacher_kept() -> None:
    net = chains.GLIDE.net.but(out_channels=3)
    base = chains.GLIDE.but(net=net, loss="simple", told_dropout=0.0, text_frozen=True)
    teacher = Trained(base, {k: v.clone() for k, v in random_weights(build_stage(base, {}).model).items()})
    stage = made(SPEC.but(base=base, teacher=TeacherSpec(guidance_scale=1.0)), {"base": teacher})
    state, budget = TrainState(stage, OPTIMIZER), Budget(steps=1, checkpoint_every=9)
    list(train(state, squares(), optimizer=OPTIMIZER, budget=budget))
    changed = {k for k, v in stage.model.state_dict().items() if not torch.equal(v, teacher.weights[k])}
    assert {k for k in changed if k.startswith("network.text.")} == {"network.text.padding"}
    assert any(k.startswith("network.unet.") for k in changed)


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
        supply = itertools.islice(squares(2), state.step, None)
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


@pytest.mark.parametrize(("scale", "times"), [(1.0, 1), (2.0, 2)])
@pytest.mark.parametrize("base", [students.BASE, chains.UNCLIP, chains.FROZEN, chains.TRANSFORMER])
def test_captions_are_read_once_for_all_networks_and_the_empty_one_for_a_guided_teacher(
    base: BaseSpec | ChainSpec, scale: float, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = (
        students.on_a_base() if base is students.BASE else chains.PARENTS | {"base": chains.trained(base)}
    )
    stage = made(JUMPING.but(base=base, teacher=TeacherSpec(guidance_scale=scale)), parents)
    read, reads = Clip.read, list[Tensor]()

    def counted(clip: Clip, tokens: Tensor) -> ReadCaption:
        reads.append(tokens)
        return read(clip, tokens)

    monkeypatch.setattr(Clip, "read", counted)
    stage(chains.batch())
    assert len(reads) == times


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


@pytest.mark.parametrize(("levels", "segments"), [(5, 4), (5, 2)])
def test_from_noise_a_batch_is_whole_paths_of_its_teacher_whatever_the_images(
    levels: int, segments: int, edm: dict[str, Trained]
) -> None:
    """Both classes are followed to their ends, and the loss is the mean over all intervals."""
    teacher = TeacherSpec(guidance_scale=1.0, solver="ddim", steps=2, paths_from="noise")
    spec = JUMPING.but(levels=FixedLevels(num_levels=levels), segments=segments, teacher=teacher)
    stage, batch = made(spec, edm), next(squares(3))
    torch.manual_seed(7)
    found = stage(batch).total
    torch.manual_seed(7)
    assert torch.equal(stage(batch._replace(image=255 - batch.image)).total, found)
    torch.manual_seed(7)
    example, cut = stage.example(batch), spec.cut(levels)
    noise, walker = torch.randn_like(example.x0), stage.walker(teacher, example)
    told_once = example.told(stage.model.network)
    gaps = []
    for row in range(3):
        cond = told_once.pick(torch.tensor([row]))
        grid = cut.grid().float()
        x = grid[0] * noise
        for place in range(levels - 1):
            pair = consistency.pairs_at(torch.tensor([place]), noise, cut)
            path = grid[2 * place : 2 * place + 3]
            below = following(walker, "ddim")(x, path.expand(3, -1))
            target = ended(bound(stage.target, cond))
            noisy = (x[row : row + 1], below[row : row + 1])
            gaps.append(
                consistency.gap(bound(stage.model, cond), target, noisy, pair, consistency.pseudo_huber)
            )
            x = below
    torch.testing.assert_close(found, torch.cat(gaps).mean(), rtol=1e-5, atol=1e-7)


def test_a_student_of_paths_from_noise_comes_nearer_to_where_its_teacher_paints(
    edm: dict[str, Trained],
) -> None:
    teacher = TeacherSpec(guidance_scale=1.0, solver="ddim", steps=4, paths_from="noise")
    spec = JUMPING.but(
        levels=FixedLevels(num_levels=3), segments=2, teacher=teacher, distance="l2", sigma_min=0.1
    )
    stage = made(spec, edm)
    asked = CascadeState(seeds=[*range(16)], tokens=told(*[""] * 16), label=torch.arange(16) % 2)
    # the student begins with the teacher's weights, so its noise is the teacher's: the same seeds
    grid = spec.cut(3).grid().float()
    hop = load_hop(Trained(spec, edm["base"].weights), {}, device="cpu")
    start = next(hop.start(asked, JUMPS).sampling).x
    rows = hop.start(asked, JUMPS).rows
    painted = following(clip_x0(hop.denoiser(rows)), "ddim")(start, grid.expand(16, -1))

    def away() -> float:
        shown = load_hop(Trained(spec, stage.model.state_dict()), {}, device="cpu")
        image = run(shown, asked, JUMPS).image
        assert image is not None
        return float((image - painted.clamp(-1, 1)).square().mean())

    before = away()
    state = TrainState(stage, OPTIMIZER)
    list(train(state, squares(), optimizer=OPTIMIZER, budget=Budget(steps=60, checkpoint_every=99)))
    assert away() < before / 2


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


def test_a_published_student_learns_the_levels_that_it_jumps_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the identity at the lowest level, where its paths end."""
    spec = JUMPING.but(base=JUMPING.base.but(predicts="consistency"), teacher=None)
    stage, drawn = made(spec, {}), list[Tensor]()

    def pair(like: Tensor, cut: Cut) -> consistency.Pair:
        drawn.append(cut.grid())
        return draw_pair(like, cut)

    monkeypatch.setattr("dd_core.stages.consistency.draw_pair", pair)
    loss = stage(next(squares(64)), "model")
    loss.total.backward()
    count = len(drawn[0])
    low, high = spec.sigma_range
    assert count == 8
    assert torch.equal(drawn[0], karras_sigmas(count, sigma_min=low, sigma_max=high)[:count])
    how = JUMPS.but(taus=(0, 3, count - 1))
    asked = levels_of(spec, how)[:-1]
    assert torch.equal(asked, drawn[0][[0, 3]])


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
                    net=PlainSpec(unet=UNET.but(labels=2), in_channels=4, out_channels=4),
                    latent_channels=4,
                    predicts="v",
                ),
                "distance": "clip",
            },
            "distance clip looks at pictures, and this base paints latents; use pseudo_huber",
        ),
        (
            {"base": EDM.but(predicts="consistency"), "teacher": None, "segments": 7},
            "identity at its lowest level, and segments end at 0; set segments: 1",
        ),
        (
            {"base": EDM.but(predicts="consistency"), "teacher": None, "segments": 1, "sigma_min": 0.5},
            "identity at its base's lowest noise level, 0.002, not at sigma_min 0.5; leave sigma_min out",
        ),
    ],
)
def test_a_chain_that_cannot_be_distilled_says_what_would_help(
    change: dict[str, object], remedy: str
) -> None:
    with pytest.raises(ValueError, match=remedy):
        JUMPING.but(**change)


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
    torch.manual_seed(1)  # by which what is told is dropped for none of the few
    stage(batch).total.backward()
    lacking = [name for name, p in stage.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert lacking == []
    a, b = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    sees = load_lpips(Path(weights), pooling="average") if weights else ClipFeatures(clip_of(parents["clip"]))
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
