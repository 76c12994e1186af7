"""A candidate is judged in the way of its run before it may take an alias."""

from types import SimpleNamespace
from typing import Any

import pytest

from jobs import promotion
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
    monkeypatch.setattr(promotion.app, "missing", lambda *_: "")
    asked: list[Way] = []

    def judged(url: str, how: Way) -> dict[str, Any]:
        asked.append(how)
        return {"r_precision": 0.5, "cosine": 0.3, "n": 7, "failed": 0, "intervals": {"r_precision": [0, 1]}}

    monkeypatch.setattr(promotion, "judge_endpoint", judged)
    monkeypatch.setattr(Way, "fingerprint", lambda _: "f")
    promotion.promote("mine@current", "production", force=False, url="http://x")
    assert asked == [way]
    assert (noted["score.by"], noted["score.all"], noted["score.evaluation"]) == ("clip", "0.5", "f")
