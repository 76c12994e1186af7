"""A log of many processes reads as one, and of what failed the first cause is shown, in few lines."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from jobs import dashboard, following
from jobs.cli import main
from jobs.dashboard import Dashboard, DashboardError
from jobs.failures import StoppedError, line_of
from jobs.following import Cluster, ClusterError, JobFacts, facts_of, reason
from jobs.job_log import MOST_LINES, first_error, merged
from tests.answering import answering
from workflows import worker
from workflows.registry import split
from workflows.storage import Home

PREFIX = "\x1b[36m(Worker pid=8, ip=10.0.0.3)\x1b[0m "
WRAPPED = """\
12:00:01 clip: 12 steps of 16 images
(RayTrainWorker pid=811) Traceback (most recent call last):
(RayTrainWorker pid=811)   File "/venv/site-packages/torch/distributed/c10d.py", line 9, in wait
(RayTrainWorker pid=811)     work.wait()
(RayTrainWorker pid=811) RuntimeError: connection closed by peer
(Worker pid=8, ip=10.0.0.3) Traceback (most recent call last):
(Worker pid=8, ip=10.0.0.3)   File "/venv/site-packages/ray/train/v2/worker.py", line 51, in run
(Worker pid=8, ip=10.0.0.3)     fn()
(Worker pid=8, ip=10.0.0.3)   File "/tmp/ray/_ray_pkg_1/workflows/worker.py", line 88, in work
(Worker pid=8, ip=10.0.0.3)     return trained_to_the_end(job)
(Worker pid=8, ip=10.0.0.3)   File "/tmp/ray/_ray_pkg_1/dd_core/losses.py", line 7, in eps_mse
(Worker pid=8, ip=10.0.0.3)     return a @ b
(Worker pid=8, ip=10.0.0.3) RuntimeError: mat1 and mat2 shapes cannot be multiplied
Traceback (most recent call last):
  File "/tmp/ray/_ray_pkg_1/jobs/run.py", line 50, in run_all
    made = run_pipeline(spec)
workflows.training.TrainingError: clip: mat1 and mat2 shapes cannot be multiplied
ddiff: TrainingError: clip: mat1 and mat2 shapes cannot be multiplied
"""


def test_the_first_error_of_our_code_comes_with_its_place_and_not_with_its_wrappers() -> None:
    assert first_error(WRAPPED) == [
        "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        "  workflows/worker.py:88 in work: return trained_to_the_end(job)",
        "  dd_core/losses.py:7 in eps_mse: return a @ b",
        "ddiff: TrainingError: clip: mat1 and mat2 shapes cannot be multiplied",
    ]
    at = "(Worker pid=8, ip=10.0.0.3) "
    deep = WRAPPED.replace(
        '(Worker pid=8, ip=10.0.0.3)   File "/tmp/ray/_ray_pkg_1/dd_core/losses.py"',
        "\n".join(
            f'{at}  File "/tmp/ray/_ray_pkg_1/dd_core/deep.py", line {number}, in deeper\n{at}    deeper()'
            for number in range(40)
        )
        + f'\n{at}  File "/tmp/ray/_ray_pkg_1/dd_core/losses.py"',
    )
    shown = first_error(deep)
    assert len(shown) == MOST_LINES - 3  # an empty line, the heading, and how the job ended
    assert shown[0].startswith("RuntimeError: mat1")
    assert shown[-2].startswith("  dd_core/losses.py:7")


RANK = "(RayTrainWorker pid={}, ip=10.0.0.3) {}\n"


def rank(pid: int, error: str) -> list[str]:
    """The lines of one worker, of which each may be followed by another's."""
    place = f'  File "/tmp/ray/_ray_pkg_1/dd_core/rank_{pid}.py", line {pid}, in step'
    return [
        RANK.format(pid, line) for line in ("Traceback (most recent call last):", place, "    go()", error)
    ]


def test_the_lines_of_two_ranks_are_no_traceback_of_both() -> None:
    first, second = rank(1, "ValueError: the cause"), rank(2, "RuntimeError: peer lost")
    log = "".join(line for pair in zip(first, second, strict=True) for line in pair)
    assert first_error(log) == ["ValueError: the cause", "  dd_core/rank_1.py:1 in step: go()"]


def test_an_error_that_workers_or_the_driver_recovered_from_is_not_the_one() -> None:
    lost = "".join(rank(1, "RuntimeError: connection closed"))
    for again in (
        "12:00:02 clip: workers were lost; starting them again, 1 of 3\n",
        "12:00:02 the driver was killed by SIGKILL; starting it again, attempt 2 of 3\n",
    ):
        assert first_error(lost + again + "".join(rank(2, "ValueError: the cause")))[0] == (
            "ValueError: the cause"
        )
        assert first_error(lost + again + "ddiff: no such parent\n") == ["ddiff: no such parent"]
        assert first_error(lost + again)[0] == "RuntimeError: connection closed"  # the last that was heard


