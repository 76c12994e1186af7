"""The endpoint in the background: it is known by more than its number, and a taken port is refused."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

from dd_core import sealed
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from jobs import endpoint
from jobs.cli import main
from jobs.endpoint import (
    Address,
    Endpoint,
    EndpointError,
    alive,
    free_address,
    refuse_taken,
    start_endpoint,
    started_at,
    stop_endpoint,
)
from jobs.failures import PortTakenError, StoppedError
from serve import running
from serve.spec import ReplicaSpec, ServeSpec
from workflows.storage import Home


def note(run: Path, endpoint: Endpoint) -> Path:
    path = run / "endpoint.json"
    path.write_text(json.dumps(endpoint._asdict()))
    return path


def test_a_process_that_inherited_the_number_of_an_endpoint_is_not_stopped(tmp_path: Path) -> None:
    path = note(tmp_path, Endpoint(os.getpid(), "1", "http://127.0.0.1:8000", ""))
    assert stop_endpoint(tmp_path) == ""  # and this process is still here to say so
    assert not path.exists()


def test_the_endpoint_that_was_noted_is_stopped_and_forgotten(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    endpoint = Endpoint(process.pid, started_at(process.pid), "http://127.0.0.1:8000", "")
    path = note(tmp_path, endpoint)
    assert alive(endpoint)
    assert stop_endpoint(tmp_path) == endpoint.url
    assert not alive(endpoint)
    assert not path.exists()
    assert process.wait(timeout=10) != 0
    assert stop_endpoint(tmp_path) == ""


@pytest.mark.parametrize("address", ["", "s3://bucket/runs/demo"])
def test_the_endpoint_of_a_run_is_stopped_by_its_directory_or_its_address(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.storage.scratch_directory", lambda: tmp_path)
    run = Home.of(address or tmp_path / "demo").here
    absent = CliRunner().invoke(main, ["stop", "--run", address or str(run)])
    assert (absent.exit_code, absent.stdout) == (2, "")
    assert f"this machine has no run {address or run}; name its directory" in absent.stderr
    run.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    note(run, Endpoint(process.pid, started_at(process.pid), "http://127.0.0.1:8000", ""))
    for said in ("stopped http://127.0.0.1:8000\n", f"{address or run} has no endpoint running\n"):
        done = CliRunner().invoke(main, ["stop", "--run", address or str(run)])
        assert (done.exit_code, done.stdout) == (0, said)
    assert process.wait(timeout=10) != 0


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Endpoint]:
    """The servers that are started: they sleep, and no cascade ever answers."""
    (tmp_path / "cascade").mkdir()
    sealed.seal(tmp_path / "cascade", {}, {})
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    started: list[Endpoint] = []

    def told(url: str, digest: str) -> str:
        started.append(Endpoint(**json.loads((tmp_path / "endpoint.json").read_text())))
        raise StoppedError("stopped by SIGTERM")

    monkeypatch.setattr(running, "missing", told)
    return started


def test_a_server_that_comes_up_while_we_are_told_to_stop_is_not_left_behind(
    tmp_path: Path, server: list[Endpoint]
) -> None:
    with pytest.raises(StoppedError):
        start_endpoint(tmp_path, tmp_path / "cascade", free_address())
    (endpoint,) = server
    assert endpoint.started
    assert not alive(endpoint)
    assert not (tmp_path / "endpoint.json").exists()


def test_a_server_that_cannot_be_noted_is_stopped(
    tmp_path: Path, server: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []

    def full(home: Home, name: str, text: str) -> None:
        pids.append(json.loads(text)["pid"])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Home, "write", full)
    with pytest.raises(OSError, match="No space left"):
        start_endpoint(tmp_path, tmp_path / "cascade", free_address())
    assert started_at(pids[0]) == ""
    assert server == []


@pytest.mark.parametrize("told", ["no room here", ""])
def test_a_server_that_ends_by_itself_is_told_in_its_own_last_words(
    told: str, tmp_path: Path, server: list[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"echo first\necho '{told}'\n" if told else ""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{words}exit 3\n")
    noted: list[Endpoint] = []

    def missing(url: str, digest: str) -> str:
        noted.append(Endpoint(**json.loads((tmp_path / "endpoint.json").read_text())))
        return "does not answer"

    monkeypatch.setattr(running, "missing", missing)
    log = re.escape(str(tmp_path / "endpoint.log"))
    said = f"^the endpoint did not start: {told or 'does not answer'}; see {log}$"
    with pytest.raises(EndpointError, match=said):
        start_endpoint(tmp_path, tmp_path / "cascade", free_address())
    assert not (tmp_path / "endpoint.json").exists()
    assert not Path(f"/proc/{noted[0].pid}").exists()  # nor a zombie


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_note_that_was_cut_is_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "endpoint.json").write_text(text)
    assert stop_endpoint(tmp_path) == ""
    assert not (tmp_path / "endpoint.json").exists()


@pytest.fixture
def cascade(tmp_path: Path) -> Path:
    """Sealed, of one hop; it has no weights, and nothing gets so far as to miss them."""
    how = SamplingSpec(num_steps=2)
    spec = CascadeSpec(name="tiny", hops=(HopSpec(stage="base", how=how),), context_length=16, image_size=64)
    path = tmp_path / "cascade"
    path.mkdir()
    (path / "cascade.json").write_text(spec.model_dump_json())
    sealed.seal(path, sealed.digests(path), {})
    return path


def test_the_replicas_of_a_hop_may_be_set_by_the_one_command(
    cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[ServeSpec] = []
    monkeypatch.setattr(endpoint, "ray_cluster", lambda verbose: nullcontext())

    def run(spec: ServeSpec, *, blocking: bool) -> None:
        assert blocking
        served.append(spec)

    monkeypatch.setattr(running, "run", run)
    address = free_address()
    words = ["serve", "--cascade", str(cascade), "--port", str(address.port)]
    changes = ["hops.base.max_replicas=3", "hops.base.busy_requests=2", "hop.num_cpus=1", "timeout_s=9"]
    done = CliRunner().invoke(main, [*words, *(word for change in changes for word in ("--set", change))])
    assert done.exit_code == 0, done.stderr
    usual = ServeSpec(cascade=str(cascade), port=address.port)
    base, hop = ReplicaSpec(max_replicas=3, busy_requests=2), ReplicaSpec(num_cpus=1)
    assert served == [usual.but(timeout_s=9, hop=hop, hops={"base": base})]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("hops.bass.max_replicas=2", "'bass' is no hop of tiny; it has base"),
        (
            "hops.base.max_replicas=0",
            "--set hops.base.max_replicas=0: hops.base.max_replicas: Input should be greater than or equal "
            "to 1\n",
        ),
        (
            "hops.base.max_replica=2",
            "--set hops.base.max_replica=2: hops.base: ReplicaSpec has no field 'max_replica'; did you mean "
            "'max_replicas'?\n",
        ),
        ("timeout=9", "--set timeout=9: ServeSpec has no field 'timeout'; did you mean 'timeout_s'?\n"),
        ("hops={base: {num_cpus: -1}, bass: 3}", "; hops.bass: Input should be a valid dictionary or"),
        ("timeout_s", "write it as path.to.field=value"),
    ],
)
def test_replicas_that_there_cannot_be_are_refused_before_anything_is_started(
    change: str, said: str, cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "ray_cluster", lambda verbose: pytest.fail("Ray was started"))
    done = CliRunner().invoke(main, ["serve", "--cascade", str(cascade), "--set", change])
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    refuse_taken(free_address())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(PortTakenError, match=f"port {address.port}.*another port"):
            refuse_taken(address)


def test_a_port_that_is_taken_beside_a_joined_ray_is_told_as_here(
    cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*_: object, **__: object) -> None:
        raise running.PortError("port 8000 of head: Address already in use; stop what listens there")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(endpoint, "ray_cluster", lambda verbose: nullcontext())
    monkeypatch.setattr(running, "run", taken)
    done = CliRunner().invoke(main, ["serve", "--cascade", str(cascade)])
    assert (done.exit_code, done.stderr) == (
        2,
        "ddiff: port 8000 of head: Address already in use; stop what listens there\n",
    )


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_an_address_that_this_machine_does_not_have_is_no_port_that_is_taken(host: str) -> None:
    with pytest.raises(PortTakenError, match=f"; {host} is no address of this machine; use 127") as refused:
        refuse_taken(Address(host, free_address().port))
    assert "stop what listens there" not in str(refused.value)


def test_no_address_at_all_is_not_every_one_of_this_machine() -> None:
    with pytest.raises(PortTakenError, match="no host is named; use 127"):
        refuse_taken(Address("", free_address().port))
    with pytest.raises(ValueError, match=r"host\n.*at least 1 character"):
        ServeSpec(cascade="x", host="")


def test_a_port_that_is_kept_for_root_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(PortTakenError, match=r"port 80 of 127.*below 1024 for root; choose another"):
        refuse_taken(Address("127.0.0.1", 80))
