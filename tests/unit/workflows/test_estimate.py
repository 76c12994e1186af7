"""What tensors without content say a training needs is what real ones take."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core import bundle, precision, sealed
from dd_core.nets.network import PlainSpec
from dd_core.nets.perceptual import PatchGanSpec
from dd_core.nets.prior import CausalPriorSpec
from dd_core.nets.text import CaptionedSpec
from dd_core.nets.whitening import Whitening
from dd_core.precision import autocast
from dd_core.stage import PairBatch, Stage, Trained
from dd_core.stages import build_stage
from dd_core.stages.autoencoder import AutoencoderSpec, AutoencoderStage
from dd_core.stages.causal_prior import CausalPriorStageSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from dd_core.training import TrainState
from jobs.recipes import consistency, glide, smoke
from workflows import storage
from workflows.estimate import Need, needs, size
from workflows.run_spec import in_order
from workflows.storage import Home
from workflows.train_spec import TrainSpec

SPECS = [spec.but(batch_size=4) for spec in in_order(smoke.run().stages)]


@pytest.fixture(scope="module")
def needed() -> dict[str, Need]:
    return needs(SPECS, context_length=smoke.CONTEXT, run=Path("nowhere"))


@pytest.fixture(scope="module")
def real() -> dict[str, TrainState]:
    torch.manual_seed(0)
    made: dict[str, TrainState] = {}
    for spec in SPECS:
        parents = {role: Trained(*trained(named, made)) for role, named in spec.parents.items()}
        made[spec.name] = TrainState(build_stage(spec.stage, parents), spec.optimizer)
    return made


def looked_enough(stage: Stage) -> None:
    """As most of a training is: nothing is left to measure, and every player plays."""
    for part in stage.modules():
        if isinstance(part, Whitening):
            part.seen.fill_(part.measured)
    if isinstance(stage, AutoencoderStage):
        stage.batches.fill_(stage.spec.disc_start)


def trained(name: str, made: dict[str, TrainState]) -> Trained:
    spec = next(spec for spec in SPECS if spec.name == name)
    return Trained(spec.stage, made[name].average)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_checkpoints_gradients_and_activations_are_as_large_as_was_said(
    spec: TrainSpec, needed: dict[str, Need], real: dict[str, TrainState]
) -> None:
    state, need = real[spec.name], needed[spec.name]
    assert sum(size(tensor) for tensor in state.tensors().values()) == need.state
    assert sum(parameter.numel() for parameter in state.stage.model.parameters()) == need.parameters
    own = {tensor.untyped_storage().data_ptr() for tensor in state.stage.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    looked_enough(state.stage)  # type: ignore[arg-type]
    side, most = spec.stage.image_size, 0
    for phase in state.stage.phases:
        kept.clear()
        longest = torch.tensor([320] * (smoke.CONTEXT - 1) + [49407])  # END is the last word
        batch = PairBatch(torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8), longest.expand(4, -1))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):  # noqa: SIM117
            with autocast(torch.device("cpu"), spec.optimizer.precision):
                total = state.stage(batch, phase).total
        held = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
        most = max(most, held)
        if total.requires_grad:
            total.backward()
    assert sum(size(p.grad) for p in state.stage.parameters() if p.grad is not None) <= need.gradients
    assert 0.9 * need.activations <= most <= 1.02 * need.activations


def test_a_stage_that_looks_before_it_learns_is_planned_as_it_learns(needed: dict[str, Need]) -> None:
    """Otherwise nothing would seem to be kept by a prior, a draft and the second player."""
    for spec in SPECS:
        assert needed[spec.name].activations > 100_000, spec.name
    (autoencoder,) = (spec for spec in SPECS if isinstance(spec.stage, AutoencoderSpec))
    parents = [spec for spec in SPECS if spec.name in autoencoder.parents.values()]
    wider = autoencoder.stage.but(discriminator=PatchGanSpec(width=256))
    planned = needs(
        [*parents, autoencoder.but(stage=wider)], context_length=smoke.CONTEXT, run=Path("nowhere")
    )
    assert planned["autoencoder"].activations > needed["autoencoder"].activations


def test_each_worker_compares_its_captions_with_those_of_all() -> None:
    (clip, *_) = SPECS
    kept = [
        needs(
            [clip.but(batch_size=32 * workers, num_workers=workers)],
            context_length=smoke.CONTEXT,
            run=Path("nowhere"),
        )["clip"].activations
        for workers in (8, 16, 32)
    ]
    more = (kept[1] - kept[0]) / (8 * 32)  # bytes for one more among all: logits and softmaxes, embeddings
    assert 32 * 12 < more < 32 * 18 + 2 * 4 * clip.stage.net.embedding_width
    assert (kept[2] - kept[1]) / (16 * 32) == more


def test_several_workers_share_the_batch_alone(needed: dict[str, Need]) -> None:
    (clip, *_) = SPECS
    shared = needs([clip.but(num_workers=2)], context_length=smoke.CONTEXT, run=Path("nowhere"))["clip"]
    assert shared.gradients == needed["clip"].gradients
    assert shared.activations < 0.7 * needed["clip"].activations
    smaller = needs([clip.but(micro_batch_size=1)], context_length=smoke.CONTEXT, run=Path("nowhere"))["clip"]
    assert smaller.activations < shared.activations


def test_a_parent_that_has_been_trained_counts_as_one_of_the_run_does(
    needed: dict[str, Need], real: dict[str, TrainState], tmp_path: Path
) -> None:
    prior = next(spec for spec in SPECS if spec.name == "prior")
    path = tmp_path / "clip" / "bundle"
    path.parent.mkdir()
    clip = trained("clip", real)
    bundle.save(path, clip.spec, clip.weights, parents={}, facts={})
    for parents, run in (({"clip": "clip"}, tmp_path), ({"clip": str(path)}, Path("nowhere"))):
        alone = prior.but(parents=parents)
        assert needs([alone], context_length=smoke.CONTEXT, run=run)["prior"] == needed["prior"]
    with (path / "weights.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(sealed.SealError, match=r"weights\.safetensors"):
        needs([alone], context_length=smoke.CONTEXT, run=Path("nowhere"))


def test_a_parent_in_a_store_is_planned_without_its_weights(
    needed: dict[str, Need], real: dict[str, TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prior, clip = next(spec for spec in SPECS if spec.name == "prior"), trained("clip", real)
    run = Home.of("memory://bucket/runs/smoke")
    home = run.at("clip/bundle")
    home.here.parent.mkdir(parents=True)
    bundle.save(home.here, clip.spec, clip.weights, parents={}, facts={})
    run.send("clip")
    shutil.rmtree(home.here)
    for named, where in (("clip", run), (home.address, Path("nowhere"))):
        alone = prior.but(parents={"clip": named})
        assert needs([alone], context_length=smoke.CONTEXT, run=where)["prior"] == needed["prior"]
    assert not list(tmp_path.rglob("*.safetensors"))
    storage.store(run.root).pipe_file(f"{home.address}/weights.safetensors", b"x" * 9)
    with pytest.raises(sealed.SealError, match=r"memory://\S+/weights\.safetensors is damaged"):
        needs([alone], context_length=smoke.CONTEXT, run=run)


def test_a_stage_on_a_gpu_is_planned_in_bfloat16_whatever_this_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    (clip, *_) = SPECS

    def told(spec: TrainSpec, gpus: float | None) -> Need:
        return needs([spec], context_length=smoke.CONTEXT, run=Path("nowhere"), gpus=gpus)["clip"]

    cpu, gpu, both = (told(clip, gpus) for gpus in (0, 1, None))
    assert cpu.activations == cpu.activations_on_gpu == both.activations
    assert gpu.activations == gpu.activations_on_gpu == both.activations_on_gpu
    assert 0.5 * cpu.activations <= gpu.activations < 0.8 * cpu.activations
    assert both.total - both.total_on_gpu == cpu.activations - gpu.activations
    exact = clip.but(optimizer=clip.optimizer.but(precision="fp32"))
    assert 0.9 * cpu.activations < told(exact, 1).activations < cpu.activations  # attention is fused there
    assert told(clip.but(use_gpu=True), 0).activations == gpu.activations


def test_a_gpu_keeps_more_of_each_norm_than_a_cpu_with_a_loop_of_its_own() -> None:
    spec = next(spec for spec in SPECS if spec.name == "upsampler")
    spec = spec.but(optimizer=spec.optimizer.but(precision="bf16"))
    need = needs([spec], context_length=smoke.CONTEXT, run=Path("nowhere"))["upsampler"]
    assert 1.3 * need.activations < need.activations_on_gpu < 3 * need.activations


def test_a_parent_that_is_nowhere_is_named() -> None:
    base = next(spec for spec in SPECS if spec.name == "base")
    with pytest.raises(
        ValueError, match=r"base: its clip 'clip' is neither a trained stage .* train 'clip' first"
    ):
        needs([base], context_length=smoke.CONTEXT, run=Path("nowhere"))


@pytest.mark.parametrize("recipe", ["blur", "bsr"])
def test_a_chain_that_degrades_what_it_enlarges_is_planned_for_its_crops(recipe: str) -> None:
    """Imagined tensors have no numbers: every step of a degradation must be taken all the same."""
    whole = glide.upsampler()
    assert isinstance(whole.stage, ChainSpec)
    assert isinstance(whole.stage.net, CaptionedSpec)
    net = PlainSpec(unet=whole.stage.net.unet.but(text_width=0), out_channels=6)
    found: list[int] = []
    for more in ({}, {"degrades": recipe, "crop": 64}):
        spec = whole.but(stage=whole.stage.but(net=net, **more), batch_size=4)
        found.append(needs([spec], context_length=12, run=Path("nowhere"))["upsampler"].activations)
    assert 8 < found[0] / found[1] <= 16  # a sixteenth of the pixels, and weights beside


def test_the_published_prior_is_planned_as_if_it_had_measured() -> None:
    clip = smoke.run().stages[0]
    assert isinstance(clip.stage, ClipSpec)
    towers = clip.stage.net.but(embedding_width=clip.stage.net.text_width)
    net = CausalPriorSpec(
        width=64, layers=1, heads=2, context_length=towers.context_length, embedding_width=towers.text_width
    )
    wide = clip.but(stage=clip.stage.but(net=towers))
    stage = CausalPriorStageSpec(net=net, measured_images=2)
    spec = clip.but(name="prior", stage=stage, parents={"clip": clip.name})
    found = needs([wide, spec], context_length=smoke.CONTEXT, run=Path("nowhere"))["prior"]
    assert found.activations > clip.batch_size * towers.context_length * 64 * 4


def test_a_student_of_a_chain_of_timesteps_is_planned_beside_its_teacher() -> None:
    """Of its answers for an image one is learned from; the teacher's bound, which keeps more, it has not."""
    found = needs(consistency.classes().stages, context_length=12, run=Path("nowhere"))
    teacher, student = found["base"], found["consistency"]
    assert student.parameters == teacher.parameters
    assert student.frozen > teacher.frozen
    assert 0.8 * teacher.activations < student.activations < teacher.activations


