"""How a cascade is judged: by whom, on what, and which scores may be compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dd_core import sealed
from jobs.cli import main
from jobs.evaluate import Way, listed, look_ahead, score_tags, way_by, way_in, way_of
from jobs.recipes import consistency, ddpm, guided, improved_ddpm, smoke
from workflows.clip_judge import OwnData
from workflows.evaluation_spec import EvaluationSpec
from workflows.registry import Version, worse
from workflows.storage import Home

ORACLE = {"all": 0.5, "n": 8, "failed": 0, "intervals": {"all": [0.2, 0.8]}}
SPEC = EvaluationSpec(captions=8)


def by_clip(found: float, cosine: float) -> dict[str, Any]:
    intervals = {"r_precision": [found - 0.1, found + 0.1]}
    return {"r_precision": found, "cosine": cosine, "n": 8, "failed": 0, "intervals": intervals}


def version(number: int, tags: dict[str, str]) -> Version:
    return Version("mine", str(number), "there", f"{number:064d}", tags)


@pytest.fixture
def own(tmp_path: Path) -> OwnData:
    """Data and a judge, as far as their digests go."""
    for name, facts in {"data": {"content": "c"}, "clip": {"step": 1}}.items():
        (tmp_path / name).mkdir()
        sealed.seal(tmp_path / name, {}, facts)
    return OwnData(str(tmp_path / "data"), str(tmp_path / "clip"))


def test_what_was_judged_by_the_oracle_before_there_was_another_judge_stays_judged() -> None:
    assert Way("oracle", EvaluationSpec()).fingerprint() == "6a24b8dc508b7c40"
    assert Way("oracle", SPEC.but(judge="ViT-B-32/openai", among=7)).fingerprint() == "64d8fa01d25e989a"


def test_other_data_another_judge_or_other_captions_are_another_judgement(
    own: OwnData, tmp_path: Path
) -> None:
    seen = {Way("clip", SPEC, own).fingerprint(), Way("oracle", SPEC).fingerprint()}
    for spec in (SPEC.but(seed=1), SPEC.but(captions=9), SPEC.but(among=5)):
        seen.add(Way("clip", spec, own).fingerprint())
    seen.add(Way("clip", SPEC, own._replace(clip="ViT-B-32/openai")).fingerprint())
    (tmp_path / "data" / "manifest.json").unlink()
    sealed.seal(tmp_path / "data", {}, {"content": "others"})
    seen.add(Way("clip", SPEC, own).fingerprint())
    assert len(seen) == 7


def test_where_data_and_judge_lie_and_who_was_taught_change_nothing(own: OwnData, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(own.data)
    moved = own._replace(data=str(tmp_path / "elsewhere"), taught=True)
    assert Way("clip", SPEC, moved).fingerprint() == Way("clip", SPEC, own).fingerprint()


def test_the_embedded_world_is_judged_by_the_oracle_and_own_data_by_a_clip(tmp_path: Path) -> None:
    ours, home = smoke.run(), Home.of(tmp_path / "smoke")
    assert way_of(ours, home) == Way("oracle", ours.evaluation)
    mine = ours.but(shapes=None)
    way = way_of(mine, home)
    assert way.own == OwnData(str(Path("prepared").absolute()), f"{tmp_path}/smoke/clip/bundle", taught=True)
    named = mine.but(evaluation=SPEC.but(judge="ViT-B-32/openai"))
    assert way_of(named, home).own == way.own._replace(clip="ViT-B-32/openai", taught=False)
    itself = mine.but(evaluation=SPEC.but(judge=f"{tmp_path}/smoke/clip/bundle"))
    assert way_of(itself, home).own == way.own


def test_a_run_without_a_clip_of_its_own_is_judged_by_the_one_it_stands_on_or_told_that_it_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, home = smoke.run().but(shapes=None), Home.of(tmp_path / "smoke")
    others = tuple(
        stage.but(parents=stage.parents | ({"clip": "/other/clip/bundle"} if "clip" in stage.parents else {}))
        for stage in mine.stages
        if stage.name != "clip"
    )
    found = way_of(mine.but(stages=others), home).own
    assert found is not None
    assert (found.clip, found.taught) == ("/other/clip/bundle", True)
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "spec.json").write_text('{"net": {"towers": "text"}}')
    alone = tuple(
        stage.but(parents=stage.parents | {"clip": str(tower)}) if "clip" in stage.parents else stage
        for stage in others
    )
    assert way_of(mine.but(stages=alone), home).own is None  # it embeds nothing
    none = ddpm.run().but(shapes=None)
    look_ahead(none, way_of(none, home))
    (line,) = caplog.messages
    assert line.startswith("the cascade will not be judged: none of its stages is a CLIP: name one with")


def test_a_cascade_of_classes_is_asked_for_those_that_it_was_trained_with(tmp_path: Path) -> None:
    home = Home.of(tmp_path)
    for run in (consistency.alone(), guided.classes(), improved_ddpm.run()):
        assert way_of(run, home).spec == run.evaluation.but(label=improved_ddpm.LABEL)
    assert way_of(smoke.run(), home).spec.label is None
    led = guided.classes()
    (hop,) = led.cascade.hops
    idle = led.cascade.but(hops=(hop.but(how=hop.how.but(gradient=None)),))
    assert led.but(cascade=idle).label is None  # its classifier leads nobody, so a class would be refused
    named, plain = (Way("oracle", SPEC.but(label=label)) for label in (improved_ddpm.LABEL, None))
    assert named.fingerprint() != plain.fingerprint()
    assert way_in(score_tags(named, {})) == named


def test_a_clip_that_was_taken_for_training_flatters_as_one_that_was_trained(tmp_path: Path) -> None:
    ours = smoke.run()
    clip = ours.stage("clip")
    taken = clip.but(stage=clip.stage.but(pretrained="ViT-B-32/openai"))
    stages = tuple(taken if stage is clip else stage for stage in ours.stages)
    mine = ours.but(shapes=None, stages=stages, evaluation=SPEC.but(judge="ViT-B-32/openai"))
    own = way_of(mine, Home.of(tmp_path)).own
    assert own is not None
    assert own.taught


def test_a_version_says_how_it_is_to_be_judged_whether_it_has_been_or_not(own: OwnData) -> None:
    way = Way("clip", SPEC, own)
    for scores in ({}, by_clip(0.5, 0.3), by_clip(0.5, 0.3) | {"failed": 1}):
        assert way_in(score_tags(way, scores)) == way
    oracle = Way("oracle", SPEC.but(seed=3))
    for scores in ({}, ORACLE, ORACLE | {"failed": 1}):
        assert way_in(score_tags(oracle, scores)) == oracle
    assert way_in({}) == Way("oracle", EvaluationSpec())  # of before the way of the oracle was written down


def test_only_scores_of_one_judge_on_the_same_captions_are_compared(own: OwnData) -> None:
    clip, oracle = Way("clip", SPEC, own), Way("oracle", SPEC)
    low = version(1, score_tags(clip, by_clip(0.4, 0.30)))
    high = version(2, score_tags(clip, by_clip(0.6, 0.25)))
    assert worse(high, low) == ""
    assert "60.0% of 8 found by a CLIP" in worse(low, high)
    shapes = version(3, score_tags(oracle, ORACLE))
    assert "judged by the oracle, its holder by the clip" in worse(shapes, low)
    assert "judged by the clip, its holder by the oracle" in worse(high, shapes)
    other = Way("clip", SPEC, own._replace(clip="ViT-B-32/openai"))
    assert "two CLIPs" in worse(high, version(4, score_tags(other, by_clip(0.1, 0.1))))
    nearer = version(5, score_tags(clip, by_clip(0.6, 0.26)))
    assert worse(nearer, high) == ""
    assert worse(high, nearer)


def test_scores_of_pictures_that_were_computed_in_other_numbers_are_not_compared(own: OwnData) -> None:
    for way, scores in ((Way("clip", SPEC, own), by_clip(0.4, 0.30)), (Way("oracle", SPEC), ORACLE)):
        half, full = (score_tags(way, scores | {"precision": numbers}) for numbers in ("bf16", "fp32"))
        of_before = score_tags(way, scores | {"precision": ""})
        why = worse(version(1, half), version(2, full))
        assert "the candidate was painted in bf16, its holder in fp32" in why
        for candidate, holder in ((half, half), (half, of_before), (of_before, full)):
            assert "painted in" not in worse(version(1, candidate), version(2, holder))


def test_an_endpoint_of_which_no_run_is_known_is_judged_by_data_and_judge_together(own: OwnData) -> None:
    assert way_by(SPEC, "") == Way("oracle", SPEC)
    assert way_by(SPEC.but(judge=own.clip), own.data) == Way("clip", SPEC.but(judge=own.clip), own)
    for words in (["--data", own.data], ["--judge", own.clip]):
        done = CliRunner().invoke(main, ["eval", "--url", "http://127.0.0.1:9", *words])
        assert (done.exit_code, "--data and --judge go together" in done.stderr) == (2, True)


def test_scores_that_lack_pictures_are_told_and_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.evaluate.judge_endpoint", lambda *_, **__: ORACLE | {"failed": 3})
    done = CliRunner().invoke(main, ["eval", "--url", "http://127.0.0.1:9", "--json"])
    assert json.loads(done.stdout)["failed"] == 3
    assert done.exit_code == 70
    assert "3 of 8 pictures did not come, so the cascade is not judged" in json.loads(done.stderr)["error"]


def test_tags_are_short_enough_for_mlflow(own: OwnData) -> None:
    tags = score_tags(Way("clip", SPEC, own), by_clip(0.5, 0.3))
    assert all(len(value) < 5000 for value in tags.values())
    assert json.loads(tags["score.way"])["own"]["taught"] is False


def test_scores_are_told_one_a_line_with_their_intervals() -> None:
    lines = listed(ORACLE | {"colour": None, "precision": "bf16"}).splitlines()
    assert lines == ["all: 0.500 (0.200 to 0.800)", "n: 8", "failed: 0", "precision: bf16"]
