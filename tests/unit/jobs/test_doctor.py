"""ddiff doctor: each thing that can be wrong is made wrong, and found with its fix."""

import json
import socket
import sys
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from fsspec.registry import _registry
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from jobs import environment
from jobs.cli import main
from jobs.doctor import cluster, findings, gpu, installed, mlflow, mlflow_server, resources
from jobs.machines import Finding
from jobs.nodes import UNSTARTED
from jobs.plan import plan_of
from jobs.recipes import smoke
from tests.answering import answering
from tests.ray_head import free_ports
from tests.s3 import s3_server
from workflows.registry import Registry, RegistryError
from workflows.storage import store

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # MLflow's, of its own dependencies
NAMES = ["RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "DDIFF_NODE_GROUPS"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


def doctor(*words: str, code: int) -> dict[str, list[dict[str, Any]]]:
    """Check -> its findings."""
    port = str(free_ports(1)[0])
    done = CliRunner().invoke(main, ["doctor", "--json", *(words or ("--port", port))])
    assert done.exit_code == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["state"] == ("fail" if code else report["state"])
    found: dict[str, list[dict[str, Any]]] = {}
    for one in report["findings"]:
        assert one["state"] == "ok" or one["fix"], one
        found.setdefault(one["check"], []).append(one)
    return found


@pytest.mark.parametrize(("library", "state"), [(None, "warn"), (object(), "ok")])
def test_a_cpu_without_a_compiler_is_told_how_to_be_faster(
    library: object, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.machines.DRIVER", tmp_path / "none")
    monkeypatch.setattr("dd_core.compiled.compiled", lambda source: library)
    (found,) = gpu()
    assert (found.state, found.fix) == (state, "" if library else "apt-get install gcc libc6-dev")


def test_where_no_compiler_would_help_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.machines.DRIVER", tmp_path / "none")
    monkeypatch.setattr("jobs.machines.sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr("dd_core.compiled.compiled", lambda source: None)
    (found,) = gpu()
    assert (found.state, found.fix) == ("ok", "")
    assert "takes half as long again as on Linux" in found.says


def test_where_all_is_well_everything_is_tried_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    found = doctor(code=0)
    assert set(found) == {
        *("versions", "cluster", "resources", "storage", "disk", "mlflow", "gpu", "clock", "port")
    }
    assert "written, read and deleted" in found["storage"][0]["says"]
    assert not (tmp_path / "runs").exists()
    client = Registry(uri).client
    assert not client.search_registered_models()
    experiment = client.get_experiment_by_name("ddiff")
    assert not client.search_runs([experiment.experiment_id])
    stored = Path(experiment.artifact_location.removeprefix("file://"))
    assert not list(stored.rglob("*"))


def test_artifacts_that_may_be_stored_and_not_deleted_stop_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keeps(self: Any, artifact_path: str | None = None) -> None:
        raise PermissionError(13, "Permission denied", "probe.txt")

    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", keeps)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = findings("mlflow", mlflow)
    assert (found.state, "cannot delete the artifact: " in found.says) == ("warn", True)


def test_storage_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path / "file" / "runs"))
    found = doctor(code=2)
    assert found["storage"][0]["state"] == "fail"
    assert "DDIFF_STORAGE" in found["storage"][0]["fix"]


def test_a_bucket_is_written_to_and_a_missing_one_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DDIFF_STORAGE", "s3://bucket/runs")
        found = doctor(code=0)
        assert found["storage"][0]["says"].startswith("s3://bucket/runs: written, read and deleted")
        assert not fsspec.filesystem("s3").find("bucket")
        assert found["clock"][0]["says"].startswith(f"{environment['AWS_ENDPOINT_URL']} is ")
        monkeypatch.setenv("DDIFF_STORAGE", "s3://absent/runs")
        assert doctor(code=2)["storage"][0]["state"] == "fail"


class AnHourAhead(BaseHTTPRequestHandler):
    """A server whose clock is wrong."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"3.0.0")

    def date_time_string(self, timestamp: float | None = None) -> str:
        import time  # noqa: PLC0415

        return super().date_time_string(int(time.time()) + 3600)


@pytest.fixture
def fast_clock() -> Iterator[str]:
    with answering(AnHourAhead) as address:
        yield address


def test_a_clock_that_is_an_hour_off_is_a_failure(fast_clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", fast_clock)
    (clock,) = doctor(code=2)["clock"]
    assert clock["state"] == "fail"
    assert "+3600 s" in clock["says"] or "+3601 s" in clock["says"] or "+3599 s" in clock["says"]


def test_an_mlflow_that_is_away_and_a_cluster_that_is_away_are_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.setenv("RAY_ADDRESS", url)
        done = CliRunner().invoke(main, ["doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 2
    state = {one["check"]: one["state"] for one in report["findings"]}
    assert (state["mlflow"], state["cluster"], state["resources"]) == ("fail", "fail", "fail")


class Users(BaseHTTPRequestHandler):
    """An MLflow server with users, to whom alone it says what it is."""

    status, said = 401, b"You are not authenticated."

    def do_GET(self) -> None:
        good = self.headers["Authorization"] == "Basic " + b64encode(b"trainer:right").decode()
        version = good and self.path == "/version"
        self.send_response(200 if version else 404 if good else self.status)
        self.end_headers()
        self.wfile.write(f"{int(installed('mlflow').split('.')[0]) - 1}.0".encode() if version else self.said)

    do_POST = do_GET  # noqa: N815 the name that http.server calls


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with answering(Users) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address


def test_an_mlflow_that_asks_for_a_user_is_one_and_is_shown_the_user_of_this_environment(
    users: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    assert not list(mlflow_server(users))
    (refused,) = findings("mlflow", mlflow)
    assert refused.state == "fail"
    assert "cannot begin a run" in refused.says
    assert "401" in refused.says
    assert refused.fix.startswith("check MLFLOW_TRACKING_USERNAME")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "right")
    (older,) = mlflow_server(users)
    assert (older.state, older.fix) == ("warn", "use one major version")


def test_an_mlflow_that_does_not_know_its_own_name_is_no_question_of_users(
    users: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Users, "status", 403)
    assert not list(mlflow_server(users))
    monkeypatch.setattr(Users, "said", b"Invalid Host header - possible DNS rebinding attack detected")
    with pytest.raises(RegistryError, match="does not know this host name: Invalid Host header"):
        list(mlflow_server(users))


class Gate(BaseHTTPRequestHandler):
    """What answers at a cluster's address: a dashboard with only its head, or something before it."""

    status, ray = 200, installed("ray")

    def do_GET(self) -> None:
        known = self.path.partition("?")[0] in ("/api/version", "/api/authentication_mode", "/api/v0/nodes")
        shown = "Authorization" in self.headers
        self.send_response(200 if shown and known else self.status if known else 404)
        self.end_headers()
        head = {"node_ip": "10.0.0.2", "state": "ALIVE", "resources_total": {"memory": 2**33}}
        nodes = {"result": {"result": [head]}}
        self.wfile.write(json.dumps({"ray_version": self.ray, "data": nodes}).encode())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with answering(Gate) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 32)
        yield address