def test_a_traceback_ends_where_it_ends() -> None:
    cut = "".join(rank(1, "12:00:03 clip: step 5")) + RANK.format(1, "KeyError: of somebody else")
    assert first_error(cut + "ddiff: stopped\n") == ["ddiff: stopped"]
    chained = "".join(rank(1, "KeyError: 'a'")) + "".join(rank(1, "StopIteration"))
    assert first_error(chained)[0] == "KeyError: 'a'"
    remote = [
        "Traceback (most recent call last):",
        '  File "/tmp/ray/_ray_pkg_1/jobs/run.py", line 50, in run_all',
        "    made = run_pipeline(spec)",
        "ray.exceptions.RayTaskError(DataError): ray::Reading.next() (pid=8, ip=10.0.0.3)",
        '  File "/tmp/ray/_ray_pkg_1/workflows/feed.py", line 9, in read',
        "    raise DataError(place)",
        "workflows.row_groups.DataError: a.tar is cut",
    ]
    assert first_error("\n".join(remote))[0] == "workflows.row_groups.DataError: a.tar is cut"


def test_what_a_worker_refuses_is_shown_where_it_arose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker, "trained_to_the_end", lambda job: split("not a name"))
    caplog.set_level("INFO", "workflows")
    job: Any = SimpleNamespace(home=Home("/"), spec=None)
    assert worker.ended(job).status == "refused"
    log = "".join(RANK.format(8, line) for line in caplog.text.splitlines())
    driver = WRAPPED.partition("peer\n")[2].partition("Traceback")[2].rpartition("Traceback")[2]
    error, *frames = first_error(f"{log}Traceback{driver}")
    assert error.startswith("workflows.registry.RegistryError: 'not a name' is no NAME@ALIAS")
    assert frames[-2].startswith("  workflows/registry.py:")
    assert frames[-1] == "ddiff: TrainingError: clip: mat1 and mat2 shapes cannot be multiplied"


def test_a_refusal_without_a_traceback_is_the_error() -> None:
    assert first_error("12:00 hello\nddiff: clip: batch_size 3 is odd\n") == [
        "ddiff: clip: batch_size 3 is odd"
    ]
    assert first_error("all is well\n") == []


def test_lines_of_all_ranks_say_where_they_come_from_and_ray_is_quiet() -> None:
    lines = [
        "12:00:01 clip: 12 steps",
        f"{PREFIX}clip: continues at step 6 [repeated 2x across cluster] (Ray deduplicates logs)",
        "\x1b[36m(PlacementGroupCleaner pid=1)\x1b[0m Failed to query Ray Train Controller actor state.",
        "",
    ]
    assert list(merged(iter(lines))) == [
        "12:00:01 clip: 12 steps",
        "Worker 10.0.0.3 | clip: continues at step 6",
    ]


def test_what_a_server_says_of_itself_is_one_line() -> None:
    text = 'Request failed with status code 500: {"msg": "Traceback:\\n  File x\\nValueError: no"}.'
    assert reason(text) == "ValueError: no"
    assert reason("plain") == "plain"


@pytest.mark.parametrize("address", ["", "auto", "ray://head:10001", "head:6379"])
def test_an_address_that_is_no_dashboard_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match=r"such as http://head:8265.*use --address or RAY_ADDRESS"):
        Cluster()


def test_the_reason_of_a_server_is_its_last_line_that_says_something() -> None:
    text = "Request failed with status code 500: Traceback ...\nValueError: Job smoke.1 already exists.\n."
    assert reason(text) == "ValueError: Job smoke.1 already exists."


def test_a_job_that_ray_lists_without_our_marks_is_known_by_its_name() -> None:
    job = SimpleNamespace(
        submission_id="smoke.2", metadata=None, status=SimpleNamespace(value="FAILED"), message="gone",
        start_time=None, end_time=None, driver_exit_code=None,
    )  # fmt: skip
    assert (facts_of(job).run, facts_of(job).attempt, facts_of(job).over) == ("smoke", 2, True)
    job.submission_id = "raysubmit_x"
    assert (facts_of(job).run, facts_of(job).attempt) == ("", 0)


class Cut(Cluster):
    """A cluster that cuts each connection to a log; a job is over after so many questions, or unheard of."""

    def __init__(self, *, questions: int, told: str = "begun\n", refuses: bool = False) -> None:
        self.questions, self.told, self.refuses = questions, told, refuses

    def pieces(self, _: JobFacts) -> Iterator[str]:
        yield self.told
        if self.refuses:
            raise ClusterError("cut")
        if not self.questions:
            yield "done"

    def job(self, _: str) -> JobFacts:
        if self.questions < 0:
            raise ClusterError("does not answer")
        status = "RUNNING" if self.questions else "SUCCEEDED"
        self.questions = max(0, self.questions - 1)
        return JOB._replace(status=status)


