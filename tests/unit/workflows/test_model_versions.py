"""A cascade on this disk gets its version and alias from a tracking server, which takes no paths."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dd_core.sealed import MANIFEST
from tests.cluster import CANARIES, mlflow_server
from workflows.registry import Registry
from workflows.tracking import tracked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DIGEST, NEWER = "e" * 64, "f" * 64


def test_a_server_registers_a_cascade_that_lies_on_this_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARIES["MLFLOW_TRACKING_PASSWORD"])
    run = tmp_path / "runs/demo"
    (cascade := run / "cascade").mkdir(parents=True)
    (cascade / MANIFEST).write_text(json.dumps({"files": {}}))
    with mlflow_server(f"sqlite:///{tmp_path}", "127.0.0.1", tmp_path / "server") as server:
        server.wait()
        with tracked(run, uri=server.url) as tracking:
            tracking.journal.model("demo", cascade, alias="current", tags={"bundle_sha256": DIGEST})
        first = Registry(server.url).version("demo@current")
        assert (first.number, first.digest, first.address) == ("1", DIGEST, str(cascade))
        (artifact,) = Registry(server.url).client.list_artifacts(first.run_id, "cascade")
        assert artifact.path == f"cascade/{MANIFEST}"

        monkeypatch.setattr(MlflowClient, "log_artifact", away)
        stored = "s3://bucket/runs/demo/cascade"
        with tracked(run, uri=server.url) as tracking:
            for tags in ({}, {"score.all": ".5"}):
                tracking.journal.model("demo", cascade, alias="current", tags={"bundle_sha256": NEWER} | tags)
            tracking.journal.model("stored", stored, alias="current", tags={"bundle_sha256": NEWER})
        newer = Registry(server.url).version("demo@current")
        assert (newer.number, newer.digest, newer.address, newer.score) == ("2", NEWER, str(cascade), 0.5)
        assert Registry(server.url).version("stored").address == stored
        assert [one.number for one in Registry(server.url).of_digest(DIGEST)] == ["1"]


def away(*_: object) -> None:
    raise ConnectionError("no artifact store")
