"""A run in a store: what several workers of one machine send arrives whole, and nothing is passed over."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fsspec.implementations.local import LocalFileSystem
from ray.exceptions import RayTaskError

from dd_core import checkpoint
from workflows import storage, worker
from workflows.feed import DataError
from workflows.journal import JOURNAL
from workflows.storage import Home, StorageError

WEIGHTS = {"w": torch.zeros(4)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """In a store that is a directory of this machine."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    storage.store.cache_clear()
    home = Home(f"local://{tmp_path}/store/run")
    storage.store(home.root).auto_mkdir = True
    return home


def recorder(home: Home, rank: int, ranks: int) -> Any:
    return SimpleNamespace(who=worker.Position(rank, ranks), job=SimpleNamespace(home=home))


def rank_main(rank: int, home: Home, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(meeting), 2), rank=rank, world_size=2)
    storage.store(home.root).auto_mkdir = True
    put_file = LocalFileSystem.put_file

    def slowly(*args: Any, **options: Any) -> None:
        time.sleep(0.2)  # a request of a store
        put_file(*args, **options)

    LocalFileSystem.put_file = slowly
    place = home.at("checkpoints/step-00000010")
    written = checkpoint.write(place.here, WEIGHTS, {"step": 10})
    worker.Recorder.send(recorder(home, rank, 2), place, written)
    dist.barrier()
    os._exit(0)  # gloo on CPU sometimes aborts in its own teardown


@pytest.mark.slow
def test_workers_of_one_machine_leave_each_other_time_to_send_a_checkpoint(run: Home, tmp_path: Path) -> None:
    home = run.at("stage")
    home.here.mkdir(parents=True)
    (home.here / JOURNAL).write_text("1\n")
    mp.spawn(rank_main, (home, tmp_path / "meeting"), nprocs=2)
    assert home.text(JOURNAL) == "1\n"
    assert worker.newest(home) == "checkpoints/step-00000010"


@pytest.mark.parametrize(
    ("cause", "again"), [(StorageError("the store is away"), True), (DataError("cut\nadvice"), False)]
)
def test_a_store_that_is_away_while_workers_read_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, *, again: bool
) -> None:
    def reading(job: worker.Job) -> worker.Outcome:
        raise RayTaskError("read", "traceback", cause).as_instanceof_cause()

    monkeypatch.setattr(worker, "trained_to_the_end", reading)
    job: Any = None
    if again:
        with pytest.raises(StorageError, match=r"^the store is away$"):
            worker.ended(job)
    else:
        assert worker.ended(job) == worker.Outcome("data", "cut")


def test_what_is_to_be_sent_and_is_gone_is_an_error(run: Home) -> None:
    with pytest.raises(StorageError, match=r"/a is gone; it was to be sent to local://.*/run/a$"):
        run.send("a")
    run.send("a", missing_ok=True)
    assert run.names() == []
