"""What every worker of a training run does: build the stage, resume, step, save, and say how it ended.

What would fail again in the same way (a refused spec, damaged data, a gradient that stays not
finite) is returned as an Outcome and ends the run; only what may be another's fault (a lost
worker, a broken connection) is raised, so that Ray starts the workers anew.
"""

import logging
import os
import resource
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import ray.exceptions
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.data.block import BlockMetadata

from dd_core import bundle, checkpoint, sealed
from dd_core.stage import PairBatch, Trained
from dd_core.stages import build_stage
from dd_core.training import DivergedError, StepReport, TrainState, train
from workflows import feed, samples
from workflows.journal import JOURNAL, Journal
from workflows.train_spec import TrainSpec

log = logging.getLogger(__name__)
TASKS_PER_LEG = 500
"""Read tasks of one execution of Ray Data; it is told all of them before the first is run."""
READ_AHEAD_BYTES = 512 * 2**20
STOP_STEPS = 10
"""Workers ask each other whether to stop at multiples of so many steps."""


class Job(NamedTuple):
    """What the driver tells the workers."""

    spec: TrainSpec
    directory: Path
    """Of the stage in the run; shared by all workers."""
    pieces: feed.Pieces
    parents: dict[str, Path]
    """Role -> bundle, verified."""
    facts: dict[str, Any]
    """fingerprint, data and parents, for checkpoints and the bundle."""
    drainable: bool
    """Whether there are several nodes, of which Ray may announce that one will go."""

    @property
    def stop_file(self) -> Path:
        """While it is there, the workers are to save and stop."""
        return self.directory / "stop"


class Outcome(NamedTuple):
    """How a run ended."""

    status: Literal["done", "preempted", "diverged", "data", "refused"]
    message: str = ""


class Position(NamedTuple):
    """Which of the workers this is."""

    rank: int
    ranks: int


def work(job: Job) -> tuple[str, str]:
    """Train to the end of the budget, or to a reason to stop; the same on every worker."""
    try:
        return trained_to_the_end(job)
    except DivergedError as error:
        return Outcome("diverged", str(error))
    except feed.DataError as error:
        return Outcome("data", str(error))
    except ray.exceptions.RayTaskError as error:  # a read task raised, and would again
        return Outcome("data", str(error.cause or error).strip().splitlines()[-1])
    except (ValueError, sealed.SealError) as error:
        log.debug("refused", exc_info=True)
        return Outcome("refused", str(error))


def trained_to_the_end(job: Job) -> Outcome:
    """The loop: log, draw, save; stop when told to."""
    spec, began = job.spec, time.monotonic()
    context = ray.train.get_context()
    who = Position(context.get_world_rank(), context.get_world_size())
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    parents = {role: bundle.load(path).trained for role, path in job.parents.items()}
    state, seconds = started(job, who, parents)
    supply = batches(job, who, state.step, device)
    steps = train(state, supply, optimizer=spec.optimizer, budget=spec.budget, accumulate=accumulation(spec))
    recorder = Recorder(job, who, state, parents, seconds_before=seconds - (time.monotonic() - began))
    for report in steps:
        recorder.note(report)
        stop = told_to_stop(job, report.step, who)
        last = report.step == spec.budget.steps
        if stop or last or report.step % spec.budget.checkpoint_every == 0:
            recorder.save()
        if stop and not last:
            return Outcome("preempted", f"stopped at step {report.step:,} of {spec.budget.steps:,}")
    if who.rank == 0:
        recorder.ship()
    if who.ranks > 1:
        dist.barrier()
    return Outcome("done")


def started(job: Job, who: Position, parents: dict[str, Trained]) -> tuple[TrainState, float]:
    """The state at the newest good checkpoint, or at step 0, and the seconds it has cost so far."""
    spec = job.spec
    torch.manual_seed(spec.seed)
    stage = build_stage(spec.stage, parents)
    unused = {"find_unused_parameters": True} if len(stage.phases) > 1 else {}
    wrapped = ray.train.torch.prepare_model(stage, parallel_strategy_kwargs=unused)
    state = TrainState(wrapped, spec.optimizer, seed=spec.seed, rank=who.rank)
    newest = checkpoint.newest(job.directory) if who.rank == 0 else None
    if who.ranks > 1:
        newest = ray.train.collective.broadcast_from_rank_zero(newest)
    if newest is None:
        return state, 0.0
    tensors = state.tensors()
    facts = checkpoint.read(newest, tensors)
    state.restored(tensors, step=facts["step"], images=facts["images"])
    if who.rank == 0:
        log.info("%s: continues at step %d", spec.name, state.step)
    return state, facts["seconds"]


def accumulation(spec: TrainSpec) -> int:
    """Forwards of one optimizer step."""
    own = spec.batch_size // spec.num_workers
    return own // (spec.micro_batch_size or own)


def told_to_stop(job: Job, step: int, who: Position) -> bool:
    """Whether all workers are to save and stop now: SIGTERM at the driver, or a node that is drained."""
    if step % STOP_STEPS:
        return who.ranks == 1 and job.stop_file.exists()
    drained = job.drainable and ray.train.get_preemption_info() is not None  # the same on all workers
    if who.ranks == 1:
        return drained or job.stop_file.exists()
    flag = torch.tensor(float(job.stop_file.exists()), device=ray.train.torch.get_device())
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return drained or bool(flag)


