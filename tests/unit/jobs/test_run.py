"""`ddiff run`: what it does on a cluster that others use too."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from dd_core import sealed
from jobs import run
from jobs.cli import main
from jobs.nodes import Node
from jobs.plan import plan_of
from jobs.recipes import ddpm, smoke
from jobs.run import report
from workflows.journal import JOURNAL, Journal, curves, entries
from workflows.parts import Part
from workflows.pictures import last_parts
from workflows.pipeline import RunResult
from workflows.report import SHEET, data_of
from workflows.storage import Home


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that makes any run at once, and the directory that it shares."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def made(spec: Any, *, run: Any, tracked: Any) -> RunResult:
        return RunResult({}, run.at("cascade"), "d" * 64, {})

    @contextmanager
    def untracked(home: Any, **_: Any) -> Iterator[Any]:
        yield SimpleNamespace(book=SimpleNamespace(page=lambda: ""))

    def joining(*, verbose: bool) -> Any:
        return nullcontext()

    def served(*_: Any) -> str:
        pytest.fail("something was put on the air")

    monkeypatch.setattr(run, "run_pipeline", made)
    monkeypatch.setattr(run, "tracked", untracked)
    monkeypatch.setattr(run, "start_endpoint", served)
    monkeypatch.setattr(run, "ray_cluster", joining)
    monkeypatch.setattr(run, "joined", list)
    for name in ("announce", "report"):
        monkeypatch.setattr(run, name, lambda *_: None)
    return tmp_path


def test_a_run_on_a_cluster_leaves_what_is_on_the_air_there_and_is_judged_later(cluster: Path) -> None:
    done = run.run_all(smoke.run(), address=None, verbose=False)
    assert "not judged yet" in done.text
    assert "to judge it:   deploy it" in done.text
    assert done.facts["oracle"] == {}
    assert (cluster / "smoke" / "summary.json").exists()


def test_a_stage_asks_for_what_the_plan_found_on_nodes_that_ray_has_not_started_yet() -> None:
    spec = smoke.run()
    groups = [Node(name, 4, 1, 16 * 2**30) for name in "ab"]
    planned = run.as_planned(spec, plan_of(spec, groups, run="s3://b/runs/smoke"))
    assert {(stage.use_gpu, stage.resources.cpus) for stage in planned.stages} == {(True, 1.0)}
    here = run.as_planned(spec, plan_of(spec, [Node("c", 2, 0, 16 * 2**30)], run="s3://b/runs/smoke"))
    assert {stage.use_gpu for stage in here.stages} == {False}
    for before, after in zip(spec.stages, planned.stages, strict=True):
        assert before.shaping() == after.shaping()  # nothing is trained again for it
    assert planned.model_dump(exclude={"stages"}) == spec.model_dump(exclude={"stages"})


@pytest.mark.parametrize("groups", ["", "[]"])
def test_only_where_nodes_start_on_demand_the_plan_decides(
    groups: str, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[Any] = []
    monkeypatch.setenv("DDIFF_NODE_GROUPS", groups)
    monkeypatch.setattr(run, "as_planned", lambda spec, plan: bound.append(plan) or spec)
    run.run_all(smoke.run(), address=None, verbose=False)
    assert len(bound) == bool(groups)


def test_an_endpoint_that_would_take_over_a_cluster_is_refused_before_any_work(cluster: Path) -> None:
    done = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--serve"])
    assert done.exit_code == 2
    assert "leave it out" in done.stderr
    assert "`ddiff submit deploy smoke@current`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(cluster.iterdir())


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_there_is_not_is_refused_before_any_work(
    port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    done = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--serve", "--port", port])
    assert done.exit_code == 2
    assert f"{port} is not in the range 1<=x<=65535" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def alone(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine that makes any run at once; what its judge is going to say."""
    monkeypatch.delenv("RAY_ADDRESS")
    scores: list[dict[str, Any]] = []

    @contextmanager
    def tracked(home: Any, **_: Any) -> Iterator[Any]:
        yield SimpleNamespace(journal=Journal(home.here / JOURNAL), book=SimpleNamespace(page=lambda: ""))

    def reported(here: Path, **_: Any) -> Path:
        (here / "report.html").write_text("")
        return here / "report.html"

    monkeypatch.setattr(run, "tracked", tracked)
    monkeypatch.setattr(run, "report", report)
    monkeypatch.setattr(run, "write_report", reported)
    monkeypatch.setattr(run, "this_machine", list)
    monkeypatch.setattr(run, "endpoint", lambda *_: nullcontext("http://here"))
    monkeypatch.setattr(run, "judged", lambda *_: scores.pop(0))
    return scores


def test_only_scores_of_all_pictures_count_and_each_start_tells_what_the_last_could_not(
    cluster: Path, alone: list[dict[str, Any]]
) -> None:
    journal = cluster / "smoke" / JOURNAL
    good = {"all": 0.5, "n": 8, "failed": 0, "intervals": {"all": [0.2, 0.8]}}
    alone += [{"all": 0.25, "n": 8, "failed": 3, "intervals": {"all": [0.1, 0.5]}}, good]
    with pytest.raises(run.UnjudgedError, match="3 of 8 pictures did not come"):
        run.run_all(smoke.run(), address=None, verbose=False)
    assert not curves(journal)
    assert [entry.value["tags"].keys() for entry in entries(journal) if entry.kind == "model"] == [
        {"bundle_sha256"}
    ]

    assert run.run_all(smoke.run(), address=None, verbose=False).facts["oracle"] == good
    assert curves(journal) == {"oracle/all": {0: 0.5}}

    journal.write_text("")  # as if killed when the page was there and its lines were not
    for _ in range(2):
        run.run_all(smoke.run(), address=None, verbose=False)
        said = [entry for entry in entries(journal) if entry.kind == "model"]
        assert [entry.value["tags"]["score.all"] for entry in said] == ["0.5"]


