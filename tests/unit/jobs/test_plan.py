"""The plan: what a run takes is said before it starts, and one that cannot fit is refused with the sums."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from dd_core import bundle, precision, sealed
from dd_core.stages import build_stage
from dd_core.stages.base import BaseSpec
from jobs.cli import main
from jobs.config import recipe_spec, resolve
from jobs.disk import embedding_bytes, written
from jobs.fit import PlanError, refusals, refuse
from jobs.nodes import Node, Room, amount, grown, has_labels, places, taken
from jobs.plan import PROCESS_BYTES, Plan, groups, on, plan_of, told
from jobs.recipes import smoke
from workflows.estimate import needs
from workflows.made_of import MadeOf
from workflows.prepare import how
from workflows.run_spec import RunSpec
from workflows.standing import Standing, standings
from workflows.storage import Home
from workflows.train_spec import ResourcesSpec

ROOMY = Node("roomy", cpus=8, gpus=0, memory_bytes=64 * 2**30)
GPU = Node("gpu", cpus=8, gpus=2, memory_bytes=64 * 2**30, labels={"ray.io/accelerator-type": "H100"})


def with_base(**changes: object) -> RunSpec:
    """Smoke's clip and base alone, the base without drafts and changed."""
    run = smoke.run()
    base = run.stage("base")
    assert isinstance(base.stage, BaseSpec)
    alone = base.but(stage=base.stage.but(from_draft=False), parents={"clip": "clip"})
    stages = (run.stage("clip"), alone.but(**changes))
    return run.with_stages(stages)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(smoke.run(), [ROOMY], run="runs/smoke")


@pytest.fixture(scope="module")
def small() -> Plan:
    """Where it would run is not known yet."""
    return plan_of(with_base(), [], run="runs/x")


def otherwise(small: Plan, nodes: list[Node], **changes: object) -> Plan:
    """The small plan elsewhere, its base on other workers or resources, which shape no tensor."""
    clip, base = small.stages
    return on(small._replace(stages=(clip, base._replace(spec=base.spec.but(**changes)))), nodes)


def test_a_plan_says_parameters_memory_steps_images_checkpoints_and_disk(plan: Plan) -> None:
    clip = plan.facts()["stages"]["clip"]
    assert (clip["steps"], clip["images"], clip["workers"], clip["gpus_per_worker"]) == (12, 192, 1, 0)
    assert clip["memory_bytes_per_worker"] > clip["memory_is"]["state"] > clip["parameters"] * 12
    assert clip["checkpoints"] == 2  # of steps 6 and 12; a third would be one too many for checkpoints_kept
    assert plan.disk["checkpoints"] == sum(s.checkpoints * s.need.state for s in plan.stages)
    assert plan.disk["data"] > 240 * 1000
    assert plan.disk["embeddings"] == 240 * 32 * 4  # draft, base and prior read those of one CLIP and size
    text = told(plan)
    assert "data:  the embedded world of shapes\n" in text
    assert text.startswith("plan of runs/smoke\n")
    for word in ("3,418,881", "1.5 GiB", "192", "roomy: 8 CPU, 64.0 GiB", amount(plan.disk["checkpoints"])):
        assert word in text
    refuse(plan)


def test_embeddings_of_one_clip_and_size_count_once_whatever_pictures_their_readers_see() -> None:
    base, prior = smoke.base(), smoke.prior()
    larger = base.but(stage=base.stage.but(embedded_at=256))
    as_large = prior.but(stage=prior.stage.but(image_size=256))
    assert embedding_bytes([base, prior], 10) == embedding_bytes([larger, as_large], 10) == 10 * 32 * 4
    assert embedding_bytes([larger, prior], 10) == 2 * 10 * 32 * 4


