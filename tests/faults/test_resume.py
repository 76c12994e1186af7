"""A run that is stopped, killed or given damaged checkpoints goes on as if nothing had been."""

import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dd_core import checkpoint, sealed
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.draft import DraftSpec
from tests.prepared import write_prepared
from tests.unit.workflows.test_embeddings import NET
from tests.unit.workflows.tiny_run import saved
from tests.when import when
from workflows.embeddings import embed
from workflows.fit import RAY_TRAIN
from workflows.journal import curves
from workflows.row_groups import DataError
from workflows.storage import Home
from workflows.train_spec import ResourcesSpec, TrainSpec
from workflows.training import PreemptedError, embeddings_of, inputs, train_stage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.fault,
    pytest.mark.timeout(3000),
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # Ray's, of itself
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of its daemons
]
SHARD = "shard-00001-model-00001-of-00001.safetensors"
SPEC = TrainSpec(
    name="whole",
    stage=DraftSpec(
        embedding_width=16, width=8, image_size=32, measured_images=20
    ),  # looks, then draws noise
    parents={"clip": "clip"},
    optimizer=OptimizerSpec(learning_rate=1e-3, precision="fp32"),
    budget=Budget(steps=240, checkpoint_every=14, report_every=1),
    batch_size=8,
    micro_batch_size=4,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("d") / "prepared", files=3, size=32)


