"""`ddiff run`: what is left to do, what is told, and what it refuses before any work."""

import json
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from dd_core import sealed
from jobs import conclusion, planned_run, run, tracked_run
from jobs.cli import main
from jobs.endpoint import Address, Endpoint, alive, started_at
from jobs.evaluate import UnjudgedError, Way, look_ahead, way_of
from jobs.failures import PortTakenError
from jobs.fit import PlanError
from jobs.nodes import Node, Room
from jobs.plan import plan_of
from jobs.recipes import ddpm, smoke
from jobs.source_tags import source_tags
from serve import code
from tests.unit.workflows.tiny_run import prepared
from workflows.journal import JOURNAL, Journal, curves, entries
from workflows.parts import Part
from workflows.pictures import last_parts
from workflows.pipeline import RunResult
from workflows.report import SHEETS, data_of
from workflows.storage import Home

ORACLE = Way("oracle", smoke.run().evaluation)
NOBODY = Way("clip", smoke.run().evaluation)
GOOD = {"all": 0.5, "n": 8, "failed": 0, "intervals": {"all": [0.2, 0.8]}}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """The directory of a run."""
    (tmp_path / "smoke").mkdir()
    return Home.of(tmp_path / "smoke")


@pytest.fixture
def journal(home: Home) -> Journal:
    """That of the run itself."""
    return Journal(home.here / JOURNAL)


def made(home: Home) -> RunResult:
    """A run whose cascade is there; it cannot be opened, so that nothing is painted for the page."""
    return RunResult({}, home.at("cascade"), "d" * 64, {})


@pytest.mark.parametrize("stays", [True, False])
@pytest.mark.parametrize("before", [{}, GOOD])
@pytest.mark.parametrize("way", [ORACLE, NOBODY])
def test_a_cascade_is_judged_once_if_anybody_can_and_served_for_that_or_to_stay(
    way: Way, before: dict[str, Any], stays: bool
) -> None:
    judge = way is ORACLE and not before
    here = run.left_to_do(way, before, stays=stays, on_cluster=False)
    assert here == run.Left(serve=judge or stays, judge=judge)
    there = run.left_to_do(way, before, stays=stays, on_cluster=True)
    assert there == run.Left(serve=False, judge=False)  # what is on the air there stays


def test_of_a_run_on_a_cluster_it_is_said_how_to_judge_it(home: Home, journal: Journal) -> None:
    facts = conclusion.concluded(home, smoke.run(), made(home), ORACLE, {}, journal)
    text = conclusion.told(home, facts | {"mlflow": ""}, ORACLE, "")
    assert "not judged yet" in text
    assert "to judge it:   deploy it" in text
    assert json.loads((home.here / "summary.json").read_text()) == facts
    assert facts["oracle"] == {}


def test_scores_that_somebody_records_while_the_report_is_painted_stay(home: Home, journal: Journal) -> None:
    facts = conclusion.write_summary(home, smoke.run(), made(home), ORACLE, {})
    home.write("summary.json", json.dumps(facts | {"oracle": GOOD}))
    assert conclusion.concluded(home, smoke.run(), made(home), ORACLE, {}, journal)["oracle"] == GOOD
    other = made(home)._replace(digest="e" * 64)
    assert conclusion.write_summary(home, smoke.run(), other, ORACLE, {})["oracle"] == {}


def test_a_stage_asks_for_what_the_plan_found_on_nodes_that_ray_has_not_started_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = smoke.run()
    groups = [Node(name, 4, 1, 16 * 2**30) for name in "ab"]
    plan = plan_of(spec, groups, run="s3://b/runs/smoke")
    monkeypatch.setenv("DDIFF_NODE_GROUPS", "")
    assert planned_run.bound(spec, plan) is spec  # where all nodes are there, Ray knows them
    monkeypatch.setenv("DDIFF_NODE_GROUPS", "[]")
    planned = planned_run.bound(spec, plan)
    assert {(stage.use_gpu, stage.resources.cpus) for stage in planned.stages} == {(True, 1.0)}
    here = planned_run.as_planned(spec, plan_of(spec, [Node("c", 2, 0, 16 * 2**30)], run="s3://b/runs/smoke"))
    assert {stage.use_gpu for stage in here.stages} == {False}
    for before, after in zip(spec.stages, planned.stages, strict=True):
        assert before.shaping() == after.shaping()  # nothing is trained again for it
    assert planned.model_dump(exclude={"stages"}) == spec.model_dump(exclude={"stages"})