def test_less_memory_than_needed_is_refused_with_the_sum(plan: Plan, small: Plan) -> None:
    tight = plan._replace(nodes=(ROOMY._replace(memory_bytes=2**30),))
    with pytest.raises(
        PlanError, match=r"clip: 1 workers of 1 CPU and 1\.5 GiB each; there is room for 0 on"
    ):
        refuse(tight)
    (base,) = refusals(otherwise(small, [ROOMY], resources=ResourcesSpec(memory_gib=1)))
    assert "1.1 GiB process + 4.3 MiB weights, optimizer and averages + 1.1 MiB gradients" in base
    assert "more than resources.memory_gib 1; raise it or set micro_batch_size" in base
    unstated = otherwise(small, list(tight.nodes), resources=ResourcesSpec())
    assert "process + " in refusals(unstated)[1]


def test_workers_without_their_gpu_or_their_labels_are_refused(small: Plan) -> None:
    both = [ROOMY, GPU]
    (line,) = refusals(otherwise(small, both, num_workers=4, use_gpu=True))
    assert "base: 4 workers of 1 CPU, 1 GPU and 1.5 GiB each; there is room for 2 on roomy: 8 CPU, " in line
    assert not refusals(otherwise(small, both, num_workers=2, use_gpu=True))
    there = ResourcesSpec(labels={"ray.io/accelerator-type": "A100"})
    (line,) = refusals(otherwise(small, both, resources=there))
    assert "no node of 2 has the labels {'ray.io/accelerator-type': 'A100'}" in line
    (line,) = refusals(otherwise(small, both, use_gpu=True, resources=ResourcesSpec(gpu_memory_gib=0.01)))
    assert "of its GPU = 4.3 MiB weights, optimizer and averages" in line


def test_a_network_that_no_batch_lets_into_a_gpu_is_not_told_to_take_smaller_batches(small: Plan) -> None:
    stage = next(one for one in otherwise(small, [GPU], use_gpu=True).left if one.spec.name == "base")
    batchless = stage.gpu_bytes - stage.need.activations_on_gpu
    for limit, fix in (
        ((batchless + stage.gpu_bytes) / 2, "; set micro_batch_size or more num_workers"),
        (
            batchless / 2,
            "; no batch is small enough, as each worker holds the whole network: make it smaller",
        ),
    ):
        asked = ResourcesSpec(gpu_memory_gib=limit / 2**30)
        (line,) = refusals(otherwise(small, [GPU], use_gpu=True, resources=asked))
        assert fix in line


def test_stages_side_by_side_are_refused_where_those_that_need_most_do_not_fit_together(plan: Plan) -> None:
    pairs = {frozenset(one.spec.name for one in group) for group in groups(plan.stages, 2)}
    assert frozenset({"clip", "upsampler"}) in pairs
    assert frozenset({"autoencoder", "prior"}) in pairs
    for related in ({"clip", "prior"}, {"clip", "base"}, {"draft", "base"}):  # base stands on draft on clip
        assert frozenset(related) not in pairs
    one = ROOMY._replace(memory_bytes=2 * 2**30)
    assert not refusals(on(plan, [one]))
    two, three = plan._replace(at_once=2), plan._replace(at_once=3)
    (line,) = refusals(on(two, [one]))
    assert "at_once 2: 3.0 GiB = 1 x 1.5 GiB and 1 CPU clip + 1 x 1.5 GiB and 1 CPU " in line
    assert line.endswith("lower at_once, num_workers or resources, or bring larger nodes")
    assert not refusals(on(two, [one, one]))
    assert "at_once 3: 4.5 GiB = " in refusals(on(three, [one, one]))[0]
    assert "at once: 3 stages, at most 4.5 GiB (" in told(three)


def test_stages_side_by_side_leave_a_cpu_for_who_reads_and_take_turns_on_a_gpu(plan: Plan) -> None:
    two, small = plan._replace(at_once=2), ROOMY._replace(cpus=2)
    assert not refusals(on(two, [small]))  # three quarters of a CPU each
    greedy = [s.spec.but(resources=s.spec.resources.but(cpus=1)) for s in plan.stages]
    stages = tuple(old._replace(spec=spec) for old, spec in zip(plan.stages, greedy, strict=True))
    (line,) = refusals(on(two._replace(stages=stages), [small]))
    assert "with 0.25 CPU for the data reader" in line
    assert not refusals(on(plan._replace(stages=stages), [small]))
    assert not refusals(on(two, [GPU._replace(gpus=1)]))