@pytest.mark.parametrize(
    ("status", "state", "said"),
    [
        (401, "ok", "asks for a token"),
        (403, "ok", "asks for a token"),
        (200, "fail", "runs code for anybody who reaches it"),
        (404, "fail", "/api/version says 404 to who shows no token"),
        (302, "fail", "/api/version says 302 to who shows no token"),
        (502, "fail", "/api/version says 502 to who shows no token"),
    ],
)
def test_only_a_refusal_is_a_closed_door(
    gate: str, status: int, state: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"{gate}/")
    monkeypatch.setattr(Gate, "status", status)
    (found, *_) = findings("cluster", cluster)
    assert (found.check, found.state) == ("cluster token", state)
    assert found.says.startswith(gate)
    assert said in found.says


def test_another_ray_is_installed_only_where_this_ddiff_goes_with_it(
    gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = installed("ray")
    monkeypatch.setattr(Gate, "ray", f"{ours}.1")
    *_, found = cluster()
    assert (found.state, found.says) == ("fail", f"{gate} runs Ray {ours}.1, here is Ray {ours}")
    assert found.fix == f"pip install ray=={ours}.1"
    for theirs in ("2.9.3", "3.0.0", "None"):
        monkeypatch.setattr(Gate, "ray", theirs)
        *_, found = cluster()
        assert found.fix == f"start the cluster with Ray {ours}, or use the ddiff that was made for {theirs}"


def test_a_ray_to_join_is_joined_and_its_dashboard_asked(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        monkeypatch.setattr(environment, "dashboard_of_joined", lambda: gate)
        monkeypatch.setattr(Gate, "status", 200)
        joined, door, *_ = findings("cluster", cluster)
        assert joined.says.endswith(f"was joined, as a run would; {gate}")
        assert (door.check, door.state) == ("cluster token", "fail")
        monkeypatch.setattr(environment, "dashboard_of_joined", lambda: "")
        (alone,) = findings("cluster", cluster)
        assert "no dashboard, so jobs cannot be handed to it" in alone.says


def test_a_head_that_nobody_listens_at_is_a_failure_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def joins() -> str:
        pytest.fail("Ray is asked, which waits a minute")

    monkeypatch.setattr(environment, "dashboard_of_joined", joins)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    (found,) = findings("cluster", cluster)
    assert (found.state, found.says[:38]) == ("fail", "nobody listens at RAY_ADDRESS 127.0.0.")
    assert found.fix.startswith("start Ray there")


def test_a_cluster_that_has_a_head_alone_so_far_is_a_warning(gate: str) -> None:
    (found,) = resources(plan_of(smoke.run(), [], run="s3://bucket/smoke"))
    assert (found.state, found.says) == ("warn", f"10.0.0.2: 0 CPU, 8.0 GiB: {UNSTARTED}")
    assert "DDIFF_NODE_GROUPS" in found.fix
    (known,) = resources(None)
    assert known.state == "ok"


def test_no_line_of_the_report_names_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@127.0.0.1:9")
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert "hunter2" not in done.stdout + done.stderr


@pytest.mark.parametrize("verbose", [True, False])
def test_the_traceback_of_a_check_that_breaks_is_shown_to_who_asks_for_it(
    verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[Finding]:
        raise RuntimeError("boom")

    monkeypatch.setattr("jobs.doctor.storage", broken)
    done = CliRunner().invoke(main, ["doctor", *(["-v"] if verbose else [])])
    assert done.exit_code == 2
    assert "storage        RuntimeError: boom\n" in done.stdout
    assert "fix: run again with -v for the traceback" in done.stdout
    assert ("Traceback" in done.stderr and "in broken" in done.stderr) == verbose


def test_a_run_that_does_not_fit_a_full_disk_and_a_taken_port_are_failures(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        much = [
            *("--set", "stages.clip.resources.memory_gib=100000", "--set", "stages.clip.keep_every=1"),
            *("--set", "stages.clip.budget.steps=10000000", "--set", "stages.clip.budget.checkpoint_every=1"),
        ]
        found = doctor("--recipe", "smoke", "--port", port, *much, code=2)
    assert "clip: 1 workers of" in found["resources"][0]["says"]
    assert "set micro_batch_size, or bring larger nodes" in found["resources"][0]["fix"]
    assert "checkpoints" in found["disk"][0]["says"]
    assert f"port {port}" in found["port"][0]["says"]


def test_what_is_installed_is_compared_with_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "ddiff-9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ddiff\nVersion: 9\n"
        "Requires-Dist: ray>=99\nRequires-Dist: no-such-thing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (wrong,) = doctor(code=2)["versions"]
    assert wrong["says"].startswith("ray 2.")
    assert "needs >=99; no-such-thing missing" in wrong["says"]
    assert wrong["fix"].startswith("pip install -c constraints.txt")


def test_addresses_that_are_misspelt_are_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:82a5")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:50o0")
    for name, check, address in (("cluster", cluster, "head:82a5"), ("mlflow", mlflow, "mlflow:50o0")):
        (line,) = findings(name, check)
        assert (line.check, line.state) == (name, "fail")
        assert line.says.startswith(f"'http://{address}/")
        assert "is no address of a dashboard" in line.says
        assert line.fix


@pytest.mark.parametrize(("kind", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_the_extra_that_a_store_needs_is_named(
    kind: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(_registry, kind, raising=False)  # where fsspec keeps what it has loaded
    store.cache_clear()
    monkeypatch.setenv("DDIFF_STORAGE", f"{kind}://bucket/runs")
    (line,) = doctor(code=2)["storage"]
    assert (line["state"], line["fix"]) == ("fail", f"install ddiff[{extra}]")
    config = f"{kind}://bucket/deployment.yaml"
    for words in (["deploy", "--config", config, "--dry-run"], ["run", "--recipe", "smoke"]):
        done = CliRunner().invoke(main, words)
        assert (done.exit_code, f"install ddiff[{extra}]" in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1
