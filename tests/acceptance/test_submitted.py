"""Jobs that are not a whole run: preparing, training one stage, stopped at work and gone on with; and who
is let in to the dashboard that takes them."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from dd_core import sealed
from jobs import dashboard
from jobs.cli import main
from tests.ray_head import Head, ray_head
from workflows.own_store import store_of
from workflows.storage import Home

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore"),  # Ray's and MLflow's, of themselves
]
STEPS = 300
TRAIN = (
    "submit", "train", "upsampler", "--recipe", "smoke", "--set", "shapes.pairs=32",
    "--set", f"stages.upsampler.budget.steps={STEPS}",
    "--set", "stages.upsampler.budget.report_every=5",
    "--set", "stages.upsampler.budget.checkpoint_every=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of a node: a job is begun by its `python`
    with ray_head(variables={"PATH": path}) as started:
        yield started


@pytest.fixture
def runs(head: Head, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are kept, by a user of that cluster."""
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dashboard, "TIMEOUT_S", 300.0)  # of a busy machine
    directory = tmp_path_factory.mktemp("runs")
    monkeypatch.setenv("DDIFF_STORAGE", str(directory))
    return directory


def ddiff(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def last_step(journal: Path) -> int:
    """That a training has told of."""
    text = journal.read_text() if journal.exists() else ""
    return max(map(int, re.findall(r'"train/loss", [^,]+, (\d+),', text)), default=0)


def test_pairs_are_prepared_by_a_job(runs: Path) -> None:
    assert ddiff("data", "shapes", "--out", str(runs / "raw"), "--pairs", "30", "--seed", "1").exit_code == 0
    config = runs / "pairs.yaml"
    config.write_text(
        f"kind: pairs\nshards: ['{runs}/raw/*.tar']\ndestination: {runs}/prepared\nsizes: [64]\n"
    )
    sent = ddiff("submit", "prepare", "--config", str(config), "--follow")
    assert sent.exit_code == 0, sent.stderr
    assert re.fullmatch(r"prepare-prepared-[0-9a-f]{8}\.1\n", sent.stdout)
    facts = sealed.verify(runs / "prepared").facts
    assert (facts["kept"], facts["rejected"]) == (30, 0)


def test_a_stage_is_trained_by_a_job_that_saves_itself_when_it_is_stopped(runs: Path) -> None:
    first = ddiff(*TRAIN)
    assert first.stdout == "smoke.1\n", first.stderr
    journal = runs / "smoke" / "upsampler" / "metrics.jsonl"
    end = time.monotonic() + 1500
    while last_step(journal) < 10:
        assert time.monotonic() < end, ddiff("logs", "smoke.1").stdout[-2000:]
        time.sleep(0.2)
    stopped = ddiff("stop", "smoke.1", "--json")
    assert stopped.exit_code == 0, stopped.stderr
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    saved = last_step(journal)
    assert 10 <= saved < STEPS
    names = sorted(path.name for path in (runs / "smoke" / "upsampler" / "checkpoints").iterdir())
    assert int(names[-1].removeprefix("step-")) >= saved  # none was due: it was saved because it was told

    again = ddiff(*TRAIN, "--follow")
    assert (again.exit_code, again.stdout) == (0, "smoke.2\n"), again.stderr
    begun = re.search(r"upsampler: continues at step (\d+)", again.stderr)
    assert begun is not None, again.stderr
    assert int(begun[1]) >= saved
    assert sealed.verify(runs / "smoke" / "upsampler" / "bundle").facts["step"] == STEPS
    for what, place in {"checkpoints": "smoke/upsampler/checkpoints", "directory": "smoke"}.items():
        assert re.search(rf"^{what}: +{runs / place}$", again.stderr, re.MULTILINE), again.stderr
    one_run_in_mlflow(f"sqlite:///{store_of(Home.of(runs / 'smoke'))}")


def one_run_in_mlflow(uri: str) -> None:
    """Assert that what was stopped and gone on with is one run, with a child that has every point once."""
    from mlflow import MlflowClient  # noqa: PLC0415 seconds

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("ddiff").experiment_id])
    (parent,) = [one for one in found if one.data.tags.get("kind") == "pipeline"]
    (child,) = [one for one in found if one is not parent]
    assert (parent.info.run_name, parent.info.status) == ("smoke", "FINISHED")
    assert (child.data.tags["stage"], child.info.status) == ("upsampler", "FINISHED")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    steps: dict[str, list[Any]] = {
        name: [point.step for point in client.get_metric_history(child.info.run_id, name)]
        for name in child.data.metrics
    }
    assert not [name for name, some in steps.items() if len(some) != len(set(some))]
    assert sorted(steps["train/loss"]) == list(range(5, STEPS + 1, 5))


OPEN = {
    *(("GET", "/"), ("GET", "/favicon.ico")),  # the page that asks for the token
    *(("GET", "/api/authentication_mode"), ("GET", "/api/gcs_healthz")),
}
"""Routes that say nothing of the cluster."""
OURS = {
    *(("GET", "/api/version"), ("GET", "/api/v0/nodes")),
    *(("GET", "/api/jobs/"), ("POST", "/api/jobs/"), ("POST", "/api/jobs/{job_or_submission_id}/stop")),
    *(("DELETE", "/api/jobs/{job_or_submission_id}"), ("GET", "/api/jobs/{job_or_submission_id}/logs/tail")),
    *(("PUT", "/api/packages/{protocol}/{package_name}"), ("PUT", "/api/serve/applications/")),
}
"""Some of those that the commands of ddiff use."""


def routes(head: Head) -> set[tuple[str, str]]:
    """Method and path of all that the dashboard answers to, as it has written into its log."""
    with httpx.Client(base_url=head.dashboard, headers=shown(head.token), timeout=300) as client:
        (node,) = client.get("/api/v0/nodes").json()["data"]["result"]["result"]
        asked = {"node_id": node["node_id"], "filename": "dashboard.log", "lines": "-1"}
        log = client.get("/api/v0/logs/file", params=asked).text
    return set(re.findall(r"Route \[([A-Z]+)\] <(?:Plain|Dynamic)Resource +(\S+?)>? ->", log))


def shown(token: str) -> dict[str, str]:
    """The header that shows a token."""
    return {"Authorization": f"Bearer {token}"}


def test_every_route_of_the_dashboard_asks_for_the_token(head: Head) -> None:
    found = routes(head)
    assert found >= OURS | OPEN
    assert len(found) > 50
    answers = {}
    with httpx.Client(base_url=head.dashboard, timeout=300) as client:
        for method, path in found:
            place = re.sub(r"{\w+}", "0", path)  # of nothing that there is; nor is there a body
            headers = ({}, shown("0" * 64), shown(head.token))
            answers[method, path] = [client.request(method, place, headers=one) for one in headers]
            client.cookies.clear()  # the right token brings one that opens every route
    assert {route for route, (bare, *_) in answers.items() if bare.status_code != 401} == OPEN
    for route in found - OPEN:
        bare, wrong, right = answers[route]
        assert (bare.status_code, wrong.status_code) == (401, 403), route
        disabled = right.status_code == 403 and "profiling" in right.text.lower()  # to anybody, by default
        assert disabled or right.status_code not in (401, 403), (route, right.text)
        assert head.token not in bare.text + wrong.text + right.text
