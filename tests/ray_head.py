"""A Ray head as a process of its own, as an operator starts it: dashboard, token, ports of its own."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from jobs.environment import PATIENCE

ROOT = Path(__file__).parents[1]
SHARE = 3000 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
FIRST = 7000 + SHARE * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
NUMBERS = iter(range(FIRST + os.getpid() % (SHARE // 3), FIRST + SHARE))


class Head(NamedTuple):
    """A cluster of one node."""

    dashboard: str
    token: str
    """Empty: the cluster asks for none."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client that may use it."""
        return {"RAY_ADDRESS": self.dashboard, "RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Free ports below those that Ray and the system assign; none is given twice, as some are bound late."""
    found: list[int] = []
    for port in NUMBERS:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


@contextmanager
def ray_head(
    *, token: bool = True, cpus: int = 4, variables: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """Start a head, wait until its node is alive, and in the end stop it with all that it started.

    On a busy machine Ray's own parts may give up waiting for each other; then it is started again, twice at
    most.
    """
    temporary = Path(tempfile.mkdtemp(prefix="rayhead-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
    tried: list[subprocess.Popen[bytes]] = []
    try:
        for attempt in range(3):
            where = temporary / str(attempt)
            head, process = started(where, token=token, cpus=cpus, variables=variables or {})
            tried.append(process)
            if is_up(head, process):
                break
            stop(process)
        else:
            raise AssertionError((where / "head.log").read_text())
        yield head
    finally:
        for process in tried:
            stop(process)
        shutil.rmtree(temporary, ignore_errors=True)


def started(
    temporary: Path, *, token: bool, cpus: int, variables: Mapping[str, str]
) -> tuple[Head, subprocess.Popen[bytes]]:
    """Start the process, which may still fail."""
    temporary.mkdir()
    gcs, dashboard, client = free_ports(3)
    head = Head(f"http://127.0.0.1:{dashboard}", secrets.token_hex(32) if token else "")
    mode = (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token} if token else {"RAY_AUTH_MODE": "disabled"}
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **mode,
        **PATIENCE,
        **variables,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "--port": gcs,
        "--dashboard-port": dashboard,
        "--ray-client-server-port": client,
        **agent_ports(),
        "--node-ip-address": "127.0.0.1",
        "--dashboard-host": "127.0.0.1",
        "--num-cpus": cpus,
        "--object-store-memory": 100_000_000,
        "--temp-dir": temporary,
        "--labels": "zone=here",
    }
    words = [str(word) for option in options.items() for word in option]
    program = str(Path(sys.executable).with_name("ray"))
    with (temporary / "head.log").open("w") as output:
        process = subprocess.Popen(
            [program, "start", "--head", "--block", "--disable-usage-stats", *words],
            env=environment,
            cwd=temporary,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return head, process


def agent_ports(host: str = "127.0.0.1") -> dict[str, int]:
    """Options that fix the agents' ports: a raylet waits only 15 s for agents that choose their own."""
    names = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    return {f"--{name}-port": port for name, port in zip(names, free_ports(len(names), host), strict=True)}


def is_up(head: Head, process: subprocess.Popen[bytes]) -> bool:
    """Wait until its node is alive; False if the process ends before, or after 400 s."""
    headers = {"Authorization": f"Bearer {head.token}"} if head.token else {}
    end = time.monotonic() + 400
    while time.monotonic() < end and process.poll() is None:
        with suppress(httpx.HTTPError, ValueError, LookupError):
            reply = httpx.get(f"{head.dashboard}/api/v0/nodes", headers=headers, timeout=10)
            if any(node["state"] == "ALIVE" for node in reply.json()["data"]["result"]["result"]):
                return True
        time.sleep(0.3)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the head, then what is left of its session; workers have other sessions, but die with their raylet.

    It gets 2 s after a SIGTERM: Ray's own shutdown takes more than half a minute, and nothing needs it.
    """
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