def test_a_stage_that_leaves_no_cpu_for_who_reads_is_refused(small: Plan) -> None:
    """Its read tasks would never start, and it would wait for them for ever."""
    two = ROOMY._replace(cpus=2)
    greedy = ResourcesSpec(cpus=2)
    (line,) = refusals(otherwise(small, [two], resources=greedy))
    assert line.startswith(
        "base: 1 workers of 2 CPU each leave no 0.25 CPU for the data reader on roomy: 2 CPU, "
    )
    assert line.endswith("; lower resources.cpus or num_workers, or bring larger nodes")
    assert not refusals(otherwise(small, [two, two], resources=greedy))
    assert not refusals(otherwise(small, [two], resources=ResourcesSpec(cpus=1.75)))


def test_memory_of_a_gpu_is_planned_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    unknown = plan_of(with_base(), [], run="runs/x")
    (_, base), (_, moved) = unknown.stages, on(unknown, [GPU]).stages
    assert (base.gpu, moved.gpu) == (False, True)
    assert moved.gpu_bytes == plan_of(with_base(), [GPU], run="runs/x").stages[1].gpu_bytes
    assert moved.gpu_bytes < base.memory_bytes - PROCESS_BYTES
    assert amount(moved.need.activations_on_gpu) in moved.arithmetic()
    two = moved._replace(spec=moved.spec.but(num_workers=2))
    assert moved.memory_bytes - two.memory_bytes == 3 * moved.need.state // 2  # what each has of a checkpoint


