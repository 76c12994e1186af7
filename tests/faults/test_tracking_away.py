"""A tracking server that nobody can reach costs a run neither a step nor a point."""

import logging
import socket
import time
from pathlib import Path

import pytest

from workflows.journal import Journal, backlog, entries
from workflows.tracking import Book, tracked

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore"),  # MLflow's, of its own dependencies
]


def dead_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def said(caplog: pytest.LogCaptureFixture, *of: str) -> list[str]:
    """What the log says of one of these; threads of earlier tests may still complain of their own."""
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("workflows")]
    return [line for line in lines if any(part in line for part in of)]


def test_a_run_without_its_server_goes_on_says_so_once_and_the_next_start_delivers_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = f"http://127.0.0.1:{dead_port()}"
    with (
        caplog.at_level(logging.WARNING, "workflows"),
        tracked(tmp_path, uri=server) as away,
    ):
        journal = away.stage("base")
        for step in range(200):
            journal.log({"train/loss": 1 / (step + 1)}, step)
        end = time.monotonic() + 300
        while not said(caplog, server):  # it has been tried
            assert time.monotonic() < end
            time.sleep(0.05)
        assert not away.book.page()  # nor does who asks for it wait, or fail
    lines = said(caplog, server, str(tmp_path))
    assert lines[0] == (
        f"tracking: MLflow at {server} does not answer: Connection refused; start it, or set "
        "MLFLOW_TRACKING_URI to one that does; the run goes on, its metrics wait in the journal"
    )
    assert "bytes wait in the journals" in lines[-1]
    assert len(lines) == 2
    assert backlog(tmp_path / "base" / "metrics.jsonl") == (tmp_path / "base/metrics.jsonl").stat().st_size

    book = Book(tmp_path)
    for stage in ("", "base"):
        book.sender(stage)(list(entries(Journal(tmp_path / stage / "metrics.jsonl").path)))
    run_id = book.run_id("base")
    history = book.client.get_metric_history(run_id, "train/loss")
    assert [point.step for point in history] == list(range(200))
