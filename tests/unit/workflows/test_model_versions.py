"""A cascade on this disk gets its version and alias from a tracking server, which takes no paths."""

import json
from pathlib import Path

import pytest

from dd_core.sealed import MANIFEST
from tests.cluster import CANARIES, mlflow_server
from workflows.registry import Registry
from workflows.tracking import tracked

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
            for digest in (DIGEST, NEWER):
                tracking.journal.model("demo", cascade, alias="current", tags={"bundle_sha256": digest})
            tracking.journal.model(
                "demo", cascade, alias="current", tags={"bundle_sha256": NEWER, "score.all": ".5"}
            )
        found = Registry(server.url).version("demo@current")
        assert (found.number, found.digest, found.address) == ("2", NEWER, str(cascade))
        assert found.score == 0.5
        (artifact,) = Registry(server.url).client.list_artifacts(found.run_id, "cascade")
        assert artifact.path == f"cascade/{MANIFEST}"
        assert [one.number for one in Registry(server.url).of_digest(DIGEST)] == ["1"]