class Recorder:
    """What is written down between the steps: metrics, pictures, checkpoints, at the end the bundle."""

    def __init__(
        self,
        job: Job,
        who: Position,
        state: TrainState,
        parents: dict[str, Trained],
        *,
        seconds_before: float,
    ) -> None:
        self.job, self.spec, self.who, self.state, self.parents = job, job.spec, who, state, parents
        self.seconds_before, self.began = seconds_before, time.monotonic()
        self.journal = Journal(job.directory / JOURNAL)
        self.sums: dict[str, torch.Tensor] = {}
        self.since, self.since_step = time.monotonic(), state.step

    def note(self, report: StepReport) -> None:
        """Add up the metrics of a step; write their mean at every report, draw at every sample."""
        if self.who.rank:
            return
        for name, value in report.metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if report.step % self.spec.budget.report_every == 0 or report.step == self.spec.budget.steps:
            self.report(report)
        every = self.spec.budget.sample_every
        if every and report.step % every == 0 and self.spec.samples.prompts:
            path = self.job.directory / "samples" / f"step-{report.step:08d}.png"
            now = Trained(self.spec.stage, self.state.average)
            if samples.draw(path, now, self.parents, self.spec.samples):
                self.journal.picture("samples", path, report.step)

    def report(self, report: StepReport) -> None:
        """One line per metric in the journal."""
        count = report.step - self.since_step
        pace = (time.monotonic() - self.since) / count
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {f"train/{name}": float(total) / count for name, total in self.sums.items()} | {
            "train/lr": report.learning_rate,
            "time/samples_per_second": self.spec.batch_size / pace,
            "time/remaining_estimate": pace * (self.spec.budget.steps - report.step),
            "memory/peak_bytes": float(rss),
        }
        if torch.cuda.is_available():
            metrics["memory/peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
        self.journal.log(metrics, report.step)
        self.sums, self.since, self.since_step = {}, time.monotonic(), report.step

    def facts(self) -> dict[str, Any]:
        """What a checkpoint and the bundle say about themselves."""
        seconds = self.seconds_before + time.monotonic() - self.began
        images = self.state.step * self.spec.batch_size
        return {"step": self.state.step, "images": images, "seconds": seconds, **self.job.facts}

    def save(self) -> None:
        """A checkpoint, by all ranks together; then the oldest go."""
        directory = self.job.directory / "checkpoints" / f"step-{self.state.step:08d}"
        facts = self.facts() | {
            "images": self.state.images,
            "spec": self.spec.model_dump(mode="json"),
            "ledger": {"position": self.state.step * self.spec.batch_size},
        }
        checkpoint.write(directory, self.state.tensors(), facts)
        if self.who.rank == 0:
            checkpoint.prune(self.job.directory, kept=self.spec.checkpoints_kept, every=self.spec.keep_every)

    def ship(self) -> None:
        """The averaged weights as a bundle."""
        facts = self.facts() | {"spec": self.spec.model_dump(mode="json")}
        parents = facts.pop("parents")
        weights = {name: value.cpu() for name, value in self.state.average.items()}
        bundle.save(self.job.directory / "bundle", self.spec.stage, weights, parents=parents, facts=facts)


class Reads(ray.data.Datasource):
    """The read tasks of one rank for a stretch of the run, in order."""

    def __init__(self, tasks: list[list[feed.Pick]], image_size: int) -> None:
        super().__init__()
        self.tasks, self.image_size = tasks, image_size

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of decoded images."""
        return sum(len(pick.rows) for task in self.tasks for pick in task) * 3 * self.image_size**2

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
    ) -> list[Any]:
        """One for each table."""
        return [
            ray.data.ReadTask(
                partial(feed.read, task, self.image_size),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None),
            )
            for task in self.tasks
        ]


def batches(job: Job, who: Position, first_step: int, device: torch.device) -> Iterator[PairBatch]:
    """This worker's share of the run from a step on, a micro batch at a time."""
    spec, size = job.spec, job.spec.stage.image_size
    order = feed.Order(job.pieces, spec.seed)
    own = spec.batch_size // who.ranks
    leg_steps = TASKS_PER_LEG * feed.steps_per_task(own, size)
    for first in range(first_step, spec.budget.steps, leg_steps):
        steps = min(leg_steps, spec.budget.steps - first)
        share = feed.Share(first, steps, spec.batch_size, who.rank, who.ranks)
        expected, taken = share.positions(), 0
        for table in tables(feed.tasks(order, share, size), size, spec.micro_batch_size or own):
            check_positions(table, expected[taken : taken + len(table)])
            taken += len(table)
            yield paired(table, size, device)


def tables(tasks: list[list[feed.Pick]], image_size: int, rows: int) -> Iterator[pa.Table]:
    """The rows of all tasks in order, read ahead by Ray Data, so many at a time."""
    reads = Reads(tasks, image_size)
    dataset = ray.data.read_datasource(
        reads, num_cpus=0.25, concurrency=2, override_num_blocks=len(tasks)
    )  # or Ray cuts what few tasks deliver into 200 blocks
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=READ_AHEAD_BYTES)
    dataset.context.target_max_block_size = None  # a task is a block: never cut, never joined
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)


def check_positions(table: pa.Table, expected: NDArray[np.int64]) -> None:
    """Refuse rows that are not those whose turn it is: then a restart would not be exact."""
    found = table["position"].to_numpy()
    if not np.array_equal(found, expected):
        raise RuntimeError(f"Ray Data handed out row {found[0]} where row {expected[0]} was due")


def paired(table: pa.Table, image_size: int, device: torch.device) -> PairBatch:
    """A table as tensors on the device."""
    image = table["image"].combine_chunks()
    width = 3 * image_size**2
    pixels = np.frombuffer(image.buffers()[1], np.uint8)[image.offset * width :][: len(image) * width]
    tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return PairBatch(
        image=torch.from_numpy(pixels.reshape(-1, 3, image_size, image_size).copy()).to(device),
        tokens=torch.from_numpy(tokens.astype(np.int64)).to(device),
    )
