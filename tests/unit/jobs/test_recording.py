"""Scores of a served cascade are kept where the cascade is known: in the registry, in MLflow, in its run."""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from jobs import evaluate, recording
from jobs.cli import main
from jobs.evaluate import Way, score_tags
from jobs.recording import judge_and_record, suited
from workflows.clip_judge import OwnData
from workflows.evaluation_spec import EvaluationSpec
from workflows.labels import LabelSpec
from workflows.painting_client import NoPainterError
from workflows.registry import Registry as RealRegistry
from workflows.registry import RegistryError, Version

DIGEST, ASKED = "d" * 64, Way("oracle", EvaluationSpec(captions=8))
GOOD = {"all": 0.5, "colour": None, "n": 8, "failed": 0, "intervals": {"all": [0.2, 0.8]}}


class Registry:
    """Knows one cascade, twice."""

    def __init__(self, run: Path) -> None:
        self.tags: dict[str, dict[str, str]] = {}
        self.metrics: dict[str, float] = {}
        self.known = [Version("a", str(n), str(run / "cascade"), DIGEST, {}, "run") for n in (2, 1)]

    def of_digest(self, digest: str) -> list[Version]:
        return self.known if digest == DIGEST else []

    def note(self, version: Version, tags: dict[str, str]) -> None:
        self.tags.setdefault(version.number, {}).update(tags)

    def log(self, _: Version, metrics: dict[str, float]) -> None:
        self.metrics |= metrics


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setattr(recording, "Registry", lambda uri: made)
    monkeypatch.setattr(recording, "served", lambda url: DIGEST)
    return made


def summary(run: Path, **facts: Any) -> Path:
    run.mkdir(exist_ok=True)
    (run / "summary.json").write_text(json.dumps({"digest": DIGEST, "oracle": {}} | facts))
    return run / "summary.json"


def judging(monkeypatch: pytest.MonkeyPatch, scores: dict[str, Any]) -> None:
    def judged(url: str, way: Way, *, keep: Path | None = None, digest: str) -> dict[str, Any]:
        assert digest == DIGEST
        if keep:
            keep.mkdir(parents=True)
            (keep / "verdicts.jsonl").write_text(str(scores))
        return scores

    for module in (recording, evaluate):
        monkeypatch.setattr(module, "judge_endpoint", judged)


