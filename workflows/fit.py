"""Run the workers of one training by Ray Train, and again after losses, until all reach a common outcome."""

import logging
import os
import shutil
import uuid
from contextlib import suppress
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch

from dd_core import sealed
from workflows.checkpoints import finished_checkpoints
from workflows.files import one_line
from workflows.outcome import DecidedError, Outcome
from workflows.process_group import ProcessGroup
from workflows.stopping import Stopping
from workflows.storage import Home, StorageError
from workflows.train_spec import TrainSpec, cpu_share
from workflows.worker import Job, work

log = logging.getLogger(__name__)
RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the default of 2 s is waited out several times a stage
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",  # a hang is noticed after a minute, not ten
}
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
FROM_OUTSIDE = frozenset(os.environ)
"""Variables that whoever started this process has set: what they say is not changed."""
KEEPS_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}
"""Settings of glibc in the workers: memory that one step frees is kept for the next one, instead of going
back to the kernel and being faulted in again, page by page."""
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Hides the GPUs of a node from workers that asked for none: Ray leaves them in sight, where torch and its
checkpoints would take memory on the first one."""
TOO_LATE, NOT_STARTED = "WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"
"""Ray Train's errors (ray.train.v2._internal.exceptions): no room for all workers within its timeout, which
others may still free; and a worker that died before it trained, of its node, of memory, of a library."""
UNUSED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
"""Callbacks of Ray Train that each start a process beside every group of workers: one to split datasets, and
we give it none; one to remove placement groups of a dead controller, which end with our driver."""


class Trainer(ray.train.torch.TorchTrainer):
    """Ray's trainer without the two UNUSED processes and its Ctrl-C, which saves nothing and exits with 0."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in UNUSED]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Does nothing: workflows.stopping handles Ctrl-C, tells the workers to save, and waits for them."""


class TrainingError(RuntimeError):
    """The workers failed more often than the spec allows without a checkpoint between."""


def fit(spec: TrainSpec, job: Job, told: Stopping) -> Outcome:
    """Run the workers to their common outcome; all are started again when some are lost.

    Whether they have GPUs is decided once: those of a node that was lost are waited for.

    Raises:
        TrainingError: Lost more often than spec.restarts with no checkpoint made between.
    """
    spec = spec.but(use_gpu=spec.on_gpu(ray.cluster_resources().get("GPU", 0)))
    lost, saved = 0, newest_seal(job.home)
    while True:
        try:
            return attempt(spec, job)
        except ray.train.TrainingFailedError as error:
            if (outcome := decided_by(error)) is not None:
                return outcome
            cause = type(getattr(error, "controller_failure", error)).__name__
            if isinstance(error, ray.train.ControllerError) and cause not in (TOO_LATE, NOT_STARTED):
                raise TrainingError(f"{spec.name}: {last_line(error)}") from error
            waiting = cause == TOO_LATE
            if told.asked:
                ended = (
                    "stopped while it waited for workers" if waiting else "workers were lost as it stopped"
                )
                return Outcome("preempted", ended)
            if waiting:
                log.warning("%s: its workers have not started yet; they are waited for", spec.name)
                continue
            before = saved
            with suppress(StorageError):  # while the store is away, none counts as new
                saved = newest_seal(job.home)
            lost = lost + 1 if saved == before else 1
            if lost > spec.restarts:
                raise TrainingError(f"{spec.name}: {last_line(error)}") from error
            again = f"starting them again, {lost} of {spec.restarts}"
            log.warning("%s: workers were lost; %s: %s", spec.name, again, last_line(error))
            log.debug("%s", error)


def decided_by(error: Exception) -> Outcome | None:
    """The outcome that one worker decided for the whole run, if one did."""
    failures = getattr(error, "worker_failures", {}).values()
    return next((failure.outcome for failure in failures if isinstance(failure, DecidedError)), None)


def newest_seal(home: Home) -> str:
    """The manifest of the newest finished checkpoint, which identifies it; empty if there is none."""
    name = next(finished_checkpoints(home), None)
    return home.text(f"checkpoints/{name}/{sealed.MANIFEST}") if name else ""


def attempt(spec: TrainSpec, job: Job) -> Outcome:
    """Start the workers once."""
    for name, value in RAY_TRAIN.items():  # read by fit() here and sent along; the same for all stages
        os.environ.setdefault(name, value)
    if WATCHER not in FROM_OUTSIDE and (job.drainable or WATCHER not in os.environ):
        os.environ[WATCHER] = str(int(job.drainable))  # never off again: stages beside this one may need it
    shutil.rmtree(job.home.here / "ray", ignore_errors=True)  # left by a driver that was killed
    resources = scaling(spec, job.at_once)
    trainer = Trainer(
        partial(work, job),  # not train_loop_config: that is unpickled, with torch, in Ray's controller too
        torch_config=ProcessGroup(),
        scaling_config=resources,
        run_config=ray.train.RunConfig(
            name=f"{spec.name}-{uuid.uuid4().hex[:8]}",  # so that Ray never resumes from its own snapshot
            storage_path=str(job.home.here / "ray"),  # on the machine of the controller; nothing of ours
            # Ray counts failures over the whole run, and does not hear a stop while it waits for workers
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": KEEPS_MEMORY | ({} if resources.use_gpu else WITHOUT_GPU)},
        ),
    )
    try:
        return Outcome(*trainer.fit().return_value)
    finally:
        shutil.rmtree(job.home.here / "ray", ignore_errors=True)


def scaling(spec: TrainSpec, at_once: int) -> ray.train.ScalingConfig:
    """Workers with a GPU each if there are enough; a little of the CPUs is left to the read tasks.

    With `use_gpu: true`, GPUs that are not there yet are waited for: an autoscaler may add them.
    """
    total, asked = ray.cluster_resources(), spec.resources
    resources = {"CPU": asked.cpus or cpu_share(total.get("CPU", 1), spec.num_workers, at_once)}
    if asked.memory_gib:
        resources["memory"] = asked.memory_gib * 2**30
    return ray.train.ScalingConfig(
        num_workers=spec.num_workers,
        use_gpu=spec.on_gpu(total.get("GPU", 0)),
        resources_per_worker=resources,
        placement_strategy="SPREAD" if asked.spread else "PACK",
        label_selector=asked.labels or None,
    )


def last_line(error: BaseException) -> str:
    """The last line of a nested failure of Ray, which says what caused it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{one_line(lines[-1] if lines else repr(error))} (-v shows all)"
