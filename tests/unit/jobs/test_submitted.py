"""A command that follows a job ends as that job did, whatever else has the name of its run."""

import json
import re
import socket
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jobs import dashboard, following, job_log
from jobs.cli import main
from jobs.following import Cluster, ClusterError, facts_of
from jobs.submit import Pack, Submitted, order_of, packed
from tests.answering import answering

LONG = "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\n"


def job(name: str, status: str, exit_code: int | None = None, *, message: str = "", at: int = 0) -> Any:
    """As Ray tells of it."""
    return SimpleNamespace(
        submission_id=name, metadata=None, status=SimpleNamespace(value=status), message=message,
        start_time=at, end_time=None, driver_exit_code=exit_code,
    )  # fmt: skip


class Jobs:
    """Ray's client, of a cluster whose jobs stand as they stand."""

    def __init__(self, *jobs: Any, appears: Any = None) -> None:
        self.there, self.appears, self.stopped = list(jobs), appears, list[str]()
        self.connections = list[tuple[str, Any]]()

    def list_jobs(self) -> list[Any]:
        return self.there

    def get_job_logs(self, name: str) -> str:
        return f"log of {name}\nddiff: no pairs\n"

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        if self.connections:  # the log as far as it is now, and how it ends
            log, end = self.connections.pop(0)
            yield log[: len(log) // 2]
            yield log[len(log) // 2 :]
            if isinstance(end, BaseException):
                raise end
            self.there = [end]
            return
        yield f"log of {name}\n"
        if self.appears:
            self.there.append(self.appears)

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the commands speak to such a client."""

    def ask(self: Cluster, what: Any) -> Any:
        return what(client)

    def use(*jobs: Any, appears: Any = None) -> Jobs:
        nonlocal client
        client = Jobs(*jobs, appears=appears)
        return client

    client = Jobs()
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(Cluster, "ask", ask)
    monkeypatch.setattr(following, "PAUSE_S", 0.0)
    return use


def ddiff(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.mark.parametrize(
    ("status", "exit_code", "code", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 3, 3, "smoke.1 has failed"),
        ("FAILED", 5, 5, "smoke.1 has failed"),
        ("FAILED", 137, 70, "smoke.1 has failed"),
        ("FAILED", None, 70, "smoke.1 has failed"),
        ("STOPPED", None, 6, "smoke.1 was stopped; submit it again to continue"),
    ],
)
def test_who_follows_a_job_ends_as_it_ends(
    on: Any, status: str, exit_code: int | None, code: int, said: str
) -> None:
    on(job("smoke.1", status, exit_code))
    done = ddiff("logs", "-f", "smoke")
    assert (done.exit_code, done.stdout) == (code, "log of smoke.1\n")
    assert said in done.stderr


def test_a_log_is_followed_over_cut_connections_and_no_line_is_doubled_or_lost(on: Any) -> None:
    running = job("smoke.1", "RUNNING")
    on(running).connections = [
        ("a\nb\nc", ClusterError("reset by peer")),
        ("", ClusterError("no answer")),
        ("a\nb\ncc\n", running),
        ("a\nb\ncc\nd", job("smoke.1", "FAILED", 3)),
    ]
    done = ddiff("logs", "-f", "smoke")
    assert (done.exit_code, done.stdout) == (3, "a\nb\ncc\nd\n")
    on(job("smoke.1", "SUCCEEDED")).connections = [("a\n", ClusterError("reset by peer"))] * 99
    done = ddiff("logs", "-f", "smoke")
    assert (done.exit_code, done.stdout) == (2, "a\n")
    assert "reset by peer" in done.stderr


@pytest.mark.parametrize("words", [["logs", "-f", "smoke"], ["logs", "-f", "smoke", "--json"]])
def test_who_stops_following_is_told_that_the_job_goes_on(on: Any, words: list[str]) -> None:
    on(job("smoke.1", "RUNNING")).connections = [("a\n", KeyboardInterrupt())]
    done = ddiff(*words)
    assert done.exit_code == 6
    assert "smoke.1 goes on" in done.stderr
    assert "ddiff stop smoke.1 stops it" in done.stderr


def test_the_log_of_a_job_at_work_is_shown_as_far_as_it_goes(on: Any) -> None:
    on(job("smoke.1", "RUNNING"))
    assert ddiff("logs", "smoke").exit_code == 0


def test_of_a_job_that_failed_the_error_and_its_end_are_few_lines_and_json_for_who_asks_for_it(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = "".join(f'  File "/x/dd_core/a.py", line {n}, in f\n    f()\n' for n in range(40))
    log = f"Traceback (most recent call last):\n{frames}ValueError: no\nddiff: ValueError: no\n"
    monkeypatch.setattr(Jobs, "get_job_logs", lambda *_: log)
    on(job("smoke.1", "FAILED", 3))
    done = ddiff("logs", "smoke")
    assert len(done.stderr.splitlines()) == job_log.MOST_LINES
    assert done.stderr.startswith("\nthe first error:\nValueError: no\n")
    *_, last = ddiff("logs", "smoke", "--json").stdout.splitlines()
    assert json.loads(last)["first_error"][0] == "ValueError: no"


def test_all_that_a_submission_says_is_json_for_who_asks_for_it(
    on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = Pack(files=1, bytes=2, content=("jobs",), code="c" * 64)
    done = Submitted("smoke.1", "smoke", started=True, attempt=1, pack=pack, seconds=1.0)
    monkeypatch.setattr("jobs.submit.submit", lambda order, cluster: done)
    on(job("smoke.1", "FAILED", 3))
    said = ddiff("submit", "doctor", "--follow", "--insecure", "--json")
    assert said.exit_code == 3
    assert json.loads(said.stdout)["pack"]["files"] == 1
    told = [json.loads(line) for line in said.stderr.splitlines()]
    assert told[0] == {"line": "log of smoke.1"}
    assert told[-1]["code"] == 3


def test_how_much_travels_and_what_is_said_beside_the_id(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on()
    monkeypatch.setattr(Cluster, "start", lambda self, name, *_, **__: name)
    sent = ddiff("submit", "smoke", "--insecure")
    assert (sent.exit_code, sent.stdout) == (0, "smoke.1\n"), sent.stderr
    with packed(order_of(("smoke",), None, None, ()), {}) as (directory, pack):
        files = [path for path in directory.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    said, accepted = sent.stderr.splitlines()
    content = "dd_core, jobs, serve, workflows, job.yaml"
    assert said == f"packed {len(files)} files, {size / 1000:,.0f} kB: {content}; code {pack.code[:12]}"
    assert re.fullmatch(r"run smoke: smoke\.1 \(attempt 1, accepted in \d+\.\d s\)", accepted)
    assert not ddiff("submit", "smoke", "--insecure", "--quiet").stderr


def test_a_newer_job_of_the_run_does_not_decide_how_the_one_that_was_followed_ended(on: Any) -> None:
    on(job("smoke.1", "SUCCEEDED", 0, at=1), appears=job("smoke.2", "FAILED", 3, at=2))
    assert ddiff("logs", "-f", "smoke").exit_code == 0


def test_an_id_means_that_job_although_a_run_has_the_same_name(on: Any) -> None:
    on(job("smoke.1", "SUCCEEDED", 0, at=1), job("smoke.1.1", "FAILED", 3, at=2))  # of a run named smoke.1
    assert ddiff("logs", "-f", "smoke.1").stdout == "log of smoke.1\n"


def test_of_a_job_that_failed_one_line_is_shown(on: Any) -> None:
    log = "12:00 hello\nddiff: 9 of 9 pairs are rejected\n(raylet) at the end\n" + "\n"
    on(job("smoke.1", "FAILED", 3, message=LONG + "noise\n" * 3000 + log))
    lines = ddiff("status", "smoke").stdout.splitlines()
    assert lines[1:] == ["ddiff: 9 of 9 pairs are rejected"]
    assert facts_of(job("x.1", "FAILED", message="a\n" + "b" * 9000)).message == "b" * 300
    assert facts_of(job("x.1", "SUCCEEDED", message="Job finished successfully.")).message.endswith(
        "successfully."
    )


def test_a_job_that_does_not_stop_is_no_success(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Cluster.stop
    monkeypatch.setattr(Cluster, "stop", lambda self, name: whole(self, name, wait_s=0.0))
    on(job("smoke.1", "RUNNING"))
    done = ddiff("stop", "smoke")
    assert (done.exit_code, done.stdout) == (70, "")
    assert done.stderr.startswith(
        "ddiff: smoke.1 is still RUNNING 0 s after it was told to stop; `ddiff status"
    )
    on(job("smoke.1", "STOPPED"))
    assert ddiff("stop", "smoke").stdout == "smoke.1: STOPPED\n"


class Door(BaseHTTPRequestHandler):
    """A dashboard that says so of itself."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"{}")


def test_nothing_is_handed_to_a_cluster_elsewhere_that_asks_for_no_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(Door) as address:
        dashboard.refuse_open(address)  # of this machine
        monkeypatch.setattr(dashboard, "is_here", lambda _: False)
        for words in (["submit", "smoke"], ["deploy", "demo@current"]):
            done = ddiff(*words, "--address", address)
            assert (done.exit_code, "runs code for anybody" in done.stderr) == (2, True), done.stderr
            assert "--insecure" in done.stderr
            assert "runs code for anybody" not in ddiff(*words, "--address", address, "--insecure").stderr
        monkeypatch.setattr(Door, "status", 308)
        with pytest.raises(
            dashboard.DashboardError, match="says 308 to who shows no token, which is neither yes"
        ):
            dashboard.refuse_open(address)
        monkeypatch.setattr(Door, "status", 401)
        dashboard.refuse_open(address)
        for more in ("/#/jobs", "/?a=1"):
            with pytest.raises(dashboard.DashboardError, match="leave out what follows `#` or `\\?`"):
                dashboard.refuse_open(address + more)


def has_ipv6() -> bool:
    """Whether this machine has the loopback address of IPv6, which containers may lack."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_this_machine_is_known_by_its_names_and_others_are_not_taken_for_it() -> None:
    names = ["127.0.0.1", "localhost", *(["[::1]"] if has_ipv6() else [])]
    assert all(dashboard.is_here(f"http://{name}:8265") for name in names)
    assert not any(dashboard.is_here(f"http://{name}:8265") for name in ("203.0.113.1", "head.invalid"))


@pytest.mark.parametrize(
    "words", [["submit", "smoke"], ["deploy", "demo@current"], ["list"], ["logs", "smoke"], ["stop", "smoke"]]
)
def test_an_address_that_is_misspelt_is_said_to_be_none(words: list[str]) -> None:
    done = ddiff(*words, "--address", "http://head:82a5")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'http://head:82a5' is no address of a dashboard" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