def test_the_pictures_of_the_page_are_a_picture_of_the_parent_run(
    cluster: Path, alone: list[dict[str, Any]]
) -> None:
    alone.append({"all": 0.5, "n": 8, "failed": 0, "intervals": {"all": [0.2, 0.8]}})
    (cluster / "smoke").mkdir()
    (cluster / "smoke" / SHEET).write_bytes(b"a picture")
    run.run_all(smoke.run(), address=None, verbose=False)
    said = [entry for entry in entries(cluster / "smoke" / JOURNAL) if entry.kind == "picture"]
    assert [(entry.name, entry.value, entry.step) for entry in said] == [("prompts", SHEET, 0)]


def test_own_data_are_judged_by_a_clip_alone_and_again_when_the_judge_is_another(
    cluster: Path,
    alone: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, journal, tried = smoke.run(), cluster / "smoke" / JOURNAL, list[str]()
    monkeypatch.setattr(run, "judge_of", tried.append)
    for name in ("mine", "smoke/clip/bundle", "judge"):
        (cluster / name).mkdir(parents=True)
        sealed.seal(cluster / name, {}, {"content": name})
    mine = ours.but(shapes=None, pairs=ours.pairs.but(destination=str(cluster / "mine")))
    figures = {"cosine": 0.25, "r_precision": 0.5, "true_cosine": 0.5, "true_r_precision": 0.75}
    about = {"n": 8, "failed": 0, "among": 8, "held_out": False}
    good = (
        figures
        | about
        | {
            "judge": {"name": "clip", "digest": "d", "taught": True},
            "intervals": {name: [0.1, 0.9] for name in figures},
        }
    )
    alone += [good, good | {"judge": {"name": "judge", "digest": "e", "taught": False}, "held_out": True}]
    for _ in range(2):  # the second start finds it judged
        done = run.run_all(mine, address=None, verbose=False)
        assert done.facts["clip"] == good
        assert "oracle" not in json.loads((cluster / "smoke" / "summary.json").read_text())
    assert "seen in training, by the cascade's own CLIP, which flatters" in done.text
    assert "judged by captions that it was trained on" in caplog.text
    assert curves(journal) == {f"clip/{name}": {0: value} for name, value in figures.items()}
    tags = [entry.value["tags"] for entry in entries(journal) if entry.kind == "model"][-1]
    assert (tags["score.by"], tags["score.all"], tags["score.cosine"]) == ("clip", "0.5", "0.25")

    other = mine.but(evaluation=mine.evaluation.but(judge=str(cluster / "judge")))
    text = run.run_all(other, address=None, verbose=False).text
    assert "held out, by the CLIP judge" in text
    assert tried == [str(cluster / "judge")]
    assert not alone


def test_a_judge_that_there_is_not_is_said_before_any_work(
    cluster: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_pipeline", lambda *_, **__: pytest.fail("it was begun"))
    ours = smoke.run()
    mine = ours.but(shapes=None, evaluation=ours.evaluation.but(judge="runs/absent"))
    with pytest.raises(ValueError, match=r"evaluation\.judge: 'runs/absent' is no bundle"):
        run.run_all(mine, address=None, verbose=False)


def test_own_data_without_any_clip_are_judged_by_nobody_and_painted_by_no_endpoint(
    cluster: Path, alone: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "endpoint", lambda *_: pytest.fail("something was served"))
    mine = ddpm.run().but(shapes=None)
    done = run.run_all(mine, address=None, verbose=False)
    assert done.facts["clip"] == {}
    assert "not judged: none of its stages is a CLIP" in done.text


def test_a_report_shows_captions_of_its_own_world(tmp_path: Path) -> None:
    ours, home = smoke.run(), Home.of(tmp_path / "run")
    assert len(run.prompts_of(ours)) == 16 or len(run.prompts_of(ours)) == ours.evaluation.captions
    assert run.data_of(home, ours) == home.at("data/prepared")
    mine = ours.but(shapes=None, pairs=ours.pairs.but(destination=str(tmp_path / "mine")))
    assert not run.prompts_of(mine)  # then the report takes those of the data
    assert run.data_of(home, mine).here == tmp_path / "mine"


def test_the_page_of_a_run_in_a_store_has_its_data_where_it_looks_for_them() -> None:
    home = Home.of("memory://bucket/runs/gathered")
    kept = {"part-00000.parquet": 9, "part-00001-1a2b3c4d.parquet": 20, "part-00002.parquet": 0}
    parts = [
        Part(shard=n, url="x", file=file, rows=20, kept=many, rejects={}, bytes=2, sha256="").model_dump()
        for n, (file, many) in enumerate(kept.items())
    ]
    for name in kept:
        home.at("data/prepared").write(name, "{}")
    home.at("data/prepared").write("manifest.json", json.dumps({"parts": parts}))
    looked_at = data_of(home.here, {"data": run.data_of(home, smoke.run()).address})
    shutil.rmtree(looked_at, ignore_errors=True)  # of an earlier test
    run.gather_data(home, smoke.run())
    found = sorted(path.name for path in looked_at.glob("part-*"))
    assert found == ["part-00001-1a2b3c4d.parquet"] == last_parts(looked_at, 1)  # the last one is empty
