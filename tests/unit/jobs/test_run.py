"""`ddiff run`: what it does on a cluster that others use too."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import run
from jobs.cli import main
from jobs.recipes import smoke
from workflows.pipeline import RunResult


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster that makes any run at once, and the directory that it shares."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def made(spec: Any, *, run: Any, tracked: Any) -> RunResult:
        return RunResult({}, run.at("cascade"), "d" * 64, {})

    @contextmanager
    def untracked(home: Any, *, uri: str) -> Iterator[Any]:
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