def test_who_keeps_files_of_a_run_in_a_store_is_asked_for_room_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("DDIFF_STORAGE", "memory://bucket/runs")
    monkeypatch.setattr(planned_run, "free_for", lambda *_: 2**40)
    node, spec = Node("there", 4, 0, 16 * 2**30), smoke.run()
    full = Room(node._replace(name="10.0.0.3"), 1000)
    monkeypatch.setattr(planned_run, "rooms_everywhere", lambda *_: [Room(node, 2**40), full])
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert [room.free for room in planned_run.announce(spec, [node]).rooms] == [2**40]  # here alone
    monkeypatch.setattr(planned_run, "nodes_of", lambda: [node])
    assert planned_run.rehearsed(spec, "clip").rooms == (Room(node, 2**40),)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not planned_run.rehearsed(spec, "clip").rooms  # which starts nothing, on a node least of all
    with pytest.raises(PlanError, match=r"disk: 10\.0\.0\.3 has 0\.0 MiB free in its TMPDIR, and memory://"):
        planned_run.announce(spec, [node])
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))  # where there is no copy of anything
    assert not planned_run.announce(spec, [node]).rooms


def test_an_endpoint_that_would_take_over_a_cluster_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    done = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--serve"])
    assert done.exit_code == 2
    assert "leave it out" in done.stderr
    assert "`ddiff submit deploy smoke@current`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["run"], ["train", "clip"]])
def test_a_dashboard_to_join_is_refused_before_any_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    done = CliRunner().invoke(main, [*words, "--recipe", "smoke"])
    assert done.exit_code == 2
    assert "http://head:8265 is a dashboard: hand the command to it with `ddiff submit`" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_endpoint_of_an_earlier_start_answers_until_the_plan_is_found_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    here = tmp_path / "smoke"
    here.mkdir()

    def no_room(*_: object) -> None:
        raise PlanError("no room")

    def begun(_: Home) -> None:
        raise RuntimeError("begun")

    monkeypatch.setattr(run, "announce", no_room)
    monkeypatch.setattr(run, "tracked_run", begun)
    caplog.set_level("INFO", "jobs")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1])
        left = Endpoint(process.pid, started_at(process.pid), address.url, "")
        (here / "endpoint.json").write_text(json.dumps(left._asdict()))
        with pytest.raises(PlanError):  # its own endpoint is no reason to refuse the port
            run.run_all(smoke.run(), address=address, verbose=False)
        assert alive(left)
        monkeypatch.setattr(run, "announce", lambda *_: None)
        with pytest.raises(RuntimeError, match="begun"):
            run.run_all(smoke.run(), address=address, verbose=False)
        assert process.wait(timeout=10) != 0
        assert f"the endpoint at {address.url}, left by an earlier start, is stopped" in caplog.text
        with pytest.raises(PortTakenError):
            run.run_all(smoke.run(), address=address, verbose=False)


