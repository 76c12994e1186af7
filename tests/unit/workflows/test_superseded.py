"""What was trained is never thrown away: it is recognised, or it lies aside and comes back."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dd_core import sealed
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages import StageSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.noised_clip import NoisedClipSpec
from dd_core.stages.upsampler import UpsamplerSpec
from jobs.recipes import demo, guided
from tests.conftest import warnings_in
from workflows import storage, superseded
from workflows.made_of import MadeOf, differences, named_files, same
from workflows.standing import newest_step
from workflows.storage import Home
from workflows.superseded import ASIDE, FINGERPRINT, MADE_OF, known, settled
from workflows.train_spec import TECHNICAL, TrainSpec

NET = UNetSpec(width=8, channel_mult=(1,), attention_at=(), attention_in_middle=False, groups=4)
UPSAMPLER = UpsamplerSpec(net=NET, image_size=64, crop=16)
LOSSY = AutoencoderSpec(net=AutoencoderNetSpec(width=8, groups=4), image_size=64, crop=16)


def spec_of(stage: StageSpec = UPSAMPLER, **changes: Any) -> TrainSpec:
    return TrainSpec(
        name="a",
        stage=stage,
        parents={role: role for role in stage.needs},
        optimizer=OptimizerSpec(learning_rate=1e-3),
        budget=Budget(steps=20, checkpoint_every=5),
        batch_size=8,
    ).but(**changes)


def made_of(**changes: Any) -> MadeOf:
    return MadeOf(spec_of(**changes), "d", {"start": "p"}, {})


def slower(rate: float = 2e-3) -> MadeOf:
    return made_of(optimizer=OptimizerSpec(learning_rate=rate))


def old_formula(spec: TrainSpec) -> str:
    """The fingerprint of before, as it was written."""
    fields = spec.model_dump(mode="json", exclude={*TECHNICAL, "parents"})
    for name in ("checkpoint_every", "report_every", "sample_every"):
        del fields["budget"][name]
    body = {"spec": fields, "data": "d", "parents": {"start": "p"}}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def trained(stage: Home, facts: dict[str, Any], *, step: int = 5) -> None:
    """What a training leaves, with these facts in its checkpoint and its bundle."""
    for name in ("bundle", f"checkpoints/step-{step:08d}"):
        place = stage.at(name).here
        place.mkdir(parents=True)
        (place / "w").write_text(str(facts))
        (place / "state.json").write_text(json.dumps(facts | {"step": step}))
        sealed.seal(place, sealed.digests(place), facts if name == "bundle" else {"step": step})
    (stage.here / "metrics.jsonl").write_text("1\n")
    stage.send("bundle", "checkpoints", "metrics.jsonl")


def content(stage: Home) -> dict[str, str]:
    """Every file of the directory but the two that name it."""
    if not stage.stored:
        files = {path.relative_to(stage.here).as_posix(): path.read_text() for path in files_in(stage.here)}
    else:
        fs, begin = (
            storage.store(stage.root),
            len(storage.store(stage.root)._strip_protocol(stage.address)) + 1,
        )
        files = {path[begin:]: fs.cat_file(path).decode() for path in fs.find(stage.address)}
    return {name: text for name, text in files.items() if name not in (FINGERPRINT, MADE_OF)}


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.fixture(params=["directory", "store"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    if request.param == "directory":
        return Home.of(tmp_path / "run").at("a")
    return Home.of(f"memory://superseded/{tmp_path.name}").at("a")


def test_a_changed_setting_moves_what_was_trained_aside_and_the_old_one_brings_it_back_whole(
    stage: Home, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = made_of(), slower()
    first = settled(stage, one)
    trained(stage, one.facts())
    before = content(stage)
    assert settled(stage, one) == first
    assert content(stage) == before
    second = settled(stage, other)
    (line,) = warnings_in(caplog)
    assert "a: optimizer.learning_rate is 0.002, was 0.001; what was trained before lies in" in line
    assert f"{ASIDE}/{first[:12]}" in line
    assert {name for name in content(stage) if not name.startswith(ASIDE)} == set()
    trained(stage, other.facts(), step=10)
    assert settled(stage, one) == first
    assert {name: text for name, text in content(stage).items() if not name.startswith(ASIDE)} == before
    assert settled(stage, other) == second
    assert "checkpoints/step-00000010/w" in content(stage)


class Killed(BaseException):
    """By the system."""


@pytest.mark.parametrize("then", ["the same", "back", "a third"])
def test_a_kill_between_any_two_writes_loses_nothing_whatever_is_started_next(
    stage: Home, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    one, other, third = made_of(), slower(), slower(3e-3)
    settled(stage, one)
    trained(stage, one.facts())
    kept = content(stage)
    settled(stage, other)
    trained(stage, other.facts(), step=10)
    new = {name: text for name, text in content(stage).items() if not name.startswith(ASIDE)}
    for writes in range(100):
        left = writes

        def killing(act: Callable[..., Any]) -> Callable[..., Any]:
            def cut(*args: Any, **options: Any) -> Any:
                nonlocal left
                if not left:
                    raise Killed
                left -= 1
                return act(*args, **options)

            return cut

        with monkeypatch.context() as patch:
            for name in ("write", "drop"):
                patch.setattr(Home, name, killing(getattr(Home, name)))
            if stage.stored:
                fs = type(storage.store(stage.root))
                for name in ("cp_file", "rm_file"):
                    patch.setattr(fs, name, killing(getattr(fs, name)))
            else:
                patch.setattr(superseded, "move", killing(superseded.move))
            try:
                settled(stage, one)
                survived = True
            except Killed:
                survived = False
        settled(stage, {"the same": one, "back": other, "a third": third}[then])
        settled(stage, one)
        assert {name: text for name, text in content(stage).items() if not name.startswith(ASIDE)} == kept
        settled(stage, other)
        assert {name: text for name, text in content(stage).items() if not name.startswith(ASIDE)} == new
        if survived:
            break
    assert 5 < writes < 99


def test_a_lost_fingerprint_is_read_from_the_checkpoint_and_without_one_nothing_is_touched(
    tmp_path: Path,
) -> None:
    stage, one = Home.of(tmp_path).at("a"), made_of()
    settled(stage, one)
    trained(stage, one.facts())
    for name in (FINGERPRINT, MADE_OF):
        (stage.here / name).unlink()
    shutil.rmtree(stage.here / "bundle")
    before = content(stage)
    assert settled(stage, one) == one.fingerprint
    assert content(stage) == before
    (stage.here / FINGERPRINT).write_text("")
    (stage.here / MADE_OF).unlink()
    settled(stage, slower())
    assert set(content(stage.at(f"{ASIDE}/{one.fingerprint[:12]}"))) == set(before)
    nameless = Home.of(tmp_path).at("b")
    trained(nameless, {})
    before = content(nameless)
    with pytest.raises(
        ValueError, match=r"b holds bundle, checkpoints, metrics.jsonl, and nothing says"
    ) as error:
        settled(nameless, one)
    assert "\n" not in str(error.value)
    assert content(nameless) == before


def test_memory_is_no_reason_to_train_again_unless_the_loss_compares_samples() -> None:
    half = spec_of(micro_batch_size=4)
    assert half.fingerprint("d", {}) == spec_of().fingerprint("d", {}) == spec_of().old_fingerprint("d", {})
    for stage in (ClipSpec(), NoisedClipSpec(), LOSSY):
        one, other = (spec_of(stage, micro_batch_size=size) for size in (2, 4))
        assert one.fingerprint("d", {}) != other.fingerprint("d", {})


def test_where_the_samples_of_all_workers_are_compared_as_many_at_a_time_are_the_same_training() -> None:
    for stage in (ClipSpec(), NoisedClipSpec()):
        four, also, eight = (
            MadeOf(spec_of(stage, num_workers=workers, micro_batch_size=size), "d", {}, {})
            for workers, size in ((1, 4), (2, 2), (2, 4))
        )
        assert four.fingerprint == also.fingerprint != eight.fingerprint
        was = also.facts("as an older version calculated it")
        assert same(was, four)
        assert not same(was, eight)
        assert differences(was, eight) == ["micro_batch_size is 8, was 4"]
    one, other = (spec_of(num_workers=workers, micro_batch_size=4) for workers in (1, 2))
    assert one.fingerprint("d", {}) == other.fingerprint("d", {})


def test_a_noised_clip_of_before_it_could_have_a_schedule_goes_on(tmp_path: Path) -> None:
    """The demo's is not trained again; that of `guided`, which learns at other levels now, is."""
    stage = Home.of(tmp_path).at("noised_clip")
    now, other = (MadeOf(one, "d", {"clip": "p"}, {}) for one in (demo.noised_clip(), guided.noised_clip()))
    was = now.facts("as it was calculated then")
    assert was["spec"]["stage"].pop("schedule", "absent") is None
    stage.write(FINGERPRINT, was["fingerprint"])
    trained(stage, was)
    assert same(was, now)
    assert settled(stage, now) == was["fingerprint"]
    assert not same(was, other)
    assert any(line.startswith("stage.schedule") for line in differences(was, other))


