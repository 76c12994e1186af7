"""Jobs on a cluster: started, watched, read and stopped over the HTTP of Ray's dashboard."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jobs import dashboard
from jobs.dashboard import is_dashboard, not_let_in, refuse_misspelt
from jobs.environment import cluster_address, prepare_environment, ray_token
from jobs.failures import Code, JobFailedError, code_elsewhere
from jobs.job_log import merged

T = TypeVar("T")
CUTS, PAUSE_S = 20, 3.0
"""How many connections to a log may fail in a row, and the pause before the next."""
TRIES, LATER = 12, "try again later"
"""How often a job is handed over, and what the answer contains when the head's agent, which takes jobs, was
not heard by the dashboard within 10 s (Ray 2.60)."""
TAKEN = re.compile(r"Job with submission_id \S+ already exists")


class ClusterError(ValueError):
    """The cluster cannot be reached, does not let us, or has no such job; the message says what to do."""


class NameTakenError(ClusterError):
    """The cluster knows a job of this name already."""


class JobFacts(NamedTuple):
    """A job as the cluster reports it."""

    id: str
    run: str
    attempt: int
    status: str
    message: str
    command: str
    started: float
    """Seconds since 1970; 0 if it has not."""
    ended: float
    order: str = ""
    """Digest of what it was told to do; empty: unknown."""
    exit_code: int | None = None
    """Of its command, once that has ended by itself."""

    @property
    def over(self) -> bool:
        """Whether it will not change any more."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """A Ray cluster from outside.

    Args:
        address: Of its dashboard; RAY_ADDRESS unless given.

    Raises:
        ClusterError: No address, no answer, or a refused token.
    """

    def __init__(self, address: str | None = None) -> None:
        prepare_environment()
        self.address = (address or cluster_address()).rstrip("/")
        if not is_dashboard(self.address):
            given = f"{self.address!r} is no such address" if self.address else "none is given"
            raise ClusterError(
                f"jobs go to the dashboard of a cluster, such as http://head:8265, and {given}; "
                "use --address or RAY_ADDRESS"
            )
        refuse_misspelt(self.address)
        self.client: Any = None

    def ask(self, what: Callable[[Any], T]) -> T:
        """Call Ray's client; its errors become a ClusterError of one line."""
        from aiohttp import ClientError  # noqa: PLC0415 half a second
        from ray.exceptions import AuthenticationError  # noqa: PLC0415

        try:
            if self.client is None:
                token = ray_token()  # sent by us: Ray reads it once a process, whatever changes later
                headers = {"Authorization": f"Bearer {token}"} if token else None
                self.client = client_of(self.address, headers)
            return what(self.client)
        except AuthenticationError as error:
            wrong = str(error).lstrip().startswith("Authentication failed")  # Ray's words for a 403
            raise ClusterError(not_let_in(self.address, 403 if wrong else 401, shown=wrong)) from None
        except (OSError, ClientError) as error:
            text = " ".join(str(error).split())
            raise ClusterError(
                f"{self.address} does not answer ({text:.120}); is it the dashboard?"
            ) from None
        except RuntimeError as error:
            kind = NameTakenError if TAKEN.search(str(error)) else ClusterError
            raise kind(f"{self.address}: {reason(str(error))}") from None

    def start(
        self,
        name: str,
        entrypoint: str,
        directory: Path,
        *,
        environment: Mapping[str, str],
        marks: dict[str, str],
    ) -> str:
        """Start a new job in a copy of a directory; return its id.

        A cluster that is too busy to take it is asked again, TRIES times in all.

        Raises:
            NameTakenError: There is one of this name, perhaps since a moment ago.
        """

        def submitted(client: Any) -> str:
            return str(
                client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=name,
                    runtime_env={"working_dir": str(directory), "env_vars": dict(environment)},
                    metadata=marks,
                )
            )

        for _ in range(TRIES - 1):
            try:
                return self.ask(submitted)
            except ClusterError as error:
                if LATER not in str(error):
                    raise
        return self.ask(submitted)

    def jobs(self) -> list[JobFacts]:
        """Every job that was submitted, the newest first."""
        found = [facts_of(job) for job in self.ask(lambda client: client.list_jobs()) if job.submission_id]
        return sorted(found, key=lambda job: (job.started, job.attempt), reverse=True)

    def job(self, name: str) -> JobFacts:
        """A job by its id, or the newest of a run by the run's name.

        Raises:
            ClusterError: There is neither.
        """
        found = self.jobs()
        if named := [job for job in found if job.id == name] or [job for job in found if job.run == name]:
            return named[0]
        known = ", ".join(job.id for job in found[:5]) or "none"
        raise ClusterError(f"{self.address} has no job and no run {name!r}; it has {known}")

    def stop(self, name: str, *, wait_s: float = 150.0) -> JobFacts:
        """Ask a job to save itself and end, and wait until it has.

        Raises:
            JobFailedError: It is still at work after `wait_s`.
        """
        job = self.job(name)
        if not job.over:
            self.ask(lambda client: client.stop_job(job.id))
            until = time.monotonic() + wait_s
            while not (job := self.job(job.id)).over and time.monotonic() < until:
                time.sleep(0.5)
        if not job.over:
            raise JobFailedError(
                f"{job.id} is still {job.status} {wait_s:g} s after it was told to stop; "
                f"`ddiff status {job.id}` says when it has, `ddiff logs {job.id}` what it does"
            )
        return job

    def delete(self, name: str) -> JobFacts:
        """Forget a job that is over, and what it wrote."""
        job = self.job(name)
        if not job.over:
            raise ClusterError(f"{job.id} is {job.status}; stop it first: ddiff stop {job.id}")
        self.ask(lambda client: client.delete_job(job.id))
        return job

    def log(self, job: JobFacts) -> str:
        """All that a job has written so far."""
        return self.ask(lambda client: str(client.get_job_logs(job.id)))

    def follow(self, job: JobFacts) -> Iterator[str]:
        """Whole lines of a job, as they are written, until it is over.

        A connection that is cut is made again; each begins with the whole log, of which the lines yielded
        before are skipped.  One has failed if the job could not be asked for its status afterwards, or if an
        error kept us from the start of the log or from its end; new lines set the count of failures to 0.

        Raises:
            ClusterError: CUTS have failed in a row.
        """
        told = cuts = 0
        while True:
            rest, passed, failed, over = "", 0, None, False
            try:
                for piece in self.pieces(job):
                    *lines, rest = (rest + piece).split("\n")
                    new = lines[max(0, told - passed) :]
                    passed += len(lines)
                    if new:
                        told, cuts = passed, 0
                        yield from new
            except ClusterError as error:
                failed = error
            try:
                over = self.job(job.id).over
                failed = failed if over or not told else None
            except ClusterError as error:
                failed = error
            cuts = cuts + 1 if failed else 0
            if failed and cuts == CUTS:
                raise failed
            if over and not failed:
                break
            time.sleep(PAUSE_S)
        if rest:
            yield rest

    def pieces(self, job: JobFacts) -> Iterator[str]:
        """The log of a job from its start, until one end or the other closes the connection."""
        pieces = self.ask(lambda client: client.tail_job_logs(job.id))
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            while (
                piece := self.ask(lambda client: loop.run_until_complete(anext(pieces, None)))
            ) is not None:
                yield piece