@pytest.fixture(scope="module")
def first(local_ray: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a CLIP and its embeddings of the data."""
    run = tmp_path_factory.mktemp("first")
    clip_in(run)
    embed_for(run, data)
    return run


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """Another one, before its first training."""
    return Path(shutil.copytree(first / "clip", tmp_path / "run" / "clip")).parent


@pytest.fixture(scope="module")
def whole(first: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage directory of a run that nothing has happened to."""
    run = tmp_path_factory.mktemp("whole")
    shutil.copytree(first / "clip", run / "clip")
    train_stage(SPEC, run=run, data=data)
    return run / "whole"


def clip_in(run: Path) -> None:
    """The parent, which has learned nothing."""
    saved(run, "clip", ClipSpec(net=NET), {})


def embed_for(run: Home | Path, data: Home | Path) -> None:
    """What a run does before it trains a stage that reads embeddings."""
    told = embeddings_of(SPEC, inputs(SPEC, run=run, data=data), run=run)
    assert told is not None
    embed(told)


def steps_of(stage: Path) -> list[int]:
    return list(curves(stage / "metrics.jsonl").get("train/loss", {}))


def assert_same(one: Path, other: Path) -> None:
    """To the last bit: weights, averages, optimizer."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def reached(stage: Path, step: int) -> Callable[[], bool]:
    """Whether the journal has this step."""
    return lambda: max(steps_of(stage), default=0) >= step


def signal_a_worker(number: signal.Signals = signal.SIGKILL) -> int:
    """Kill one as the kernel would, or stop it; returns which, 0 if there is none any more."""
    worker = max((pid for pid in running(b"ray::RayTrainWorker") if os.getpid() in ancestors(pid)), default=0)
    if worker:
        os.kill(worker, number)
    return worker


def running(title: bytes) -> list[int]:
    """Processes that call themselves so; others come and go meanwhile."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(title):
                found.append(int(path.parent.name))
    return found


def ancestors(pid: int) -> list[int]:
    """The processes that a process descends from."""
    found = []
    with contextlib.suppress(OSError):
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            found.append(pid)
    return found


def test_stopped_its_newest_checkpoint_damaged_killed_and_continued_is_bit_for_bit_the_unbroken_run(
    whole: Path, data: Path, run: Path
) -> None:
    spec = SPEC.but(name="cut")
    stage = run / "cut"
    ctrl_c = when(reached(stage, 20), lambda: os.kill(os.getpid(), signal.SIGINT))  # Ray would hear it first
    with ctrl_c, pytest.raises(PreemptedError, match=r"cut: stopped at step \d+ of 240; run the same "):
        train_stage(spec, run=run, data=data)
    stopped = max(steps_of(stage))
    newest = max((stage / "checkpoints").iterdir())
    assert newest.name == f"step-{stopped:08d}"  # nothing was lost
    bytes_ = bytearray((newest / SHARD).read_bytes())
    bytes_[-1] ^= 1
    (newest / SHARD).write_bytes(bytes_)  # so that it is stepped over
    killed: list[int] = []
    with when(reached(stage, stopped + 24), lambda: killed.append(signal_a_worker())):
        train_stage(spec, run=run, data=data)
    assert any(killed)
    for name in (f"checkpoints/step-00000240/{SHARD}", "bundle/weights.safetensors"):
        assert_same(stage / name, whole / name)
    ours, theirs = (curves(path / "metrics.jsonl")["train/loss"] for path in (stage, whole))
    assert ours == theirs


def test_two_workers_lost_more_often_than_restarts_says_but_after_a_checkpoint_each_time_read_every_row(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
    assert RAY_TRAIN[hanging] == "60"  # as a run has it; nobody waits for so long here
    monkeypatch.setenv(hanging, "20")
    spec = SPEC.but(
        name="two", num_workers=2, restarts=1, budget=Budget(steps=200, checkpoint_every=8, report_every=1)
    )
    lost: list[int] = []
    with (
        when(reached(run / "two", 12), lambda: lost.append(signal_a_worker(signal.SIGKILL))),  # one dies
        when(reached(run / "two", 28), lambda: lost.append(signal_a_worker(signal.SIGSTOP))),  # one hangs
    ):
        bundle = train_stage(spec, run=run, data=data)  # each worker refuses a row that is not due
    assert len(lost) == 2
    assert all(lost)
    assert not set(lost) & set(running(b"ray::RayTrainWorker"))
    facts = sealed.verify(bundle).facts
    assert (facts["step"], facts["images"]) == (200, 200 * 8)
    saved = checkpoint.facts(run / "two" / "checkpoints" / "step-00000200")
    assert (saved["step"], saved["images"]) == (200, 200 * 8)
    assert steps_of(run / "two") == list(range(1, 201))
    for shard in (run / "two" / "checkpoints").glob("*/shard-*"):
        shard.write_bytes(b"damaged")
    shutil.rmtree(run / "two" / "bundle")
    with pytest.raises(sealed.SealError, match=r"two: none of the 2 checkpoints in .* is whole; put a good"):
        train_stage(spec, run=run, data=data)  # which one worker finds, while the other waits for it


def test_what_is_done_is_skipped_what_is_changed_is_redone_and_bad_inputs_are_named(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    run = whole.parent
    before = (whole / "bundle" / sealed.MANIFEST).stat().st_mtime_ns
    assert train_stage(SPEC.but(num_workers=2, restarts=1), run=run, data=data) == whole / "bundle"
    assert (whole / "bundle" / sealed.MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"its clip 'nowhere' is neither a trained stage of .* train 'nowhere'"
    ):
        train_stage(SPEC.but(parents={"clip": "nowhere"}), run=run, data=data)
    with pytest.raises(DataError, match="is no finished prepared data"):
        train_stage(SPEC, run=run, data=tmp_path)


def test_embeddings_that_are_damaged_or_gone_are_refused_by_name_and_made_anew_by_the_next_run(
    data: Path, run: Path
) -> None:
    spec = SPEC.but(budget=Budget(steps=4, checkpoint_every=4))
    beside = run / "clip" / "embeddings" / "32" / "part-00001.parquet"
    good = beside.read_bytes()
    beside.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    with pytest.raises(DataError, match=r"whole: .*embeddings/32/part-00001.parquet, row group 0: .*anew"):
        train_stage(spec, run=run, data=data)
    beside.unlink()
    with pytest.raises(DataError, match=r"embeddings/32/part-00001.parquet: .*run the same command again"):
        train_stage(spec, run=run, data=data)
    embed_for(run, data)
    assert beside.read_bytes() == good
    assert sealed.verify(train_stage(spec, run=run, data=data)).facts["step"] == 4


class WhenWaited(logging.Handler):
    """SIGTERM as soon as it is said that workers are waited for."""

    def emit(self, record: logging.LogRecord) -> None:
        if "they are waited for" in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stop_is_heard_while_workers_are_waited_for(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")
    spec = SPEC.but(name="waiting", resources=ResourcesSpec(cpus=64))  # which no node here will ever have
    sign = WhenWaited()
    logging.getLogger("workflows.fit").addHandler(sign)
    try:
        with pytest.raises(
            PreemptedError, match="waiting: stopped while it waited for workers; run the same"
        ):
            train_stage(spec, run=run, data=data)
    finally:
        logging.getLogger("workflows.fit").removeHandler(sign)