def test_what_was_trained_under_the_old_fingerprint_goes_on(tmp_path: Path) -> None:
    old, stage = spec_of(micro_batch_size=4), Home.of(tmp_path).at("a")
    was = old_formula(old)
    assert was != old.fingerprint("d", {"start": "p"})
    assert same({"fingerprint": was}, made_of(micro_batch_size=4))
    stage.write(FINGERPRINT, was)
    facts = {"spec": old.model_dump(mode="json"), "data": "d", "parents": {"start": "p"}, "fingerprint": was}
    trained(stage, facts)
    before = content(stage)
    assert settled(stage, made_of(micro_batch_size=2)) == was
    assert content(stage) == before
    assert known(stage)["spec"]["micro_batch_size"] == 2
    assert settled(stage, made_of()) == was


def test_a_field_that_is_new_changes_nothing_and_a_default_that_is_another_does() -> None:
    facts = made_of().facts()
    facts["fingerprint"] = "calculated by another version"
    assert same(facts, made_of())
    older = json.loads(json.dumps(facts))
    del older["spec"]["optimizer"]["precision"], older["spec"]["stage"]["roughness"]
    assert same(older, made_of())
    explicit = json.loads(json.dumps(facts))
    explicit["spec"]["stage"]["roughness"] = 0.123
    assert not same(explicit, made_of())
    (found,) = differences(explicit, made_of())
    assert found == f"stage.roughness is {UPSAMPLER.roughness}, was 0.123"
    gone = json.loads(json.dumps(facts))
    gone["spec"]["stage"]["lost"] = 1
    assert not same(gone, made_of())
    assert differences(gone, made_of()) == ["stage.lost is no more, was 1"]