def test_one_stage_of_a_run_in_a_store_is_planned_on_the_parents_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DDIFF_STORAGE", "memory://bucket/runs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = Home.of("memory://bucket/runs/smoke")
    home = run.at("clip/bundle")
    home.here.parent.mkdir(parents=True)
    clip = smoke.clip().stage
    bundle.save(home.here, clip, build_stage(clip, {}).model.state_dict(), parents={}, facts={})
    run.send("clip")
    done = CliRunner().invoke(main, ["train", "draft", "--recipe", "smoke", "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert list(json.loads(done.stdout)["stages"]) == ["draft"]
    alone = CliRunner().invoke(main, ["train", "upsampler", "--recipe", "smoke", "--dry-run"])
    lost = CliRunner().invoke(
        main,
        [
            "train",
            "noised_clip",
            "--recipe",
            "smoke",
            "--dry-run",
            "--set",
            "stages.noised_clip.parents.clip=clap",
        ],
    )
    assert alone.exit_code == 0, alone.stderr
    assert (lost.exit_code, "its clip 'clap' is neither" in lost.stderr) == (2, True)


def test_stages_that_are_done_need_no_room(plan: Plan) -> None:
    crowded = on(plan._replace(at_once=2), [ROOMY._replace(memory_bytes=2**20)])
    assert len(refusals(crowded)) == len(crowded.stages)
    done = dict.fromkeys((one.spec.name for one in crowded.stages), Standing("done"))
    assert refusals(crowded._replace(standing=done)) == []
    first = crowded.stages[0].spec.name
    (line,) = refusals(crowded._replace(standing=done | {first: Standing("continues", 3)}))
    assert line.startswith(f"{first}: ")


def test_a_disk_that_is_too_small_is_refused_with_the_sum(plan: Plan) -> None:
    (line,) = refusals(plan._replace(free=1000))
    assert line.startswith(f"disk: runs/smoke will hold {amount(sum(plan.disk.values()))} = ")
    assert "0.0 MiB are free" in line


def test_in_a_store_the_node_that_lacks_room_for_its_stages_is_refused_with_the_sum(plan: Plan) -> None:
    stored = on(plan._replace(run="s3://b/runs/smoke", free=None, at_once=2), [ROOMY])
    needed, bundles = stored.scratch_bytes, sum(one.need.bundle for one in stored.stages)
    assert not refusals(stored)  # nobody was asked
    rooms = (Room(ROOMY, needed), Room(ROOMY._replace(name="10.0.0.3"), needed - 1))
    (line,) = refusals(asked := stored._replace(rooms=rooms))
    most = max(groups(stored.stages, 2), key=lambda pair: sum(one.scratch_bytes for one in pair))
    assert needed == sum(one.scratch_bytes for one in most) + bundles
    assert line.startswith(
        f"disk: 10.0.0.3 has {amount(needed - 1)} free in its TMPDIR, and s3://b/runs/smoke "
    )
    each = [f"{amount(one.scratch_bytes)} {one.spec.name} (two checkpoints, parents, bundle)" for one in most]
    assert f"{amount(needed)} there = {' + '.join(each)} + {amount(bundles)} bundles of all stages; " in line
    assert f"TMPDIR of each node, of which 10.0.0.3 has least free: {amount(needed - 1)}" in told(asked)
    assert asked.facts()["scratch_free_bytes"] == {"roomy": needed, "10.0.0.3": needed - 1}
    head = Room(ROOMY._replace(cpus=0), bundles)  # where no stage can be placed
    assert not refusals(stored._replace(rooms=(head,)))
    assert refusals(stored._replace(rooms=(head._replace(free=bundles - 1),)))
    done = dict.fromkeys((one.spec.name for one in stored.stages), Standing("done"))
    assert not refusals(stored._replace(rooms=(head._replace(node=ROOMY),), standing=done))
    small = min(stored.stages, key=lambda one: one.scratch_bytes)
    others = [
        one if one is small else one._replace(spec=one.spec.but(resources=ResourcesSpec(labels={"a": "b"})))
        for one in stored.stages
    ]
    apart = stored._replace(stages=tuple(others), nodes=(ROOMY._replace(labels={"a": "b"}),))
    assert not refusals(apart._replace(rooms=(Room(ROOMY, small.scratch_bytes + bundles),)))


def test_what_a_run_has_written_already_counts_as_room_if_the_plan_needs_it(tmp_path: Path) -> None:
    spec = with_base()
    counted = (
        "clip/checkpoints/step-1/a",
        "base/bundle/a",
        "cascade/clip/a",
        "data/raw/a",
        "clip/embeddings/a",
    )
    ours = (*counted, "evaluation/a", "cascade/prior/a", "prior/checkpoints/a", "mlflow.db")
    for name in ours:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    assert taken(tmp_path, written(spec)) == 1000 * len(counted)
    brought = RunSpec.model_construct(**(dict(spec) | {"shapes": None}))
    assert taken(tmp_path, written(brought)) == 3000  # data that somebody has put there is not to be written
    free = plan_of(spec, [ROOMY], run=str(tmp_path)).free
    assert free is not None
    assert free > 1000 * len(counted)


@pytest.mark.parametrize(
    ("choice", "fits"),
    [("a", True), ("b", False), ("!a", False), ("!b", True), ("in(a, b)", True), ("!in(a, b)", False)],
)
def test_labels_are_chosen_in_the_words_of_ray(choice: str, fits: bool) -> None:
    assert has_labels(Node("n", 1, 0, 1, {"zone": "a"}), {"zone": choice}) is fits


def test_ray_itself_reads_these_selectors() -> None:
    from ray.util.placement_group import validate_placement_group  # noqa: PLC0415

    def asked(choice: str) -> None:
        validate_placement_group(
            bundles=[{"CPU": 1}], bundle_label_selector=[{"zone": choice}], strategy="PACK", lifetime=None
        )

    for choice in ("a", "!a", "in(a, b)", "!in(a, b)"):
        asked(choice)
    with pytest.raises(ValueError, match=r"in\(a, b"):
        asked("in(a, b")


def test_a_worker_lies_on_one_node() -> None:
    half = Node("half", cpus=1.5, gpus=0, memory_bytes=3)
    assert places([half, half], cpus=1, gpus=0, memory_bytes=1) == 2
    assert places([half, half], cpus=0.5, gpus=0, memory_bytes=1) == 6
    assert places([half], cpus=1, gpus=1, memory_bytes=1) == 0


def test_nodes_that_an_autoscaler_may_bring_count(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"name": "base", "count": 2, "cpus": 8, "gpus": 1, "memory_bytes": 10, "labels": {"a": "b"}}]
    monkeypatch.setenv("DDIFF_NODE_GROUPS", json.dumps(groups))
    assert grown([ROOMY]) == [Node(f"base-{n}", 8, 1, 10, {"a": "b"}) for n in range(2)]


def test_a_dry_run_shows_the_plan_starts_nothing_and_says_whether_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "DDIFF_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    shown = CliRunner().invoke(main, ["train", "clip", "--recipe", "smoke", "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.stderr
    assert list(json.loads(shown.stdout)["stages"]) == ["clip"]
    more = "stages.clip.resources.memory_gib=1"
    done = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--dry-run", "--set", more])
    assert done.exit_code == 2
    assert "clip: a worker needs 1.2 GiB = 1.1 GiB process" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
    started = CliRunner().invoke(main, ["train", "clip", "--recipe", "smoke", "--set", more])
    assert (started.exit_code, "the plan does not fit" in started.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_published_consistency_model_is_planned_at_any_size_of_its_unet() -> None:
    small = ("width=32", "channel_mult=[1,2]", "attention_at=[2]", "head_width=32", "blocks_per_level=1")
    nets = ("stages.base.stage.net", "stages.consistency.stage.base.net")
    changes = [f"{net}.unet.{change}" for net in nets for change in small]
    spec = resolve("consistency.paper", None, [*changes, "stages.consistency.stage.distance=pseudo_huber"])
    assert isinstance(spec, RunSpec)
    node = GPU._replace(gpus=8, cpus=96, memory_bytes=2**40, labels={"ray.io/accelerator-type": "H100"})
    plan = plan_of(spec, [node], run="runs/consistency_paper")
    refuse(plan)
    for wrong, room in (
        (node._replace(labels={}), "no node of 1 has the labels"),
        (node._replace(cpus=16), "room for 2 on"),
    ):
        with pytest.raises(PlanError, match=rf"8 workers of 8 CPU, 1 GPU and 64\.0 GiB .* {room}"):
            refuse(on(plan, [wrong]))
    needs = {stage.spec.name: stage.need for stage in plan.stages}
    assert needs["base"].parameters == needs["consistency"].parameters
    one = needs["base"].bundle
    assert needs["consistency"].state > needs["base"].state + 0.9 * one  # the target, which is resumed too
    assert needs["consistency"].frozen >= 2 * one  # the teacher, and its bundle beside it


@pytest.mark.parametrize(
    "name",
    [
        "autoregressive",
        "consistency",
        "consistency.alone",
        "consistency.edm",
        "ddpm",
        "glide.clip_guided",
        "glide.inpainting",
        "guided",
        "improved_ddpm",
        "latent",
        "latent.joint",
        "unclip.small_causal",
    ],
)
def test_the_recipes_for_a_laptop_are_planned_and_fit(name: str) -> None:
    spec = recipe_spec(name)
    assert isinstance(spec, RunSpec)
    refuse(plan_of(spec, [ROOMY._replace(cpus=2, memory_bytes=16 * 2**30)], run=f"runs/{name}"))


@pytest.mark.parametrize("name", ["adm", "glide.paper", "consistency.paper", "latent.paper", "unclip.large"])
def test_the_published_sizes_fit_the_gpus_that_they_ask_for(name: str) -> None:
    spec = recipe_spec(name)
    assert isinstance(spec, RunSpec)
    assert spec.pairs is not None
    found = needs(spec.stages, context_length=spec.pairs.context_length, run=Path("nowhere"), gpus=8)
    asked = {stage.name: stage.resources.gpu_memory_gib for stage in spec.stages}
    full = {stage: found[stage].total_on_gpu / 2**30 / gib for stage, gib in asked.items() if gib}
    assert full
    assert {stage: share for stage, share in full.items() if share > 0.9} == {}


def left(stage: Path, made_of: MadeOf, *, bundle_too: bool) -> str:
    """What a training leaves at its seventh step, or at its end; returns the digest of the bundle."""
    facts = made_of.facts()
    saved = stage / "checkpoints" / "step-00000007"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps(facts | {"step": 7}))
    sealed.seal(saved, sealed.digests(saved), {"step": 7})
    (stage / "fingerprint").write_text(made_of.fingerprint)
    if not bundle_too:
        return ""
    (stage / "bundle").mkdir()
    return sealed.seal(stage / "bundle", {}, facts)


def test_a_plan_says_what_is_done_what_continues_and_why_something_is_trained_again(tmp_path: Path) -> None:
    spec = with_base()
    clip, base = spec.stages
    assert {now.text for now in standings(spec, Home.of(tmp_path)).values()} == {"new"}
    data = tmp_path / "data" / "prepared"
    data.mkdir(parents=True)
    digest = sealed.seal(data, {}, {})
    parent = left(tmp_path / "clip", MadeOf(clip, digest, {}, {}), bundle_too=True)
    left(tmp_path / "base", MadeOf(base, digest, {"clip": parent}, {}), bundle_too=False)

    def said(spec: RunSpec) -> dict[str, str]:
        return {name: now.text for name, now in standings(spec, Home.of(tmp_path)).items()}

    assert said(spec) == {"clip": "done", "base": "continues at step 7"}
    rate = base.optimizer.learning_rate
    changed = with_base(optimizer=base.optimizer.but(learning_rate=2 * rate))
    reason = f"trained again, because optimizer.learning_rate is {2 * rate}, was {rate}"
    assert said(changed) == {"clip": "done", "base": reason}
    other = spec.with_stages([clip.but(seed=5), base])
    assert said(other) == {
        "clip": f"trained again, because seed is 5, was {clip.seed}",
        "base": "trained again, because its parent clip is another",
    }
    before = taken(tmp_path, written(spec))
    plan = plan_of(changed, [ROOMY], run=str(tmp_path), standing=standings(changed, Home.of(tmp_path)))
    assert f"base: {reason}" in told(plan).splitlines()
    assert plan.facts()["stages"]["base"]["because"] == [reason.removeprefix("trained again, because ")]
    assert taken(tmp_path, written(spec, {"base"})) < before  # it stays, and gives no room
    (data / sealed.MANIFEST).unlink()
    sealed.seal(data, {}, {"kept": 1})
    assert said(spec)["clip"] == "trained again, because the data differ"


def test_where_more_captions_are_to_be_held_out_the_data_are_others(tmp_path: Path) -> None:
    spec = with_base()
    data = tmp_path / "data" / "prepared"
    data.mkdir(parents=True)
    digest = sealed.seal(data, {}, {"spec": how(spec.pairs)})
    left(tmp_path / "clip", MadeOf(spec.stages[0], digest, {}, {}), bundle_too=True)

    def said(share: float) -> str:
        now = RunSpec.model_construct(**(dict(spec) | {"pairs": spec.pairs.but(held_out=share)}))
        return standings(now, Home.of(tmp_path))["clip"].text

    assert said(0.0) == "done"
    assert said(0.1) == "trained again, because the data differ"


@pytest.mark.parametrize(
    ("shards", "word"),
    [
        (["/raw/{00000..00001}.tar"], "done"),
        (["/raw/00001.tar", "/raw/{00000,00001}.tar"], "done"),
        (["/moved/{00000..00001}.tar"], "done"),
        (["/raw/*.tar"], "done"),
        (["/raw"], "done"),
        (["/raw/{00000..00099}.tar"], "again"),
        (["/raw/00000.tar"], "again"),
    ],
)
def test_where_shards_were_added_or_left_out_the_data_are_others(
    shards: list[str], word: str, tmp_path: Path
) -> None:
    data = tmp_path / "prepared"
    data.mkdir()
    pairs = with_base().pairs.but(shards=tuple(shards), destination=str(data))
    spec = RunSpec.model_construct(**(dict(with_base()) | {"pairs": pairs, "shapes": None}))
    digest = sealed.seal(data, {}, {"spec": how(pairs), "shards": ["/raw/00000.tar", "/raw/00001.tar"]})
    left(tmp_path / "clip", MadeOf(spec.stages[0], digest, {}, {}), bundle_too=True)
    assert standings(spec, Home.of(tmp_path))["clip"].word == word
