"""One process at a time works in a directory, on whichever machine; who is gone is in nobody's way."""

import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.s3 import s3_server
from workflows import claim as claims
from workflows import storage
from workflows.claim import Lease, TakenError, claim
from workflows.storage import Home

LEASE = "lock.lease"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A run in a store, seen from the machine `a`."""
    storage.store.cache_clear()
    if request.param == "local":
        root = f"local://{tmp_path}/store/run"
        storage.store(root).auto_mkdir = True
        yield Home(root)
    else:
        for name, value in request.getfixturevalue("s3").items():
            monkeypatch.setenv(name, value)
        yield Home(f"s3://bucket/{uuid.uuid4().hex}")
    storage.store.cache_clear()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LOOK_S", 0.02)
    monkeypatch.setattr(claims, "RENEW_S", 0.05)
    monkeypatch.setattr(claims, "DEAD_S", 0.5)


@pytest.fixture
def on(tmp_path: Path, run: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Go on as another machine, which has a disk of its own."""

    def go(machine: str) -> None:
        (tmp_path / machine).mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / machine))
        run.here.mkdir(parents=True, exist_ok=True)

    go("a")
    return go


def there(run: Home) -> str:
    """Who holds the run, as the store says."""
    return str(run.facts(LEASE).get("token", ""))


def test_another_machine_is_told_who_works_there_in_which_job_and_since_when(
    run: Home, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "DEAD_S", 60.0)  # the first renewal that is seen says enough
    with claim(run, "lock", job="smoke.1"):
        mine = there(run)
        on("b")
        with pytest.raises(TakenError, match=r"^process \d+ on \S+ in job smoke\.1, since 20\d\d-.* UTC$"):
            claim(run, "lock").__enter__()
        assert there(run) == mine
        on("a")
    assert not run.names()
    on("b")
    with claim(run, "lock"):
        assert there(run) not in ("", mine)


def dead(run: Home) -> str:
    """The lease of a process of this machine that was killed; what its lock file said."""
    with claim(run, "lock"):
        said, text = (run.here / "lock").read_text(), run.text(LEASE)
    run.write(LEASE, text)
    return said


def clock(sleep: Callable[[float], None], now: Callable[[], float]) -> SimpleNamespace:
    """The module `time`, of which some is ours."""
    return SimpleNamespace(sleep=sleep, monotonic=now, strftime=time.strftime, gmtime=time.gmtime)


def test_one_that_gives_no_sign_is_taken_over_but_not_before_its_time(
    run: Home, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead(run)
    on("b")
    looks: list[float] = []
    monkeypatch.setattr(claims, "time", clock(looks.append, lambda: sum(looks)))
    with claim(run, "lock"):
        assert sum(looks) >= claims.DEAD_S
        assert there(run)


@pytest.mark.parametrize("cut", ["", '{"who": "process'])
def test_one_that_was_cut_is_watched_as_any_other_and_then_taken_over(
    cut: str, run: Home, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead(run)
    run.write(LEASE, cut)
    looks: list[float] = []
    monkeypatch.setattr(claims, "time", clock(looks.append, lambda: sum(looks)))

    def refuses(home: Home, name: str, text: str) -> bool:
        assert not home.has(name), "asked for while another's stands there"
        home.write(name, text)
        return True

    monkeypatch.setattr(Home, "create", refuses)
    with claim(run, "lock"):
        assert sum(looks) >= claims.DEAD_S
        assert there(run)


@pytest.mark.parametrize("texts", [("", "whole"), ("whole", "")], ids=["first", "second"])
def test_one_that_is_read_while_it_is_written_tells_who_works_there_all_the_same(
    texts: tuple[str, str], run: Home, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(run, LEASE, "process 7 on a")
    reads = [lease.text() if text == "whole" else text for text in texts]
    monkeypatch.setattr(Lease, "seen", lambda _: reads.pop(0))
    with pytest.raises(TakenError, match=r"^process 7 on a$"):
        claim(run, "lock").__enter__()
    assert not reads


def test_the_next_start_on_the_machine_of_one_that_was_killed_does_not_wait(
    run: Home, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("a")
    dead(run)

    def never(_: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(claims, "time", clock(never, time.monotonic))
    with claim(run, "lock"):
        assert there(run)


def test_of_many_that_begin_at_once_one_may(run: Home, on: Callable[[str], None]) -> None:
    on("a")
    leases = [Lease(run, LEASE, f"process {number}") for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda lease: run.create(LEASE, lease.text()), leases))
    if run.root.startswith("s3://"):  # a directory has no such condition in fsspec
        assert made.count(True) == 1
    holders = [lease for lease in leases if lease.token == there(run)]
    assert len(holders) == 1


def test_who_was_taken_over_stops_and_leaves_the_lease_of_the_other(
    run: Home, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("a")
    told = threading.Event()
    monkeypatch.setattr(claims.os, "kill", lambda pid, number: told.set() if number == signal.SIGTERM else 0)
    with claim(run, "lock"):
        run.write(LEASE, json.dumps({"who": "somebody else", "token": "f" * 32, "renewed": 0}))
        assert told.wait(120)
    assert there(run) == "f" * 32


def test_a_lease_that_a_person_has_removed_is_not_made_again(run: Home, on: Callable[[str], None]) -> None:
    on("a")
    lease = Lease(run, LEASE, "process 1")
    lease.take("")
    lease.renew()
    assert run.facts(LEASE)["renewed"] == 1
    run.drop(LEASE)
    lease.renew()
    lease.release()
    assert not there(run)
