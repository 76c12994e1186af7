"""`ddiff train`: at its end it says where everything lies."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.recipes import smoke
from jobs.train import summary_of
from workflows.journal import Journal
from workflows.storage import Home

PAGE = "http://mlflow:5000/#/experiments/7/runs/abc"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are kept; training is to leave one checkpoint, and MLflow to show its page."""

    def leave(spec: Any, stage: str, *, run: Home, tracked: Any) -> None:
        run.at(f"{stage}/checkpoints").write("step-00000012/state.json", "{}")
        run.write("seconds.json", json.dumps({stage: 12.3, "total": 20.0}))

    tracking = SimpleNamespace(journal=Journal(tmp_path / "journal"), book=SimpleNamespace(page=lambda: PAGE))
    monkeypatch.setattr("jobs.tracked_run.tracked", lambda *_, **__: nullcontext(tracking))
    monkeypatch.setattr("jobs.train.ray_cluster", lambda **_: nullcontext())
    monkeypatch.setattr("jobs.train.run_stage", leave)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_where_everything_of_a_stage_lies_is_said_on_the_screen_and_in_json(runs: Path) -> None:
    shown, told = (
        CliRunner().invoke(main, ["train", "clip", "--recipe", "smoke", *more]) for more in ([], ["--json"])
    )
    assert shown.exit_code == told.exit_code == 0, shown.stderr + told.stderr
    here = runs / "smoke"
    assert shown.stdout.splitlines() == [
        "seconds:       12",
        f"bundle:        {here}/clip/bundle",
        f"checkpoints:   {here}/clip/checkpoints",
        f"directory:     {here}",
        f"mlflow:        {PAGE}",
    ]
    assert json.loads(told.stdout) == {
        "run": "smoke",
        "stage": "clip",
        "seconds": 12.3,
        "bundle": f"{here}/clip/bundle",
        "checkpoints": f"{here}/clip/checkpoints",
        "directory": str(here),
        "mlflow": PAGE,
    }


def test_of_a_run_in_a_store_its_addresses_are_said_and_of_what_there_is_not_nothing() -> None:
    summary = summary_of(Home.of("memory://bucket/runs/told"), smoke.run(), "clip", mlflow="")
    assert summary.text.splitlines()[1:] == [
        "bundle:        memory://bucket/runs/told/clip/bundle",
        "directory:     memory://bucket/runs/told",
    ]
    assert (summary.facts["checkpoints"], summary.facts["mlflow"]) == ("", "")
