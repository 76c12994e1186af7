"""A run in a store: what several workers of one machine send arrives whole, and nothing is passed over."""

import json
import os
import shutil
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

from dd_core import checkpoint, sealed
from tests.conftest import room_for, warnings_in
from tests.unit.workflows.test_outcome import SPEC
from workflows import stopping, storage, training, worker
from workflows.checkpoints import STEPPED_BACK, newest
from workflows.journal import JOURNAL, entries
from workflows.row_groups import DataError
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


def saved_in(stage: Home, step: int) -> Home:
    """A checkpoint, where the stage is."""
    place = stage.at(f"checkpoints/step-{step:08d}")
    checkpoint.write(place.here, WEIGHTS, {"step": step})
    stage.send(f"checkpoints/step-{step:08d}")
    return place


def damaged(path: Path, bit: int = 1) -> None:
    """One bit of the file is another."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ bit]))


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
    assert newest(home) == "checkpoints/step-00000010"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the store says, one for each file that is sent, before it takes any."""
    put_file, says = LocalFileSystem.put_file, list[str]()

    def away(*args: Any, **options: Any) -> None:
        if says:
            raise OSError(says.pop())
        put_file(*args, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", away)
    return says


def recorder_of(stage: Home, step: int) -> worker.Recorder:
    """Of the only worker of a training, at a step."""
    job: Any = SimpleNamespace(home=stage, spec=SPEC.but(checkpoints_kept=1), facts={})
    state: Any = SimpleNamespace(step=step, skipped=0, average=WEIGHTS, tensors=lambda: WEIGHTS)
    return worker.Recorder(job, worker.Position(0, 1), state, {}, seconds_before=0.0)


def test_a_store_that_is_away_for_minutes_has_the_checkpoint_in_the_end(
    run: Home, failing: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("workflows.files.time.sleep", pauses.append)
    stage = run.at("stage")
    recorder_of(stage, 4).save()
    failing += ["the store is away"] * 12
    recorder_of(stage, 8).save()
    assert newest(stage) == "checkpoints/step-00000008"
    assert stage.at("checkpoints").names() == ["step-00000008"]
    assert len(pauses) == 12
    (said,) = warnings_in(caplog)
    assert "step-00000008 cannot be written to: " in said
    failing += ["the store is away"] * 99
    pauses.clear()
    with pytest.raises(StorageError, match=r"-00000009 cannot be written to: .*the store is away.*; run the"):
        recorder_of(stage, 9).save()
    assert 590 < sum(pauses) < 700
    assert newest(stage) == "checkpoints/step-00000008"


def test_a_grid_that_the_store_does_not_take_is_missed_aloud_and_ends_no_run(
    run: Home, failing: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("workflows.samples.drawn", lambda *_: torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(worker.Recorder, "shown", lambda _: None)
    stage = run.at("stage")
    recorder = recorder_of(stage, 4)
    failing.append("the store is away")
    recorder.draw(4)
    (said,) = warnings_in(caplog)
    assert said.startswith("x: no samples/step-00000004.png: ")
    recorder.draw(8)
    assert stage.at("samples").names() == ["step-00000008.png"]
    assert [entry.step for entry in entries(recorder.journal.path)] == [8]


@pytest.mark.parametrize(
    ("cause", "again"), [(StorageError("the store is away"), True), (DataError("cut\nadvice"), False)]
)
def test_a_store_that_is_away_while_workers_read_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, *, again: bool
) -> None:
    def reading(job: worker.Job) -> worker.Outcome:
        raise RayTaskError("read", "traceback", cause).as_instanceof_cause()

    monkeypatch.setattr(worker, "trained_to_the_end", reading)
    job: Any = SimpleNamespace(home=Home("/"), spec=None)
    if again:
        with pytest.raises(StorageError, match=r"^the store is away$"):
            worker.ended(job)
    else:
        assert worker.ended(job) == worker.Outcome("data", "cut")


def test_what_finds_no_room_leaves_what_was_there_and_no_draft(tmp_path: Path) -> None:
    home = Home.of(tmp_path)
    home.write("seconds.json", "{}")
    for _ in range(2):
        with room_for(100), pytest.raises(OSError, match="File too large"):
            home.write("seconds.json", "x" * 1000)
    assert home.names() == ["seconds.json"]
    assert home.text("seconds.json") == "{}"


@pytest.mark.parametrize("harmed", [1, 9])
def test_a_copy_that_is_harmed_on_its_way_is_fetched_once_more_and_never_used(
    run: Home, monkeypatch: pytest.MonkeyPatch, harmed: int
) -> None:
    place = saved_in(run, 10)
    shutil.rmtree(storage.scratch(run.root))
    get_file, left = LocalFileSystem.get_file, [harmed]

    def on_a_bad_wire(fs: Any, there: str, here: str, **options: Any) -> None:
        get_file(fs, there, here, **options)
        if "shard" in there and left[0]:
            left[0] -= 1
            damaged(Path(here))

    monkeypatch.setattr(LocalFileSystem, "get_file", on_a_bad_wire)
    if harmed == 1:
        assert sealed.verify(place.fetched()).facts["step"] == 10
    else:
        with pytest.raises(sealed.SealError, match=r"^local://.*-00000010, fetched 2 times: .*sha256 is"):
            place.fetched()


def test_a_damaged_checkpoint_is_stepped_over_aloud_and_where_all_are_nothing_begins_anew(
    tmp_path: Path,
) -> None:
    stage = Home.of(tmp_path / "stage")
    assert newest(stage) == ""
    first, second, unfinished = (saved_in(stage, step) for step in (10, 20, 30))
    (unfinished.here / sealed.MANIFEST).unlink()
    (stage.here / "checkpoints" / "step-00000010-good").mkdir()
    damaged(next(second.here.glob("shard-*")))
    assert newest(stage) == "checkpoints/step-00000010"
    assert stage.text(STEPPED_BACK).startswith("stepping back: ")
    assert "step-00000020/shard" in stage.text(STEPPED_BACK)
    damaged(next(first.here.glob("shard-*")))
    with pytest.raises(sealed.SealError, match=r"none of the 2 checkpoints in .*/checkpoints is whole; put"):
        newest(stage)
    assert second.has(sealed.MANIFEST)


@pytest.mark.parametrize("stored", [False, True])
def test_a_manifest_that_is_no_text_any_more_is_damaged_like_any_other(
    run: Home, tmp_path: Path, stored: bool
) -> None:
    stage = run if stored else Home.of(tmp_path / "stage")
    for step in (10, 20):
        saved_in(stage, step)
    where = Path(stage.address.removeprefix("local://")) if stored else stage.here
    damaged(where / "checkpoints/step-00000020" / sealed.MANIFEST, 0x80)
    shutil.rmtree(storage.scratch(run.root), ignore_errors=True)
    assert stage.facts(f"checkpoints/step-00000020/{sealed.MANIFEST}") == {}
    assert newest(stage) == "checkpoints/step-00000010"


@pytest.mark.fault
def test_a_manifest_that_names_files_elsewhere_has_none_fetched(run: Home, tmp_path: Path) -> None:
    place = saved_in(run, 10)
    manifest = Path(place.address.removeprefix("local://")) / sealed.MANIFEST
    body = json.loads(manifest.read_text())
    for name in ("../../../../../out", str(tmp_path / "out")):
        manifest.write_text(json.dumps(body | {"files": body["files"] | {name: "0" * 64}}))
        shutil.rmtree(storage.scratch(run.root), ignore_errors=True)
        with pytest.raises(sealed.SealError, match=r"/manifest.json names '.*out', which is outside"):
            place.fetched()
    assert not list(tmp_path.rglob("out"))


def test_the_driver_says_once_what_workers_step_over_now_and_nothing_of_an_earlier_start(
    run: Home, caplog: pytest.LogCaptureFixture
) -> None:
    stage = run.at("base")
    stage.write(STEPPED_BACK, "stepping back: long ago")
    with training.stepping_back(stage) as looking:
        stage.write(STEPPED_BACK, "stepping back: one")
        looking.act()
        stage.write(STEPPED_BACK, "stepping back: one\nstepping back: two")
    said = warnings_in(caplog)
    assert said == ["base: stepping back: one", "base: stepping back: two"]


def test_stages_are_told_to_stop_though_the_store_of_one_fails_for_a_while(
    tmp_path: Path, run: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stopping, "TELL_EVERY_S", 0.01)
    put_file, failing = LocalFileSystem.put_file, ["once", "and again"]

    def away(*args: Any, **options: Any) -> None:
        if failing:
            raise OSError(failing.pop())
        put_file(*args, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", away)
    told, stages = stopping.Stopping(), (run.at("a"), Home.of(tmp_path / "b"))
    with told.joined(stages[0]), told.joined(stages[1]):
        told.tell()
        assert [stage.text(stopping.STOP) for stage in stages] == ["stop", "stop"]
    told_of = [record.levelname for record in caplog.records if record.name == stopping.log.name]
    assert told_of.count("WARNING") == 1
    assert not any(stage.has(stopping.STOP) for stage in stages)


def test_what_is_to_be_sent_and_is_gone_is_an_error(run: Home) -> None:
    with pytest.raises(StorageError, match=r"/a is gone; it was to be sent to local://.*/run/a$"):
        run.send("a")
    run.send("a", missing_ok=True)
    assert run.names() == []


def test_one_worker_of_each_node_hashes_a_checkpoint_and_the_others_wait_for_it(
    run: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, hashed, waited = saved_in(run, 10), list[Path](), list[int]()
    real = sealed.sha256

    def counted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(sealed, "sha256", counted)
    monkeypatch.setattr(worker.dist, "barrier", lambda: waited.append(len(hashed)))
    files = len(json.loads((home.here / sealed.MANIFEST).read_text())["files"])
    for rank in range(4):  # of two nodes
        found = worker.brought({"it": home}, worker.Position(rank, 4, rank % 2))
        assert found == {"it": home.here}
    assert len(hashed) == 2 * files
    assert waited == [files, files, 2 * files, 2 * files]
    assert newest(run) == "checkpoints/step-00000010"
    assert len(hashed) == 3 * files
    worker.brought({"it": home}, worker.Position(0, 4), by_rank_0=True)
    assert len(hashed) == 3 * files
    worker.brought({"it": home}, worker.Position(2, 4), by_rank_0=True)
    assert len(hashed) == 4 * files


def test_a_checkpoint_on_a_directory_of_all_machines_is_verified_once_when_it_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, hashed, real = Home.of(tmp_path / "stage"), list[Path](), sealed.sha256
    files = json.loads((saved_in(stage, 10).here / sealed.MANIFEST).read_text())["files"]
    monkeypatch.setattr(sealed, "sha256", lambda path: hashed.append(path) or real(path))
    assert newest(stage) == "checkpoints/step-00000010"
    assert len(hashed) == len(files)
    damaged(next((stage.here / "checkpoints/step-00000010").glob("*.safetensors")))
    with pytest.raises(sealed.SealError, match="none of the 1 checkpoints"):
        newest(stage)


def test_the_marker_that_a_console_makes_for_a_folder_is_nothing_in_it(
    run: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = LocalFileSystem.ls

    def ls(self: LocalFileSystem, path: str, **how: Any) -> list[str]:
        return [f"{self._strip_protocol(path)}/", *listed(self, path, **how)]

    run.write("a/b", "c")
    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    assert run.at("a").names() == ["b"]
