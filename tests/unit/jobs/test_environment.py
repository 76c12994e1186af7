"""The environment: secrets stay private, and what the user has set wins."""

import ast
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx
import pytest

from jobs import dashboard, environment, ray_session, signals
from jobs.failures import Code, StoppedError, code_of
from tests.answering import answering

ROOT = Path(environment.__file__).parents[1]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_object_store_is_larger_where_gpus_take_the_data(tmp_path: Path) -> None:
    assert ray_session.object_store_bytes(tmp_path) == ray_session.OBJECT_STORE_BYTES
    (tmp_path / "nvidia0").touch()
    (tmp_path / "shm").mkdir()
    free = shutil.disk_usage(tmp_path).free
    assert ray_session.object_store_bytes(tmp_path) == pytest.approx(max(2**30, free / 4), rel=0.05)


@pytest.mark.parametrize(
    ("proxy", "excepted", "found"),
    [
        ("", "intern", "intern"),
        ("http://proxy:3128", "", "localhost,127.0.0.1,::1"),
        ("http://proxy:3128", "intern, localhost", "intern,localhost,127.0.0.1,::1"),
        ("http://proxy:3128", "*", "*"),
    ],
)
def test_no_proxy_is_shown_what_is_for_this_machine(
    proxy: str, excepted: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", excepted)
    environment.reach_this_machine_directly()
    assert os.environ["NO_PROXY"] == found
    with httpx.Client() as client:
        for url in ("http://127.0.0.1:8265", "http://localhost:8265"):
            assert client._transport_for_url(httpx.URL(url)) is client._transport or not proxy


def test_a_new_token_can_be_read_by_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    token = tmp_path / ".ray" / "auth_token"
    ray_session.keep_token_private(token)
    assert mode(token) == 0o600
    assert len(token.read_text()) == 64


def test_a_token_that_is_there_is_kept_and_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    token = tmp_path / "auth_token"
    token.write_text("known")
    token.chmod(0o644)
    ray_session.keep_token_private(token)
    assert (token.read_text(), mode(token)) == ("known", 0o600)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "secret")])
def test_no_token_is_written_where_none_is_needed(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv(name, value)
    ray_session.keep_token_private(tmp_path / "auth_token")
    assert not (tmp_path / "auth_token").exists()


def test_a_variable_that_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    environment.prepare_environment()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_threads_soon_sleep_while_they_wait_here_and_in_a_job_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    environment.prepare_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    assert environment.for_the_cluster()["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    environment.prepare_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert environment.for_the_cluster()["GOMP_SPINCOUNT"] == "7"


def test_a_command_sets_its_environment_before_torch_is_loaded() -> None:
    environ = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    del environ["GOMP_SPINCOUNT"]
    words = [sys.executable, "-c", "from jobs.cli import main; main()", "config", "show", "--recipe", "smoke"]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


def test_sigterm_that_rays_own_handler_hears_is_told_as_any_other() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def begun() -> None:
        with signals.sigterm_kept():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as ray.init does
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError) as stopped:
        begun()
    assert code_of(stopped.value) is Code.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("times", "said"), [(0, ""), (5, ""), (6, "Ray did not start in 6 attempts; run again")]
)
def test_a_ray_whose_parts_wait_too_long_for_each_other_is_started_again_five_times(
    times: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[dict[str, object]] = []
    ended: list[None] = []

    def init(**how: object) -> None:
        started.append(how)
        if len(started) <= times:
            raise RuntimeError("The current node timed out during startup. This could happen because")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: ended.append(None))
    with pytest.raises(ray_session.RayStartError, match=said) if said else nullcontext():
        ray_session.start_ray(logging.ERROR, verbose=False)
    assert len(started) == min(times + 1, 6)
    assert {how["address"] for how in started} == {"local"}
    assert len(ended) == times
    assert caplog.text.count("Ray did not start in time, attempt") == times


def test_a_ray_that_fails_otherwise_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[None] = []

    def init(**_: object) -> None:
        started.append(None)
        raise RuntimeError("no such option")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RuntimeError, match="no such option"):
        ray_session.start_ray(logging.ERROR, verbose=False)
    assert len(started) == 1


