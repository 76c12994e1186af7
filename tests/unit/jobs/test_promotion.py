"""A candidate is judged in the way of its run before it may take an alias."""

from types import SimpleNamespace
from typing import Any

import pytest

from jobs import promotion
from jobs.deploy import DeployError
from jobs.evaluate import Way, score_tags
from workflows.clip_judge import OwnData
from workflows.evaluation_spec import EvaluationSpec
from workflows.registry import Version


def test_a_candidate_is_judged_as_its_run_says_before_it_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way("clip", EvaluationSpec(captions=7), OwnData("s3://bucket/data", "ViT-B-32/openai"))
    noted: dict[str, str] = {}
    candidate = Version("mine", "2", "there", "d" * 64, score_tags(way, {}))

    def note(version: Version, tags: dict[str, str]) -> Version:
        noted.update(tags)
        return version

    models = SimpleNamespace(version=lambda _: candidate, note=note, promote=lambda *_, **__: None)
    monkeypatch.setattr(promotion, "registry", lambda _: models)
    monkeypatch.setattr(promotion.running, "missing", lambda *_: "")
    asked: list[Way] = []

    def judged(url: str, how: Way, *, digest: str) -> dict[str, Any]:
        assert digest == candidate.digest
        asked.append(how)
        return {"r_precision": 0.5, "cosine": 0.3, "n": 7, "failed": 0, "intervals": {"r_precision": [0, 1]}}

    monkeypatch.setattr(promotion, "judge_endpoint", judged)
    monkeypatch.setattr(Way, "fingerprint", lambda _: "f")
    promotion.promote("mine@current", "production", force=False, url="http://x")
    assert asked == [way]
    assert (noted["score.by"], noted["score.all"], noted["score.evaluation"]) == ("clip", "0.5", "f")


@pytest.mark.parametrize(
    ("lacking", "failed", "said"),
    [
        ("serves cascade eeee", 0, "http://x/ does not serve mine@current: serves cascade eeee"),
        ("", 2, "http://x/: 2 of 7 pictures did not come; try again"),
    ],
)
def test_who_was_judged_elsewhere_or_in_part_takes_no_alias(
    lacking: str, failed: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way("clip", EvaluationSpec(captions=7), OwnData("s3://bucket/data", "ViT-B-32/openai"))
    candidate = Version("mine", "2", "there", "d" * 64, score_tags(way, {}))
    models = SimpleNamespace(
        version=lambda _: candidate,
        note=lambda *_: pytest.fail("scores were noted"),
        promote=lambda *_, **__: pytest.fail("it was promoted"),
    )
    scores = {"r_precision": 0.5, "n": 7, "failed": failed, "intervals": {"r_precision": [0, 1]}}
    asked: list[tuple[str, str]] = []

    def missing(url: str, digest: str) -> str:
        asked.append((url, digest))
        return lacking

    monkeypatch.setattr(promotion, "registry", lambda _: models)
    monkeypatch.setattr(promotion.running, "missing", missing)
    monkeypatch.setattr(
        promotion,
        "judge_endpoint",
        lambda *_, digest: (
            scores if digest == candidate.digest and not lacking else pytest.fail("it was judged")
        ),
    )
    with pytest.raises(DeployError) as refused:
        promotion.promote("mine@current", "production", force=True, url="http://x/")
    assert str(refused.value) == said
    assert asked == [("http://x", candidate.digest)]