@pytest.mark.parametrize("port", ["0", "99999"])
def test_a_port_that_there_is_not_is_refused_before_any_work(
    port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    done = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--serve", "--port", port])
    assert done.exit_code == 2
    assert f"{port} is not in the range 1<=x<=65535" in done.stderr
    assert not list(tmp_path.iterdir())


def test_only_scores_of_all_pictures_count_and_each_start_tells_what_the_last_could_not(
    home: Home, journal: Journal
) -> None:
    spec, ours = smoke.run(), made(home)
    short = {"all": 0.25, "n": 8, "failed": 3, "intervals": {"all": [0.1, 0.5]}}
    with pytest.raises(UnjudgedError, match="3 of 8 pictures did not come"):
        conclusion.concluded(home, spec, ours, ORACLE, short, journal)
    assert conclusion.judged_before(home, ours, ORACLE) is None
    assert not curves(journal.path)
    (model,) = [entry for entry in entries(journal.path) if entry.kind == "model"]
    assert model.value["tags"].keys() == {"bundle_sha256", "score.by", "score.way"}  # and no score

    assert conclusion.concluded(home, spec, ours, ORACLE, GOOD, journal)["oracle"] == GOOD
    assert conclusion.judged_before(home, ours, ORACLE) == GOOD
    assert conclusion.judged_before(home, ours._replace(digest="e" * 64), ORACLE) is None
    assert curves(journal.path) == {"oracle/all": {0: 0.5}}

    journal.path.write_text("")  # as if killed when the page was there and its lines were not
    for _ in range(2):
        conclusion.concluded(home, spec, ours, ORACLE, GOOD, journal)
        said = [entry for entry in entries(journal.path) if entry.kind == "model"]
        assert [entry.value["tags"]["score.all"] for entry in said] == ["0.5"]


def test_a_run_says_by_which_code_and_command_it_was_made(
    home: Home, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tracked_run, "tracked", lambda *_, **__: nullcontext(SimpleNamespace(journal=journal))
    )
    monkeypatch.setattr("sys.argv", ["/somewhere/ddiff", "run", "--recipe", "smoke"])
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    asked = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(asked, check=False, cwd=code.ROOT, capture_output=True, text=True)
    with tracked_run.tracked_run(home):
        (said,) = [entry.value for entry in entries(journal.path) if entry.kind == "tags"]
    assert (said["mlflow.source.name"], said["mlflow.user"]) == ("ddiff run --recipe smoke", "ada")
    assert said.get("mlflow.source.git.commit", "") == head.stdout.strip()
    assert said["ddiff.code"] == code.digest()
    monkeypatch.setattr(code, "ROOT", home.here)  # installed, and no checkout
    assert "mlflow.source.git.commit" not in source_tags()


def test_the_pictures_of_the_page_are_pictures_of_the_parent_run(home: Home, journal: Journal) -> None:
    for name in SHEETS[:3]:
        (home.here / f"{name}.png").write_bytes(b"a picture")
    conclusion.concluded(home, smoke.run(), made(home), ORACLE, GOOD, journal)
    said = [entry for entry in entries(journal.path) if entry.kind == "picture"]
    assert [(entry.name, entry.value, entry.step) for entry in said] == [
        (name, f"{name}.png", 0) for name in SHEETS[:3]
    ]


def test_own_data_are_judged_by_a_clip_alone_and_again_when_the_judge_is_another(
    home: Home, journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = smoke.run()
    prepared(tmp_path / "mine")
    for name in ("smoke/clip/bundle", "judge"):
        (tmp_path / name).mkdir(parents=True)
        sealed.seal(tmp_path / name, {}, {"content": name})
    mine = spec.but(shapes=None, pairs=spec.pairs.but(destination=str(tmp_path / "mine/data/prepared")))
    figures = {"cosine": 0.25, "r_precision": 0.5, "true_cosine": 0.5, "true_r_precision": 0.75}
    about = {"n": 8, "failed": 0, "among": 8, "held_out": False}
    judge = {"name": "clip", "digest": "d", "taught": True}
    good = figures | about | {"judge": judge, "intervals": {name: [0.1, 0.9] for name in figures}}
    way, ours = way_of(mine, home), made(home)
    look_ahead(mine, way)
    assert "judged by captions that it was trained on" in caplog.text
    for _ in range(2):  # the second start finds it judged
        facts = conclusion.concluded(home, mine, ours, way, good, journal)
        assert facts["clip"] == conclusion.judged_before(home, ours, way) == good
        assert "oracle" not in json.loads((home.here / "summary.json").read_text())
    text = conclusion.told(home, facts | {"mlflow": ""}, way, "")
    assert "seen in training, by the cascade's own CLIP, which flatters" in text
    assert curves(journal.path) == {f"clip/{name}": {0: value} for name, value in figures.items()}
    tags = [entry.value["tags"] for entry in entries(journal.path) if entry.kind == "model"][-1]
    assert (tags["score.by"], tags["score.all"], tags["score.cosine"]) == ("clip", "0.5", "0.25")

    other = mine.but(evaluation=mine.evaluation.but(judge=str(tmp_path / "judge")))
    assert conclusion.judged_before(home, ours, way_of(other, home)) is None
    better = good | {"judge": {"name": "judge", "digest": "e", "taught": False}, "held_out": True}
    facts = conclusion.concluded(home, other, ours, way_of(other, home), better, journal)
    assert "held out, by the CLIP judge" in conclusion.told(
        home, facts | {"mlflow": ""}, way_of(other, home), ""
    )


def test_a_judge_that_there_is_not_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ours = smoke.run()
    mine = ours.but(shapes=None, evaluation=ours.evaluation.but(judge="runs/absent"))
    with pytest.raises(ValueError, match=r"evaluation\.judge: 'runs/absent' is no bundle"):
        run.run_all(mine, address=None, verbose=False)
    assert not list(tmp_path.rglob(JOURNAL))


def test_own_data_without_any_clip_are_judged_by_nobody(home: Home, journal: Journal) -> None:
    mine = ddpm.run().but(shapes=None)
    way = way_of(mine, home)
    assert not way.possible
    facts = conclusion.concluded(home, mine, made(home), way, {}, journal)
    assert facts["clip"] == {}
    text = conclusion.told(home, facts | {"mlflow": ""}, way, "")
    assert "not judged: none of its stages is a CLIP" in text


def test_a_report_shows_captions_of_its_own_world(tmp_path: Path) -> None:
    ours, home = smoke.run(), Home.of(tmp_path / "run")
    assert len(conclusion.prompts_of(ours)) == ours.evaluation.captions == 8
    many = ours.but(evaluation=ours.evaluation.but(captions=40))
    assert len(conclusion.prompts_of(many)) == 16
    assert conclusion.data_of(home, ours) == home.at("data/prepared")
    mine = ours.but(shapes=None, pairs=ours.pairs.but(destination=str(tmp_path / "mine")))
    assert not conclusion.prompts_of(mine)  # then the report takes those of the data
    assert conclusion.data_of(home, mine).here == tmp_path / "mine"


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
    looked_at = data_of(home.here, {"data": conclusion.data_of(home, smoke.run()).address})
    shutil.rmtree(looked_at, ignore_errors=True)  # of an earlier test
    conclusion.gather_data(home, smoke.run())
    found = sorted(path.name for path in looked_at.glob("part-*"))
    assert found == ["part-00001-1a2b3c4d.parquet"] == last_parts(looked_at, 1)  # the last one is empty
