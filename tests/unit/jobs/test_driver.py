"""A run has one driver: a second start touches nothing, and one that was killed is in nobody's way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.driver import AlreadyRunningError, Driver
from workflows import storage
from workflows.storage import Home

DRIVER = """
import os, sys, time
from jobs.driver import Driver
from workflows.storage import Home
with Driver(Home.of(sys.argv[1])) as driver:
    driver.opened()
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


class Other(NamedTuple):
    """Another driver of the run."""

    process: "subprocess.Popen[str]"
    child: int
    """A process that it has started by fork, with all its files open."""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "smoke")], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield Other(process, child)
        finally:
            os.kill(child, signal.SIGKILL)
            process.kill()


@pytest.mark.slow
@pytest.mark.fault
def test_a_second_start_is_refused_and_one_after_a_kill_is_not(
    tmp_path: Path, other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    note = tmp_path / "smoke" / "endpoint.json"
    note.write_text("{}")
    for words in (["run"], ["train", "clip"]):
        done = CliRunner().invoke(main, [*words, "--recipe", "smoke"])
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith(
            f"ddiff: {tmp_path}/smoke is being made by process {other.process.pid} on "
        )
        assert len(done.stderr.splitlines()) == 1
    assert note.exists()
    assert sorted(path.name for path in (tmp_path / "smoke").iterdir()) == [".driver", "endpoint.json"]

    other.process.kill()
    other.process.wait()
    os.kill(other.child, 0)  # it lives on, and holds nothing
    with Driver(Home.of(tmp_path / "smoke")) as driver:
        assert driver.opened().here == tmp_path / "smoke"
        assert (tmp_path / "smoke" / ".driver").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_is_not_there_is_locked_when_it_is_opened_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Driver(Home.of(tmp_path / "run")):
        assert not list(tmp_path.iterdir())
    with Driver(Home.of(tmp_path / "run")) as driver:
        driver.opened()
        assert driver.claimed

    def taken(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", taken)
    with pytest.raises(AlreadyRunningError, match=rf"run is being made by process {os.getpid()} on "):
        Driver(Home.of(tmp_path / "run")).opened()


def test_a_run_in_a_store_is_refused_to_the_driver_of_another_machine_which_is_told_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.claim.RENEW_S", 0.1)
    monkeypatch.setattr("workflows.claim.LOOK_S", 0.2)
    storage.store.cache_clear()
    home = Home(f"local://{tmp_path}/store/run")
    storage.store(home.root).auto_mkdir = True

    def on(machine: str) -> None:
        (tmp_path / machine).mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / machine))

    on("one")
    told = json.dumps({"metadata": {"job_submission_id": "smoke.1"}})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", told)
    with Driver(home) as driver:
        driver.opened()
        on("other")
        with (
            Driver(home) as second,
            pytest.raises(
                AlreadyRunningError,
                match=r"store/run is being made by process \d+ on \S+ in job smoke\.1, since .* stop it, and",
            ),
        ):
            second.opened()


def test_a_directory_that_cannot_be_locked_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", unknown)
    with Driver(Home.of(tmp_path / "run")) as driver:
        driver.opened()
    assert "cannot be locked (Function not implemented); do not start this twice" in caplog.text
