"""A cascade from a store: whole and the one that was asked for, or not at all."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from dd_core import sealed
from dd_core.scratch import scratch_directory
from serve.fetching import HELD, copy, on_this_machine
from tests.unit.serve.tiny import tiny_cascade

STORE = fsspec.filesystem("memory")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The address of a cascade and its digest."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    digest = tiny_cascade(tmp_path)
    STORE.put(str(tmp_path / "cascade"), "/cascade", recursive=True)
    yield "memory://cascade", digest
    STORE.rm("/", recursive=True)


def test_it_is_fetched_once_and_opened_from_there(stored: tuple[str, str]) -> None:
    address, digest = stored
    path = on_this_machine(address, digest)
    assert sealed.verify(path).digest == digest
    for place in (path.parent, path.parent.parent):  # runs of stores lie in the outer one
        assert place.stat().st_mode & 0o777 == 0o700
    STORE.rm("/cascade", recursive=True)
    assert on_this_machine(address, digest) == path


@pytest.mark.fault
@pytest.mark.parametrize("lost", ["base/weights.safetensors", sealed.MANIFEST])
def test_a_fetched_cascade_that_has_lost_a_file_is_fetched_anew(stored: tuple[str, str], lost: str) -> None:
    path = on_this_machine(*stored)
    (path / lost).unlink()
    assert on_this_machine(*stored) == path
    assert sealed.verify(path).digest == stored[1]
    assert [one for one in path.parent.iterdir() if one.is_dir()] == [path]


class Slow:
    """A store that says who fetches from it, and lets nobody go on before it is told."""

    def __init__(self) -> None:
        self.asked, self.gate = 0, threading.Event()

    def copy(self, files: Any, root: str, address: str, draft: Path) -> None:
        self.asked += 1
        assert self.gate.wait(120)
        copy(files, root, address, draft)


def test_one_replica_of_a_machine_fetches_a_cascade_and_the_others_wait_for_it(
    stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, waiting = Slow(), threading.Barrier(4)

    def lock(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX:
            waiting.wait(120)  # each has looked, and found nothing
        fcntl.flock(file, how)

    monkeypatch.setattr("serve.fetching.copy", slow.copy)
    modes = {name: getattr(fcntl, name) for name in ("LOCK_EX", "LOCK_NB", "LOCK_SH")}
    monkeypatch.setattr("serve.fetching.fcntl", SimpleNamespace(flock=lock, **modes))
    with ThreadPoolExecutor(3) as pool:
        replicas = [pool.submit(on_this_machine, *stored) for _ in range(3)]
        waiting.wait(120)
        slow.gate.set()
        assert len({one.result() for one in replicas}) == 1
    assert slow.asked == 1


def test_who_fetches_a_cascade_removes_those_that_nobody_has_opened_for_long_and_nobody_holds(
    stored: tuple[str, str], tmp_path: Path
) -> None:
    fetched = []
    for seed in (1, 2, 3):
        digest = tiny_cascade(tmp_path / str(seed), seed=seed)
        STORE.put(str(tmp_path / str(seed) / "cascade"), f"/cascades/{seed}", recursive=True)
        fetched.append(on_this_machine(f"memory://cascades/{seed}", digest))
    old, held, recent = fetched
    for one in (old, recent):
        os.close(HELD.pop(one))  # as the end of its process does
    for one in (old, held):
        os.utime(one.with_suffix(".used"), (1, 1))
    last = on_this_machine(*stored)
    assert {one for one in old.parent.iterdir() if one.is_dir()} == {held, recent, last}
    assert on_this_machine("memory://cascades/1", old.name) == old


@pytest.mark.fault
def test_what_a_killed_replica_had_begun_to_fetch_is_removed_and_what_is_being_fetched_is_not(
    stored: tuple[str, str],
) -> None:
    place = scratch_directory("cascades") / stored[1]
    left, others, fetched = (place.with_name(name) for name in (stored[1], "c" * 64, "d" * 64))
    for one in (left, others, fetched):
        one.with_suffix(".draft").mkdir()
    with fetched.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        on_this_machine(*stored)
    assert {one for one in place.parent.iterdir() if one.is_dir()} == {place, fetched.with_suffix(".draft")}


@pytest.mark.fault
def test_a_flipped_bit_a_missing_file_and_another_cascade_are_refused(stored: tuple[str, str]) -> None:
    address, digest = stored
    with pytest.raises(sealed.SealError, match=f"is cascade {digest[:12]}, not {'f' * 12} as asked for"):
        on_this_machine(address, "f" * 64)
    with pytest.raises(ValueError, match="is fetched by its digest"):
        on_this_machine(address, "../../x")
    whole = STORE.cat_file("/cascade/base/weights.safetensors")
    STORE.pipe_file("/cascade/base/weights.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(sealed.SealError, match=r"base/weights\.safetensors: sha256 is"):
        on_this_machine(address, digest)
    STORE.rm_file("/cascade/base/weights.safetensors")
    with pytest.raises(sealed.SealError, match=r"base/weights\.safetensors is missing"):
        on_this_machine(address, digest)


@pytest.mark.fault
def test_a_manifest_that_names_files_elsewhere_writes_none(stored: tuple[str, str], tmp_path: Path) -> None:
    address, digest = stored
    body = json.loads(STORE.cat_file("/cascade/manifest.json"))
    body["files"] |= {"../../../out": "0" * 64}
    STORE.pipe_file("/cascade/manifest.json", json.dumps(body).encode())
    with pytest.raises(sealed.SealError, match=r"names '\.\./\.\./\.\./out', which is outside"):
        on_this_machine(address, digest)
    STORE.rm_file("/cascade/manifest.json")
    with pytest.raises(sealed.SealError, match="it was never finished"):
        on_this_machine(address, digest)
    assert not list((tmp_path / "tmp").rglob("*.safetensors"))