def test_scores_of_what_the_run_asks_are_the_runs_and_those_of_other_questions_lie_beside(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging(monkeypatch, GOOD)
    path = summary(tmp_path / "run", evaluation=ASKED.fingerprint())
    assert judge_and_record("http://x", ASKED) == GOOD
    assert json.loads(path.read_text())["oracle"] == GOOD
    assert json.loads((tmp_path / "run/evaluation/scores.json").read_text()) == GOOD
    assert registry.metrics == {"oracle/all": 0.5}
    for number in ("1", "2"):
        assert registry.tags[number]["score.all"] == "0.5"
        assert registry.tags[number]["score.evaluation"] == ASKED.fingerprint()

    path = summary(tmp_path / "run", evaluation=ASKED.fingerprint())
    other = Way("oracle", ASKED.spec.but(seed=1))
    judge_and_record("http://x", other)
    assert json.loads(path.read_text())["oracle"] == {}
    assert (tmp_path / f"run/evaluation-{other.fingerprint()[:8]}/scores.json").exists()


@pytest.mark.usefixtures("registry")
def test_a_judging_that_is_cut_leaves_what_was_judged_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary(tmp_path / "run", evaluation=ASKED.fingerprint())
    kept = tmp_path / "run" / "evaluation" / "verdicts.jsonl"

    def cut(url: str, way: Way, *, keep: Path, digest: str) -> dict[str, Any]:
        keep.mkdir(parents=True)
        (keep / "00000.png").write_bytes(b"")
        raise KeyboardInterrupt

    for scores in (GOOD, GOOD | {"n": 7}):
        judging(monkeypatch, scores)
        judge_and_record("http://x", ASKED)
        monkeypatch.setattr(evaluate, "judge_endpoint", cut)
        with pytest.raises(KeyboardInterrupt):
            judge_and_record("http://x", ASKED)
        assert kept.read_text() == str(scores)
        assert {path.name for path in kept.parent.iterdir()} == {"scores.json", "verdicts.jsonl"}


def test_scores_that_lack_pictures_are_no_scores_of_a_version(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging(monkeypatch, GOOD | {"failed": 1})
    summary(tmp_path / "run")
    judge_and_record("http://x", ASKED)
    assert (registry.tags, registry.metrics) == ({}, {})


def test_of_an_endpoint_that_has_changed_meanwhile_nothing_is_kept(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(url: str, way: Way, *, keep: Path, digest: str) -> dict[str, Any]:
        assert digest == DIGEST
        raise NoPainterError(f"{url} was changed")

    path = summary(tmp_path / "run", evaluation=ASKED.fingerprint())
    kept = tmp_path / "run/evaluation/scores.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    monkeypatch.setattr(evaluate, "judge_endpoint", judged)
    with pytest.raises(NoPainterError, match="http://x was changed"):
        judge_and_record("http://x", ASKED)
    assert json.loads(path.read_text())["oracle"] == {}
    assert kept.read_text() == "{}"
    assert not registry.tags


def test_scores_of_a_run_of_another_machine_are_noted_and_nothing_is_made_here(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judging(monkeypatch, GOOD)
    assert judge_and_record("http://x", ASKED) == GOOD
    assert not (tmp_path / "run").exists()
    assert f"the run in {tmp_path / 'run'} is not on this machine" in caplog.text
    assert registry.tags["2"]["score.all"] == "0.5"


def test_a_run_that_has_gone_on_meanwhile_keeps_its_own_scores(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = summary(tmp_path / "run", evaluation=ASKED.fingerprint())
    judging(monkeypatch, GOOD)
    judged = recording.judge_and_keep

    def meanwhile(*asked: Any, digest: str) -> dict[str, Any]:
        summary(tmp_path / "run", evaluation=ASKED.fingerprint(), digest="e" * 64)
        return judged(*asked, digest=digest)

    monkeypatch.setattr(recording, "judge_and_keep", meanwhile)
    judge_and_record("http://x", ASKED)
    assert json.loads(path.read_text()) == {
        "digest": "e" * 64,
        "oracle": {},
        "evaluation": ASKED.fingerprint(),
    }
    assert registry.tags


def test_a_cascade_that_nobody_knows_is_judged_and_said_to_be_unknown(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judging(monkeypatch, GOOD)
    registry.known = []
    assert judge_and_record("http://x", ASKED) == GOOD
    assert "no MLflow knows cascade dddddddddddd" in caplog.text


def test_a_registry_that_is_away_is_named_with_the_cause_before_anything_is_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:  # a port at which nobody listens
        probe.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setattr(recording, "served", lambda url: DIGEST)
    monkeypatch.setattr(recording, "judge_endpoint", lambda *_, **__: pytest.fail("it was judged"))
    done = CliRunner().invoke(main, ["eval", "--url", "http://x", "--record"])
    assert (done.exit_code, done.stderr) == (
        2,
        f"ddiff: MLflow at {server} does not answer: Connection refused; start it, or set "
        "MLFLOW_TRACKING_URI to one that does\n",
    )
    registry, version = RealRegistry(server), Version("a", "1", "/runs/a/cascade", DIGEST, {}, "run")
    for act in (
        lambda: registry.note(version, {"score": "1"}),
        lambda: registry.log(version, {"score": 1.0}),
        lambda: registry.version("a"),
    ):
        with pytest.raises(RegistryError, match="does not answer: Connection refused"):
            act()


def test_what_serves_no_cascade_of_ours_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(*_: Any, **__: Any) -> httpx.Response:
        return httpx.Response(200, headers={"x-model-version": "' or 1=1"})

    monkeypatch.setattr(httpx.Client, "get", answers)
    with pytest.raises(NoPainterError, match="is no endpoint of ddiff"):
        recording.served("http://x")


def test_a_cascade_of_own_data_is_judged_by_these_whatever_number_of_captions_is_asked() -> None:
    own = OwnData("s3://bucket/data", "ViT-B-32/openai")
    said = score_tags(Way("clip", EvaluationSpec(captions=320), own), {})
    assert suited(ASKED, said) == Way("clip", EvaluationSpec(captions=8), own)
    assert suited(ASKED, {}) == ASKED
    mine = Way("clip", EvaluationSpec(captions=9), own._replace(clip="RN50/openai"))
    assert suited(mine, said) == mine


def test_a_cascade_of_classes_is_asked_for_those_of_its_run_by_whoever_judges_it() -> None:
    label = LabelSpec(path="label", classes=("cat", "dog"))
    said = score_tags(Way("oracle", EvaluationSpec(captions=16, label=label)), {})
    assert suited(ASKED, said).spec == ASKED.spec.but(label=label)
