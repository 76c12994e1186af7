"""The endpoint in the background: it is known by more than its number, and a taken port is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.deploy import Address, Endpoint, alive, free_address, refuse_taken, started_at, stop_endpoint
from jobs.failures import PortTakenError


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


def test_a_taken_port_is_refused_and_a_free_one_is_not() -> None:
    refuse_taken(free_address())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(PortTakenError, match=f"port {address.port}.*another port"):
            refuse_taken(address)