def client_of(address: str, headers: Mapping[str, str] | None) -> Any:
    """Ray's client with our own timeout; by itself (2.60) it never gives up waiting for an answer."""
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 half a second

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=dashboard.TIMEOUT_S, **more)

    return Client(address, headers=headers)


def facts_of(job: Any) -> JobFacts:
    """The facts of a job, from Ray's details."""
    marks = job.metadata or {}
    run, _, number = job.submission_id.rpartition(".")  # Ray may list what it deleted again, without marks
    return JobFacts(
        id=job.submission_id,
        run=marks.get("ddiff.run", run if number.isdigit() else ""),
        attempt=int(marks.get("ddiff.attempt", number if number.isdigit() else "0")),
        status=str(job.status.value),
        message=gist(job.message or ""),
        command=marks.get("ddiff.command", ""),
        started=(job.start_time or 0) / 1000,
        ended=(job.end_time or 0) / 1000,
        order=marks.get("ddiff.order", ""),
        exit_code=job.driver_exit_code,
    )


def gist(message: str) -> str:
    """One line of Ray's message on a job; that on a failed job is the last 20,000 letters of its log."""
    lines = list(merged(iter(message.splitlines())))
    ours = [line for line in lines if line.startswith("ddiff: ")]
    return (ours or lines or [""])[-1][:300]


def end_as(job: JobFacts) -> None:
    """End the command that follows a job as the job ended.

    Raises:
        JobFailedError: The job has not succeeded; with its exit code.
    """
    match job.status:
        case "SUCCEEDED":
            return
        case "FAILED":
            raise JobFailedError(f"{job.id} has failed: {job.message}", code_elsewhere(job.exit_code))
        case "STOPPED":
            raise JobFailedError(f"{job.id} was stopped; submit it again to continue", Code.PREEMPTED)
        case status:
            raise JobFailedError(f"{job.id} is {status}, but no more is heard of it; ddiff logs -f {job.id}")


def reason(text: str) -> str:
    """The last line of a server's error message, taken out of JSON and tracebacks."""
    with contextlib.suppress(ValueError, LookupError, TypeError):  # not the JSON of a dashboard
        text = str(json.loads(text.partition(": ")[2].rstrip("."))["msg"])
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines() if line.strip(" .")]
    return lines[-1][:300] if lines else "no reason given"


def since(seconds: float) -> str:
    """A date for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def table(jobs: list[JobFacts]) -> str:
    """One line a job."""
    if not jobs:
        return "no jobs"
    rows = [("id", "run", "command", "status", "started")]
    rows += [(job.id, job.run or "-", job.command or "-", job.status, since(job.started)) for job in jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
