"""`ddiff submit --dry-run`: the plan on the nodes of a cluster, with no key of its store."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from tests.answering import answering


class Nodes(BaseHTTPRequestHandler):
    """A dashboard that knows its nodes and takes no job."""

    memory = 64 * 2**30

    def do_GET(self) -> None:
        node = {
            "node_ip": "10.0.0.2",
            "state": "ALIVE",
            "resources_total": {"CPU": 8.0, "memory": self.memory},
        }
        self.send_response(200 if "Authorization" in self.headers else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"result": {"result": [node]}}}).encode())


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with answering(Nodes) as address:
        monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 32)
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.delenv("DDIFF_STORAGE", raising=False)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        yield address


def rehearsed(*words: str) -> Result:
    return CliRunner().invoke(main, ["submit", *words, "--dry-run", "--json"])


@pytest.mark.slow
def test_the_plan_is_shown_and_refused_where_the_nodes_are_too_small(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = rehearsed("train", "clip", "--recipe", "smoke")
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["nodes"][0]["name"] == "10.0.0.2"
    assert list(plan["stages"]) == ["clip"]
    clip = plan["stages"]["clip"]
    assert clip["memory_bytes_per_worker"] > clip["checkpoint_bytes"] > 0
    assert (plan["free_bytes"], plan["scratch_bytes_per_node"] > clip["checkpoint_bytes"]) == (None, True)
    monkeypatch.setattr(Nodes, "memory", 2**20)
    done = rehearsed("train", "clip", "--recipe", "smoke")
    assert done.exit_code == 2
    assert "the plan does not fit: clip: 1 workers of" in done.stderr
    assert "there is room for 0 on 10.0.0.2" in done.stderr
    done = rehearsed("deploy", "demo@current")
    assert (done.exit_code, "shows the plan of a run" in done.stderr) == (2, True)