@pytest.mark.parametrize("algorithm", ["adamw", "radam", "muon", "muon_unet"])
def test_every_optimizer_is_planned_with_what_it_keeps(algorithm: str) -> None:
    clip = smoke.run().stages[0]
    spec = clip.but(optimizer=clip.optimizer.but(algorithm=algorithm))
    found = needs([spec], context_length=smoke.CONTEXT, run=Path("nowhere"))["clip"]
    torch.manual_seed(0)
    state = TrainState(build_stage(spec.stage, {}), spec.optimizer)
    assert found.state == sum(size(tensor) for tensor in state.tensors().values())


@pytest.mark.parametrize("length", [16, 48])
def test_a_clip_that_reads_captions_of_another_length_tells_them_to_nobody(length: int) -> None:
    run = smoke.run()
    clip = run.stage("clip").but(stage=run.stage("clip").stage.but(pretrained="ViT-B-32/openai"))
    draft = run.stage("draft")
    deaf = [clip, draft.but(stage=draft.stage.but(embedding_width=512))]  # that of the model, not of clip.net
    assert needs(deaf, context_length=length, run=Path("nowhere")).keys() == {"clip", "draft"}
    for name in ("base", "prior", "noised_clip"):
        wanted = f"{name}: its clip 'clip' reads 77 tokens, pairs.context_length is {length}; make them equal"
        with pytest.raises(ValueError, match=wanted):
            needs([*deaf, run.stage(name)], context_length=length, run=Path("nowhere"))
