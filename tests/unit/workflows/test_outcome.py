"""How a training run ends: what would only come again is told at once, and by its own code."""

import errno
import os
import pickle
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pytest
import ray.train.torch
import torch
from ray.exceptions import RayTaskError
from ray.train.v2._internal import exceptions as ray_train

from dd_core import bundle, checkpoint
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.upsampler import UpsamplerSpec
from jobs.failures import Code, code_of, line_of
from tests.conftest import warnings_in
from tests.unit.dd_core.test_checkpoint_ranks import NET
from workflows import fit
from workflows.fit import UNUSED, Trainer, TrainingError
from workflows.outcome import DecidedError, Outcome, decided, told_by_ray
from workflows.row_groups import DataError
from workflows.stopping import Stopping
from workflows.storage import Home, StorageError
from workflows.train_spec import TrainSpec
from workflows.training import error_of, may_lose_nodes
from workflows.worker import Job

STAGE = UpsamplerSpec(net=NET, image_size=16, factor=2, crop=16)
SPEC = TrainSpec(
    name="x",
    stage=STAGE,
    optimizer=OptimizerSpec(learning_rate=1e-3),
    budget=Budget(steps=1, checkpoint_every=1),
    batch_size=8,
    micro_batch_size=4,
)
WEIGHTS = {"w": torch.zeros(2**18)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of 256 KiB."""
    if os.geteuid():
        pytest.skip("only root may mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no mounting here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def told(error: BaseException) -> tuple[Code, str]:
    """What a person and a script are told of it."""
    outcome = decided(error, SPEC, disk=Path("/runs/x"))
    assert outcome is not None
    last = error_of(outcome, SPEC.name)
    return code_of(last), line_of(last)


def test_a_full_disk_ends_the_run_in_one_line_whatever_was_being_written(small_disk: Path) -> None:
    line = "no space left on /runs/x; free some and run the same command again to continue"
    with pytest.raises(BaseException, match="No space left on device") as failed:
        checkpoint.write(small_disk / "checkpoint", WEIGHTS, {"step": 1})
    assert told(failed.value) == (Code.INTERNAL, line)
    with pytest.raises(Exception, match="No space left on device") as failed:
        bundle.save(small_disk / "bundle", STAGE, WEIGHTS, parents={}, facts={})
    assert told(failed.value) == (Code.INTERNAL, line)


def test_a_gpu_that_is_too_small_is_a_matter_of_the_spec() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has more to say.")
    line = "x: CUDA out of memory, with 4 images in one forward of each worker; lower micro_batch_size"
    assert told(error) == (Code.CONFIGURATION, line)


def test_what_may_pass_is_no_outcome() -> None:
    for error in (StorageError("away"), RuntimeError("lost"), ConnectionError("cut")):
        assert decided(error, SPEC, disk=Path("/")) is None


@pytest.mark.parametrize(
    ("cause", "status", "said"),
    [
        (DataError("part-00000.parquet is cut\nadvice"), "data", "part-00000.parquet is cut"),
        (DataError(""), "data", "DataError"),
        (pa.ArrowInvalid("CRC"), "data", "CRC"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "full", "/runs/x"),
    ],
)
def test_a_read_task_that_would_fail_again_ends_the_run(cause: Exception, status: str, said: str) -> None:
    plain = RayTaskError("read", "trace", cause)
    for wrapped in (plain, plain.as_instanceof_cause()):
        assert decided(told_by_ray(wrapped), SPEC, disk=Path("/runs/x")) == (status, said)


@pytest.mark.parametrize("cause", [MemoryError(), OSError(errno.EIO, "I/O"), RuntimeError("lost\nadvice")])
def test_a_read_task_that_may_do_better_is_tried_again(cause: Exception) -> None:
    wrapped = RayTaskError("read", "trace", cause).as_instanceof_cause()
    assert told_by_ray(wrapped) is wrapped
    assert decided(wrapped, SPEC, disk=Path("/runs/x")) is None


def test_an_outcome_travels_as_an_error() -> None:
    error = pickle.loads(pickle.dumps(DecidedError("data", "damaged")))
    assert error.outcome == Outcome("data", "damaged")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray copies its own old fields
def test_ray_train_starts_nothing_for_datasets_and_placement_groups() -> None:
    def asked(kind: type) -> set[str]:
        made = kind(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=1))
        return {type(one).__name__ for one in made._create_default_callbacks()}

    theirs = asked(ray.train.torch.TorchTrainer)
    assert theirs >= UNUSED  # another Ray may call them otherwise
    assert asked(Trainer) == theirs - UNUSED


def killed_at_start() -> ray.train.ControllerError:
    """As Ray tells of a worker that was killed while it imported torch."""
    said = "One of the worker actors failed to initialize due to error:\nTrace\nThe process is killed by OOM"
    return ray.train.ControllerError(ray_train.WorkerGroupStartupFailedError(said))


def fitted(
    errors: Iterable[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stop: bool = False
) -> Outcome:
    """How a run ends whose attempts fail with these, one after the other, and then succeed."""
    coming = iter(errors)

    def attempt(*_: object) -> Outcome:
        if (error := next(coming, None)) is not None:
            raise error
        return Outcome("done")

    monkeypatch.setattr(fit, "attempt", attempt)
    monkeypatch.setattr("ray.cluster_resources", dict[str, float])
    job = SimpleNamespace(home=Home.of(tmp_path))
    told = SimpleNamespace(asked=stop)
    return fit.fit(SPEC.but(restarts=2), cast("Job", job), cast("Stopping", told))


def test_workers_that_die_at_every_start_end_the_run_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fitted([killed_at_start()] * 2, tmp_path, monkeypatch).status == "done"
    with pytest.raises(TrainingError, match=r"x: The process is killed by OOM \(-v shows all\)"):
        fitted([killed_at_start()] * 3, tmp_path, monkeypatch)


def test_workers_for_which_there_is_no_place_yet_are_waited_for_until_the_run_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = ray.train.ControllerError(ray_train.WorkerGroupStartupTimeoutError(2))
    assert fitted([late] * 9, tmp_path, monkeypatch).status == "done"
    stopped = fitted([late], tmp_path, monkeypatch, stop=True)
    assert stopped == ("preempted", "stopped while it waited for workers")


@pytest.mark.parametrize("error", [ray.train.WorkerGroupError("[Rank 0] killed", {}), killed_at_start()])
def test_workers_that_are_lost_while_the_run_stops_are_not_started_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = fitted([error], tmp_path, monkeypatch, stop=True)
    assert stopped == ("preempted", "workers were lost as it stopped")


def test_a_controller_that_failed_otherwise_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="x: a bug"):
        fitted([ray.train.ControllerError(ValueError("a bug"))], tmp_path, monkeypatch)


def test_why_workers_were_lost_is_said_when_they_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(
        [ray.train.WorkerGroupError("[Rank 0 Error Snippet]:\nIOError: no\tlibrary " + "z" * 999, {})],
        tmp_path,
        monkeypatch,
    )
    (line,) = warnings_in(caplog)
    assert line.startswith("x: workers were lost; starting them again, 1 of 2: IOError: no library zzz")
    assert len(line) < 400


@pytest.mark.parametrize(
    ("nodes", "cpus", "may"),
    [
        (1, 4.0, False),
        (2, 4.0, True),
        (1, 0.0, True),
    ],  # the last: a head whose cluster starts nodes on demand
)
def test_a_node_is_listened_to_where_one_may_be_lost(
    nodes: int, cpus: float, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{}] * nodes)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": cpus} if cpus else {})
    assert may_lose_nodes() is may


@pytest.mark.parametrize(("gpus", "uses"), [([2.0, 1.0, 1.0], True), ([1.0, 2.0, 2.0], False)])
def test_workers_that_are_started_again_have_gpus_if_the_first_had_them(
    gpus: list[float], uses: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[bool | None]()

    def attempt(spec: TrainSpec, _: object) -> Outcome:
        told.append(fit.scaling(spec, at_once=1).use_gpu)
        if len(told) < 3:
            raise ray.train.WorkerGroupError("lost with their node", {})
        return Outcome("done")

    monkeypatch.setattr(fit, "attempt", attempt)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": gpus[len(told)]})
    job, two = SimpleNamespace(home=Home.of(tmp_path)), SPEC.but(num_workers=2, restarts=2)
    fit.fit(two, cast("Job", job), cast("Stopping", SimpleNamespace(asked=False)))
    assert told == [uses] * 3


@pytest.mark.parametrize(("gpus", "hidden"), [(0, True), (1, False)])
def test_workers_without_a_gpu_of_their_own_see_none(
    gpus: int, hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = dict[str, str]()

    class Noting:
        def __init__(self, *_: object, run_config: ray.train.RunConfig, **__: object) -> None:
            told.update(run_config.worker_runtime_env["env_vars"])

        def fit(self) -> SimpleNamespace:
            return SimpleNamespace(return_value=("done", ""))

    monkeypatch.setattr(fit, "Trainer", Noting)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": float(gpus)})
    job = cast("Job", SimpleNamespace(home=Home.of(tmp_path), drainable=False, at_once=1))
    assert fit.attempt(SPEC, job) == Outcome("done")
    assert (told.get("CUDA_VISIBLE_DEVICES") == "") is hidden
    assert told.items() >= fit.KEEPS_MEMORY.items()
