"""A registered cascade on the Serve of a cluster with a token: deployed, promoted, rolled back.

The cluster's nodes and this process share an S3 server and nothing else.
"""

import concurrent.futures
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import httpx
import pytest
import ray.serve.schema
import yaml
from click.testing import CliRunner, Result

from jobs import dashboard
from jobs.cli import main
from serve import code
from tests.ray_head import Head, free_ports, ray_head
from tests.s3 import s3_server
from tests.unit.serve import tiny
from workflows.journal import Entry
from workflows.tracking import Book

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore"),  # MLflow's and Ray's
]
TWO_HOPS = tiny.CASCADE.but(hops=tiny.CASCADE.hops[1:])
"""So that two parts must change together; each part more takes seconds to start, at every deployment."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """How a store is reached; it holds one bucket.  The cluster's nodes have a TMPDIR of their own."""
    with s3_server() as environment:
        yield environment | {"TMPDIR": str(tmp_path_factory.mktemp("node"))}


@pytest.fixture(scope="module")
def head(s3: dict[str, str]) -> Iterator[Head]:
    with ray_head(variables=s3) as started:
        yield started


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def here(head: Head, s3: dict[str, str], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (head.environment | s3).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dashboard, "TIMEOUT_S", 300.0)  # of a busy machine
    monkeypatch.setenv("TMPDIR", str(store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    monkeypatch.setenv("DDIFF_STORAGE", "s3://bucket/runs")


def register(store: Path, run: Path, score: float, *, asked: str = "a", seed: int = 0) -> str:
    """Train nothing, and register the cascade as a run does when it has been judged."""
    digest = tiny.tiny_cascade(run, seed=seed, cascade=TWO_HOPS)
    tags = {
        "bundle_sha256": digest,
        "score.all": str(score),
        "score.low": str(score - 0.05),
        "score.high": str(score + 0.05),
        "score.captions": "320",
        "score.evaluation": asked,
    }
    value = {"source": str(run / "cascade"), "alias": "current", "tags": tags}
    book = Book(run, uri=f"sqlite:///{store}/mlflow.db")
    book.sender()([Entry("model", "tiny", value, 0, 0)])
    return digest


def ddiff(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def done(*words: str) -> dict[str, Any]:
    result = ddiff(*words, "--json")
    assert result.exit_code == 0, result.stderr
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def refused(result: Result, code: int, *said: str) -> None:
    assert result.exit_code == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for words in said:
        assert words in result.stderr


def painted_by(url: str) -> str:
    """Who answers."""
    body = {"prompt": "a red circle", "response_format": "b64_json", "seed": 1}
    reply = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
    assert reply.status_code == 200, reply.text
    assert reply.json()["data"][0]["b64_json"]
    return reply.headers["x-model-version"]


def await_painter(url: str, digest: str) -> None:
    """Until a cascade paints again; while Serve replaces a hop the endpoint may answer 503."""
    body = {"prompt": "a red circle", "seed": 1}
    end = time.monotonic() + 900
    while time.monotonic() < end:
        reply = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
        if reply.status_code == 200:
            assert reply.headers["x-model-version"] == digest
            return
        assert reply.status_code == 503, reply.text
        time.sleep(0.5)
    pytest.fail(f"{digest[:12]} does not paint again")


@contextlib.contextmanager
def asked_all_the_while(url: str) -> Iterator[set[tuple[str, str]]]:
    """Who painted the same order, and what, from request to request."""
    found: set[tuple[str, str]] = set()
    over = threading.Event()

    def ask() -> None:
        body = {"prompt": "a red circle", "seed": 1}
        while not over.wait(0.5):
            reply = httpx.post(f"{url}/v1/images/generations", json=body, timeout=600)
            if reply.status_code == 200:
                found.add((reply.headers["x-model-version"], reply.json()["data"][0]["b64_json"]))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield found
        finally:
            over.set()
        asking.result()


@pytest.fixture(scope="module")
def port() -> int:
    """Serve on the cluster keeps the one it was started with."""
    return free_ports(1)[0]


@pytest.fixture
def settings(port: int) -> list[str]:
    where = {"port": port, "hop.threads": 1, "hop.num_cpus": 0.2, "startup_s": 900}  # of a busy machine
    return [word for name, value in where.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.usefixtures("here")
def test_a_cascade_goes_on_air_by_its_alias_is_replaced_by_another_and_comes_back(
    store: Path, tmp_path: Path, port: int, settings: list[str]
) -> None:
    first = register(store, tmp_path / "run", 0.5)
    assert done("promote", "tiny")["was"] == "nobody"
    shown = ddiff("deploy", "tiny@production", *settings, "--dry-run")
    config = yaml.safe_load(shown.stdout)
    served = config["applications"][0]["args"]
    assert (served["digest"], served["cascade"]) == (first, f"s3://bucket/runs/cascades/{first}")
    assert not fsspec.filesystem("s3").exists("bucket/runs")  # nothing was put anywhere
    ray.serve.schema.ServeDeploySchema.model_validate(config)

    on_air = done("deploy", "tiny@production", *settings)
    assert (on_air["digest"], on_air["former"]) == (first, "")
    assert painted_by(on_air["endpoint"]) == first
    assert served["code"] == on_air["code"] == code.digest()
    assert config["applications"][0]["runtime_env"] == {
        "working_dir": f"s3://bucket/runs/code/{on_air['code']}.zip"
    }

    refused(ddiff("deploy", "tiny", "--set", "port=1"), 2, f"listens at 127.0.0.1:{port}, not at 127.0.0.1:1")

    second = register(store, tmp_path / "run", 0.4, seed=1)  # the run's directory holds another one now
    refused(ddiff("promote", "tiny"), 2, "tiny@production stays", "version 2 (40.0% right of 320", "--force")
    assert done("deploy", "tiny@production", "--dry-run")["applications"][0]["args"]["digest"] == first
    assert done("promote", "tiny@current", "--force")["digest"] == second
    with asked_all_the_while(on_air["endpoint"]) as found:
        now = done("deploy", "tiny@production", *settings)
        assert painted_by(now["endpoint"]) == second
    painters = [digest for digest, _ in found]
    assert len(set(painters)) == len(painters)  # each paints one picture: none was painted by both
    assert {first} <= set(painters) <= {first, second}
    assert now["former"] == on_air["config"]

    back = done("deploy", "--config", now["former"])
    assert painted_by(back["endpoint"]) == first
    assert back["former"] == now["config"]

    served = yaml.safe_load(fsspec.filesystem("s3").cat_file(back["config"]))
    served["applications"][0]["args"]["digest"] = "f" * 64
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(served))
    failed = ddiff("deploy", "--config", str(tmp_path / "bad.yaml"))
    assert failed.exit_code == 70
    before, restored, error = failed.stderr.strip().splitlines()  # the way back is told before it is needed
    for line in (before, error):
        assert f"ddiff deploy --config {back['config']}" in line
    assert ("ffffffffffff is not served" in error, f"{first[:12]} is put back" in restored) == (True, True)
    assert painted_by(back["endpoint"]) == first  # what was on the air still is


@pytest.mark.usefixtures("here")
def test_where_one_hop_does_not_come_up_the_hop_that_did_is_put_back_too(
    store: Path, tmp_path: Path, settings: list[str]
) -> None:
    first = register(store, tmp_path / "run", 0.5)
    on_air = done("deploy", "tiny", *settings)
    second = register(store, tmp_path / "run", 0.4, seed=1)
    too_large = [f"hops.{TWO_HOPS.hops[-1].stage}.num_cpus=1000", "startup_s=20"]
    with asked_all_the_while(on_air["endpoint"]) as found:
        failed = ddiff("deploy", "tiny", *settings, *(word for one in too_large for word in ("--set", one)))
        assert failed.exit_code == 70
        assert f"{second[:12]} is not ready after 20 s" in failed.stderr
        assert f"{first[:12]} is put back" in failed.stderr
        await_painter(on_air["endpoint"], first)
        assert done("deploy", "--config", on_air["config"])["digest"] == first
    assert painted_by(on_air["endpoint"]) == first
    assert {digest for digest, _ in found} == {first}
    assert len(found) == 1  # no picture of the new base and the old upsampler


@pytest.mark.usefixtures("here")
def test_the_gate_compares_like_with_like(store: Path, tmp_path: Path) -> None:
    register(store, tmp_path / "one", 0.5, seed=2)
    assert done("promote", "tiny", "--to", "gate", "--force")["alias"] == "tiny@gate"
    register(store, tmp_path / "two", 0.9, asked="b", seed=3)
    refused(ddiff("promote", "tiny", "--to", "gate"), 2, "judged on other captions")
    better = register(store, tmp_path / "two", 0.51, seed=3)
    moved = done("promote", "tiny", "--to", "gate")
    assert moved["digest"] == better
    assert "50.0% right of 320" in moved["was"]


@pytest.mark.usefixtures("here")
def test_what_cannot_be_deployed_is_said_in_one_line(
    store: Path, tmp_path: Path, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(store, tmp_path / "run", 0.5, seed=4)
    refused(ddiff("deploy", "tiny@nowhere"), 2, "MLflow has no tiny@nowhere; there are: tiny@")
    refused(ddiff("deploy", "../../x"), 2, "is no NAME@ALIAS")
    refused(ddiff("deploy", "tiny", "--set", "hop.num_gpu=1"), 2, "did you mean 'num_gpus'?")
    refused(ddiff("deploy", "tiny", "--address", "head:6379"), 2, "http://HEAD:8265")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    refused(ddiff("deploy", "tiny"), 2, "answers 403: the token from RAY_AUTH_TOKEN is wrong; set")
    tiny.tiny_cascade(tmp_path / "run", seed=5, cascade=TWO_HOPS)  # trained again, not registered
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path / "other"))
    refused(ddiff("deploy", "tiny", "--publish"), 4, "holds cascade", "deploy a newer version")


def by_check(result: Result) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in json.loads(result.stdout)["findings"]}


@pytest.mark.usefixtures("here")
def test_the_doctor_finds_the_cluster_its_token_and_its_nodes(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    well = ddiff("doctor", "--json", "--recipe", "smoke", "--set", "stages.base.resources.labels.zone=here")
    assert well.exit_code == 0, well.stdout
    found = by_check(well)
    assert found["cluster token"]["says"] == f"{head.dashboard} asks for a token"
    assert ": 4 CPU, " in found["resources"]["says"]
    assert "zone=here" in found["resources"]["says"]
    elsewhere = ddiff(
        "doctor", "--json", "--recipe", "smoke", "--set", "stages.base.resources.labels.zone=there"
    )
    assert elsewhere.exit_code == 2
    said = by_check(elsewhere)["resources"]["says"]
    assert re.search(r"; no node of \d+ has the labels \{'zone': 'there'\}$", said)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    wrong = ddiff("doctor", "--json")
    assert wrong.exit_code == 2
    assert "the token from RAY_AUTH_TOKEN is wrong" in by_check(wrong)["cluster"]["says"]
    assert head.token not in wrong.stdout + wrong.stderr + well.stdout + well.stderr


def test_the_doctor_warns_of_a_cluster_that_anybody_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with ray_head(token=False, cpus=1) as open_head:
        monkeypatch.setenv("RAY_ADDRESS", open_head.dashboard)
        found = ddiff("doctor", "--json")
    assert found.exit_code == 2
    assert "runs code for anybody" in by_check(found)["cluster token"]["says"]
    assert "RAY_AUTH_MODE=token" in by_check(found)["cluster token"]["fix"]