OF_OUR_OWN = """
import os, signal, socket
from jobs.ray_session import ray_cluster
from jobs.machines import SKEW_WARN_S, rooms_everywhere, seen_everywhere

def heard(number, frame):
    raise InterruptedError

def sent(where):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except InterruptedError:
        print("heard", where, "Ray")

signal.signal(signal.SIGTERM, heard)
with ray_cluster():
    import ray

    sent("beside")
    port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    outside = None  # without a route nobody else can reach us
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(("203.0.113.1", 9)) == 0:  # nothing is sent
            outside = probe.getsockname()[0]
    for name, host in (("this machine", "127.0.0.1"), ("others", outside)):
        with socket.socket() as probe:
            print("open to", name, host is not None and probe.connect_ex((host, port)) == 0)
    for name, seen in seen_everywhere().items():
        print(name, "has a disk", seen.free > 0, "and our clock", abs(seen.skew_s) < SKEW_WARN_S)
    for node, free in rooms_everywhere("memory://bucket/runs/smoke", ["clip/bundle"]):
        print(node.name, "has CPUs", node.cpus >= 4, "and a disk", free > 0)
sent("after")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_our_own_starts_beside_one_left_here_listens_here_alone_and_sigterm_is_heard() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short:  # sockets need short paths
        left = Path(short) / "ray" / "ray_current_cluster"  # as `ray start` writes it
        left.parent.mkdir()
        left.write_text("127.0.0.1:1")
        environ = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": short, "RAY_ADDRESS": ""}
        environ.pop(environment.LOOPBACK, None)
        words = [sys.executable, "-c", OF_OUR_OWN]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    said = [
        *("heard beside Ray", "open to this machine True", "open to others False"),
        *("127.0.0.1 has a disk True and our clock True", "127.0.0.1 has CPUs True and a disk True"),
        "heard after Ray",
    ]
    assert done.stdout.splitlines() == said, done.stderr


def test_addresses_come_from_the_environment_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DDIFF_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    assert environment.runs() == "runs"
    assert environment.tracking_uri() is None
    assert not environment.joins_cluster()
    monkeypatch.setenv("DDIFF_STORAGE", "/elsewhere")
    assert environment.runs() == "/elsewhere"


def test_a_secret_that_is_too_long_for_a_path_or_is_none_stays_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("")
    for name, value in {
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "SOME_API_KEY": "k" * 5000,
        "OTHER_KEY": "line\n" * 99,
    }.items():
        monkeypatch.setenv(name, value)
    found = environment.secrets_here()
    assert (found["SOME_API_KEY"], len(found["OTHER_KEY"])) == ("k" * 5000, 494)
    assert "RAY_AUTH_TOKEN_PATH" not in found
    assert not environment.names_a_file("a\0b")


def test_secrets_are_known_by_many_names_and_plain_values_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DB_PASS", "DB_PWD", "SENTRY_DSN", "AZURE_STORAGE_CONNECTION_STRING", "MY_TOKEN"):
        monkeypatch.setenv(name, "hunt2r")
        assert environment.secrets_here()[name] == "hunt2r"
    for value in ("", "1", "4096", "true", "abc"):
        monkeypatch.setenv("MY_TOKEN", value)
        assert "MY_TOKEN" not in environment.secrets_here()
    assert "PWD" not in environment.secrets_here()


def test_the_address_of_a_cluster_ends_with_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert environment.cluster_address() == "http://head:8265"


@pytest.mark.parametrize("place", ["", "runs", "./runs"])
def test_a_job_keeps_no_run_in_its_own_folder(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", place)
    assert environment.runs() == (place or "runs")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"lies in the folder of this job, .*: set DDIFF_STORAGE"):
        environment.runs()
    for other in ("s3://bucket/runs", "/data/runs"):
        monkeypatch.setenv("DDIFF_STORAGE", other)
        assert environment.runs() == other


def test_a_job_is_not_told_of_a_folder_beside_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", "runs")
    with pytest.raises(ValueError, match="DDIFF_STORAGE=runs is a folder beside this one"):
        environment.for_the_cluster()
    for there in ("s3://bucket/runs", "/data/runs"):
        monkeypatch.setenv("DDIFF_STORAGE", there)
        assert environment.for_the_cluster()["DDIFF_STORAGE"] == there
    monkeypatch.delenv("DDIFF_STORAGE")  # the nodes have one of their own
    assert "DDIFF_STORAGE" not in environment.for_the_cluster()


def test_a_dashboard_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ValueError, match="is a dashboard: hand the command to it with `ddiff submit`"):
        ray_session.ray_cluster().__enter__()


def test_the_experiment_of_mlflow_is_honoured_and_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert environment.experiment() == "ddiff"
    assert "MLFLOW_EXPERIMENT_NAME" not in environment.for_the_cluster()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "colours")
    assert environment.experiment() == "colours"
    assert environment.for_the_cluster()["MLFLOW_EXPERIMENT_NAME"] == "colours"


class Anybody(BaseHTTPRequestHandler):
    """A dashboard that asks for no token."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")


def test_a_cluster_elsewhere_that_asks_for_no_token_is_not_joined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with answering(Anybody) as address:
        head = address.removeprefix("http://")
        ray_session.refuse_open_cluster(head)
        assert (
            "unless a tunnel leads elsewhere" in caplog.text
        )  # a port that is forwarded looks as if it were here
        monkeypatch.setattr(dashboard, "is_here", lambda _: False)
        with pytest.raises(ValueError, match=r"runs code for anybody .* or set RAY_AUTH_MODE=disabled"):
            ray_session.refuse_open_cluster(head)
        ray_session.refuse_open_cluster(None)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        ray_session.refuse_open_cluster(head)


HANDS_ON = {f"workflows/{name}.py" for name in ("fit", "process_group", "tracking")}
"""These set variables for Ray, PyTorch and MLflow."""


def names_in(source: str) -> set[str]:
    """Attributes that are read, and names that are imported from elsewhere."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_nobody_else_takes_settings_from_the_environment() -> None:
    """Others may hand a default to a library there, never read one for themselves."""
    for form in ("import os\nos.environ", "from os import getenv as g", "from os import environ"):
        assert names_in(form) & {"environ", "getenv"}
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("dd_core", "serve", "workflows", "jobs")
        for path in (ROOT / package).rglob("*.py")
        if names_in(path.read_text()) & {"environ", "environb", "getenv", "getenvb"}
    }
    assert found == HANDS_ON | {"jobs/environment.py"}


@pytest.mark.parametrize("place", ["s3//bucket/runs", "s3:/bucket/runs", "gs//bucket"])
def test_an_address_with_a_sign_missing_is_no_folder(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", place)
    with pytest.raises(ValueError, match=f"DDIFF_STORAGE={place} is no path; write an address as s3://"):
        environment.runs()


@pytest.mark.parametrize("place", ["s3://bucket/runs", "runs//mine", "/data//runs", "runs", "s3/runs"])
def test_every_other_place_is_taken_as_it_is(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", place)
    assert environment.runs() == place


def test_only_the_store_of_a_ray_of_our_own_is_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, waits in (("", "120"), ("10.0.0.1:6379", None)):  # one that does not answer is told of soon
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.delenv(environment.STORE_WAIT, raising=False)
        environment.prepare_environment()
        assert os.environ.get(environment.STORE_WAIT) == waits