def test_what_is_other_is_named(tmp_path: Path) -> None:
    was, spec = made_of().facts(), spec_of()
    assert differences(was, MadeOf(spec, "d", {"start": "q"}, {})) == ["its parent start is another"]
    assert differences(was, MadeOf(spec, "e", {"start": "p"}, {})) == ["the data differ"]
    assert not same(was, MadeOf(spec, "d", {"start": "q"}, {}))
    assert not same(was, MadeOf(spec, "e", {"start": "p"}, {}))


@pytest.mark.parametrize("field", ["pretrained", "lpips_weights"])
def test_a_file_that_is_replaced_is_another_training_and_one_that_is_missing_is_refused(
    tmp_path: Path, field: str
) -> None:
    file = tmp_path / "weights.safetensors"
    stage: StageSpec = ClipSpec(pretrained=f"ViT-B-32:{file}")
    if field == "lpips_weights":
        stage = LOSSY.but(perceptual="lpips", lpips_weights=str(file))
    spec = spec_of(stage)
    with pytest.raises(
        ValueError, match=rf"^a: stage.{field} names the file .*, and there is none; mend it$"
    ):
        named_files(spec)
    file.write_text("one")
    one = MadeOf(spec, "d", {"start": "p"}, named_files(spec))
    assert one.files == {field: sealed.sha256(file)}
    file.write_text("two")
    two = MadeOf(spec, "d", {"start": "p"}, named_files(spec))
    assert not same(one.facts(), two)
    assert differences(one.facts(), two) == [f"the content of the file in stage.{field} differs"]
    older = {"fingerprint": old_formula(spec)}  # of a version that did not look
    assert same(older, one)
    noted = one.facts(older["fingerprint"])  # and what it made is noted from then on
    assert same(noted, one)
    assert not same(noted, two)


def test_the_newest_checkpoint_is_that_of_the_highest_step_not_the_last_by_name(stage: Home) -> None:
    for step, rate in ((100_000_000, 2e-3), (99_999_999, 1e-3)):
        place = stage.at(f"checkpoints/step-{step:08d}").here
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps(slower(rate).facts() | {"step": step}))
        sealed.seal(place, sealed.digests(place), {"step": step})
    stage.send("checkpoints")
    assert newest_step(stage) == 100_000_000
    assert known(stage)["fingerprint"] == slower(2e-3).fingerprint