JOB = JobFacts("demo.1", "demo", 1, "RUNNING", "", "run", 0.0, 0.0)


def test_a_job_that_says_it_is_at_work_is_followed_however_often_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(following, "PAUSE_S", 0.0)
    many = 3 * following.CUTS
    assert list(Cut(questions=many).follow(JOB)) == ["begun", "done"]
    for lost in (
        Cut(questions=-1),  # nobody answers
        Cut(questions=0, refuses=True),  # the end is never seen
        Cut(questions=10**9, refuses=True, told=""),  # nor the begin: a proxy that lets no log through
    ):
        with pytest.raises(ClusterError, match=r"cut|does not answer"):
            list(lost.follow(JOB))


class Busy:
    """Ray's client, of a cluster whose head takes no job for so many questions."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        if self.answers:
            raise RuntimeError(f"Request failed with status code 500: {self.answers.pop(0)}.")
        return submission_id


LATER = "No available agent to submit job, please try again later."


@pytest.mark.parametrize(
    ("answers", "said", "left"),
    [
        ([LATER] * (following.TRIES - 1), "", 0),
        ([LATER] * (following.TRIES + 1), "try again later", 1),
        ([LATER, "no room", LATER], "no room", 1),
    ],
)
def test_a_job_is_handed_again_to_a_head_that_is_too_busy_to_take_it(
    answers: list[str], said: str, left: int
) -> None:
    cluster = Cluster("http://head:8265")
    cluster.client = Busy(*answers)
    with pytest.raises(ClusterError, match=said) if said else nullcontext():
        assert cluster.start("smoke.1", "true", Path(), environment={}, marks={}) == "smoke.1"
    assert len(cluster.client.answers) == left


class Silent:
    """Ray's client, of a job whose log says one line and then nothing; SIGTERM comes meanwhile, once."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        self.connections += 1
        assert self.connections == 1, "it is followed again"
        yield "begun\n"
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        await asyncio.sleep(3600)


def test_sigterm_ends_who_follows_a_job_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, stoppable: None
) -> None:
    monkeypatch.setattr(following, "PAUSE_S", 0.0)
    monkeypatch.setattr(Cluster, "job", lambda *_: JOB)
    cluster = Cluster("http://head:8265")
    cluster.client = Silent()
    lines = cluster.follow(JOB)
    assert next(lines) == "begun"
    with pytest.raises(StoppedError):
        next(lines)


def test_sigterm_while_a_cluster_is_asked_ends_the_command_with_the_code_of_one_that_was_stopped() -> None:
    answered = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            answered.wait()

    before = signal.getsignal(signal.SIGTERM)
    try:
        with answering(Slow) as address:
            done = CliRunner().invoke(main, ["list", "--address", address])
            answered.set()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (done.exit_code, done.stderr.startswith("ddiff: stopped by SIGTERM; ")) == (6, True), done.stderr


def test_each_cluster_is_shown_the_token_of_its_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers["Authorization"])
            body = b"[]" if "jobs" in self.path else b'{"ray_version": "2.60.0", "version": "4"}'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

    with answering(Dashboard) as address:
        for token in ("first-" + "0" * 32, "second-" + "0" * 32):
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
            assert Cluster(address).jobs() == []
            assert set(shown) == {f"Bearer {token}"}
            shown.clear()


@pytest.mark.parametrize("text", ["Request failed: 123", "Request failed: {}", "Request failed: [1]"])
def test_a_server_that_says_other_json_is_quoted_as_it_is(text: str) -> None:
    assert reason(text) == text


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("x" * 40, "answers 403: the token from RAY_AUTH_TOKEN is wrong; set RAY_AUTH_TOKEN, or"),
        ("", "answers 401: no token was shown; set RAY_AUTH_TOKEN, or"),
    ],
)
def test_a_wrong_token_and_a_missing_one_are_told_apart_in_one_line_with_the_fix(
    token: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401 if "Authorization" not in self.headers else 403)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with answering(Closed) as address:
        done = CliRunner().invoke(main, ["list", "--address", address])
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"ddiff: {address} {said}"), done.stderr
        assert len(done.stderr.splitlines()) == 1
        with Dashboard(address) as dashboard, pytest.raises(DashboardError) as refused:  # what `deploy` asks
            dashboard.get("/")
        assert f"ddiff: {line_of(refused.value)}\n" == done.stderr


@pytest.mark.parametrize("words", [["list"], ["status", "a"], ["logs", "a"], ["stop", "a"], ["delete", "a"]])
def test_a_head_that_says_nothing_is_waited_for_no_longer_than_the_limit(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = CliRunner().invoke(main, [*words, "--address", address])
    assert (done.exit_code, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"ddiff: {address} does not answer (")
    assert len(done.stderr.splitlines()) == 1
