"""`ddiff serve` and `ddiff stop`: a cascade served by this process, or by an endpoint that outlives it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from dd_core import bundle, sealed
from dd_core.cascade import CascadeSpec
from dd_core.precision import Precision
from jobs.config import ConfigError, apply
from jobs.environment import joins_cluster
from jobs.failures import PortTakenError, words_of
from jobs.ray_session import ray_cluster
from workflows.storage import Home

if TYPE_CHECKING:
    from serve.spec import ServeSpec

log = logging.getLogger(__name__)
NOTE = "endpoint.json"
START_S, STOP_S = 960.0, 180.0
"""Above the defaults of ServeSpec.startup_s and timeout_s, so that a server says itself why it is not ready,
and one that stops finishes the requests it has begun."""


class Address(NamedTuple):
    """Where an endpoint listens."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def url(self) -> str:
        """For clients."""
        return f"http://{self.host}:{self.port}"


class Endpoint(NamedTuple):
    """A server that runs in the background, as its file in the run directory describes it."""

    pid: int
    started: str
    """When, in clock ticks since boot: tells it from a later process with the same pid."""
    url: str
    digest: str
    """Of the cascade."""


class EndpointError(RuntimeError):
    """The endpoint did not come up."""


def serve_here(
    cascade: Path, address: Address, *, precision: Precision, changes: Sequence[str] = (), verbose: bool
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        cascade: Its directory.
        address: Where to listen.
        precision: Of the networks that paint.
        changes: Of the fields of serve.spec.ServeSpec, such as `hops.base.max_replicas=2`.
        verbose: Show Ray's own log.

    Raises:
        ConfigError: A change is refused; nothing has been started.
        ValueError: A change names a hop that the cascade does not have; nothing has been started.
        SealError: The cascade is damaged or unfinished.
        PortTakenError: Something listens there.
    """
    from serve import app, running  # noqa: PLC0415 takes seconds, which a run that serves nothing saves

    fields = {"cascade": str(cascade.resolve()), "precision": precision, **address._asdict()}
    spec = serve_spec(fields, changes)
    sealed.verify(cascade)
    if spec.hops:
        app.refuse_strangers(spec, bundle.checked(TypeAdapter(CascadeSpec), cascade / "cascade.json"))
    if not joins_cluster():
        refuse_taken(Address(spec.host, spec.port))
    with ray_cluster(verbose=verbose):
        try:
            running.run(spec, blocking=True)
        except running.PortError as error:
            raise PortTakenError(str(error)) from None


def serve_spec(fields: Mapping[str, Any], changes: Sequence[str]) -> "ServeSpec":
    """How a cascade is served: as these fields say, with changes on top.

    Raises:
        ConfigError: A change is refused.
    """
    from serve.spec import ServeSpec  # noqa: PLC0415 torch, as above

    changed = dict(fields)
    for change in changes:
        apply(changed, change)
    try:
        return ServeSpec.model_validate(changed)
    except ValidationError as error:
        wrong = " ".join(f"--set {change}" for change in changes)
        raise ConfigError(f"{wrong}: {words_of(error, changed)}") from None


def refuse_taken(address: Address, run: Path | None = None) -> None:
    """Refuse an address that is in use, before anything is started.

    Args:
        address: Where to listen.
        run: Its own endpoint may hold that port: that is stopped before another is started.

    Raises:
        PortTakenError: Something listens there, or nothing can.
    """
    from serve import running  # noqa: PLC0415 seconds, as above

    own = noted(run) if run else None
    if own and alive(own) and urlsplit(own.url).port == address.port:
        return
    try:
        running.refuse_taken_port(*address)
    except running.ServeError as error:
        raise PortTakenError(str(error)) from None


def start_endpoint(run: Path, cascade: Path, address: Address) -> str:
    """Serve a cascade in a process of its own that outlives this one; return its address when it is ready.

    Args:
        run: Keeps endpoint.json and endpoint.log.
        cascade: What to serve.
        address: Where; it must be free.

    Raises:
        PortTakenError: Something listens there.
        EndpointError: The server ended or did not become ready; the message holds the last line of its log.
    """
    from serve import running  # noqa: PLC0415 seconds, as above

    stop_endpoint(run)
    refuse_taken(address)
    digest = sealed.verify(cascade).digest
    where = ["--cascade", str(cascade.resolve()), "--host", address.host, "--port", str(address.port)]
    with (run / "endpoint.log").open("w") as output:
        process = subprocess.Popen(  # noqa: S603 our own command with paths of our own
            [sys.executable, "-m", "jobs.cli", "serve", *where],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    endpoint = Endpoint(process.pid, started_at(process.pid), address.url, digest)
    try:
        Home.of(run).write(NOTE, json.dumps(endpoint._asdict(), indent=2))
        until = time.monotonic() + START_S
        while why := running.missing(address.url, digest):
            if process.poll() is not None or time.monotonic() > until:
                lines = (run / "endpoint.log").read_text().strip().splitlines() or [why]
                raise EndpointError(f"the endpoint did not start: {lines[-1]}; see {run / 'endpoint.log'}")
            time.sleep(0.5)
    except BaseException:  # Ctrl-C among them: the server has a session of its own and does not hear it
        end(endpoint)
        process.wait()
        (run / NOTE).unlink(missing_ok=True)
        raise
    return address.url


def stop_endpoint(run: Path) -> str:
    """Stop the endpoint that a run left running, and return its address; empty if there was none."""
    endpoint = noted(run)
    was = endpoint.url if endpoint and alive(endpoint) else ""
    if endpoint:
        end(endpoint)
    (run / NOTE).unlink(missing_ok=True)
    return was


def noted(run: Path) -> Endpoint | None:
    """The endpoint that a run left, dead or alive.

    An unreadable note was cut off while it was written, and its endpoint stopped: it counts as none.
    """
    facts = Home.of(run).facts(NOTE)
    return Endpoint(**facts) if facts.keys() == set(Endpoint._fields) else None


def end(endpoint: Endpoint) -> None:
    """Send SIGTERM to a server; kill it if it is alive after STOP_S, or when the wait is interrupted."""
    try:
        if alive(endpoint):
            os.kill(endpoint.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_S
        while alive(endpoint) and time.monotonic() < until:
            time.sleep(0.2)
    finally:
        if alive(endpoint):
            log.warning("endpoint %d does not stop by itself; killing it", endpoint.pid)
            os.kill(endpoint.pid, signal.SIGKILL)


def alive(endpoint: Endpoint) -> bool:
    """Whether that very process still runs: it is neither a zombie nor a later process with its pid."""
    return bool(endpoint.started) and started_at(endpoint.pid) == endpoint.started


def started_at(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty if there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def free_address() -> Address:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", int(probe.getsockname()[1]))
