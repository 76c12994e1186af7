"""What every worker of a training run does: build the stage, resume, step, save, and say how it ended.

What would fail again in the same way (a refused spec, damaged data, a full disk, a gradient that stays
not finite) is an outcome and ends the run; only what may be another's fault (a lost worker, a broken
connection) is an error, so that the workers are started anew.
"""

import logging
import resource
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dd_core import bundle, checkpoint, sealed
from dd_core.precision import round_products
from dd_core.stage import PairBatch, Trained
from dd_core.stages import build_stage
from dd_core.training import StepReport, TrainState, train, wrapping
from workflows import cpus, feed, mailbox, samples
from workflows.agreement import Agreement
from workflows.checkpoints import newest, prune
from workflows.files import INSISTED, insistently
from workflows.journal import JOURNAL, Journal, curves
from workflows.outcome import TOGETHER, DecidedError, Outcome, decided, told_by_ray
from workflows.periodic import Periodically, Sending
from workflows.reading import Reader, batches, paired
from workflows.row_groups import first_line
from workflows.stopping import StopSign
from workflows.storage import AddressError, Home, StorageError
from workflows.train_spec import TrainSpec

T = TypeVar("T")
log = logging.getLogger(__name__)
FEWER = "lower samples.pictures, name fewer samples.prompts, or set budget.sample_every=0"
"""What to do about a grid that is too large for the GPU beside the training."""


class Job(NamedTuple):
    """What the driver tells the workers."""

    spec: TrainSpec
    home: Home
    """Of the stage in the run: one directory for all workers, or each has its copy."""
    pieces: feed.Pieces
    wanted: feed.Wanted
    parents: dict[str, Home]
    """Role -> bundle, verified."""
    facts: dict[str, Any]
    """What it is made of but for the spec (workflows.made_of), for checkpoints and the bundle."""
    drainable: bool
    """Whether Ray may announce that a node will go (`training.may_lose_nodes`)."""
    at_once: int = 1
    """How many stages may train side by side, of which this is one."""


class Position(NamedTuple):
    """Which of the workers this is."""

    rank: int
    ranks: int
    local: int = 0
    """Rank among the workers of its node."""


def work(job: Job) -> tuple[str, str]:
    """Train to the end of the budget, or to a reason to stop; the same on every worker.

    Returns:
        An Outcome's status and message, as a tuple: Ray's controller unpickles it, and would import this
        module, with all of dd_core, to read an Outcome.

    Raises:
        DecidedError: An outcome that the other workers may not have reached; Ray ends them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("workflows").setLevel(logging.INFO)  # where Ray shows the logs of workers
    outcome = ended(job)
    if outcome.status not in TOGETHER and job.spec.num_workers > 1:
        raise DecidedError(*outcome)
    return outcome.status, outcome.message


def ended(job: Job) -> Outcome:
    """How the loop ended, or what made it impossible."""
    try:
        return trained_to_the_end(job)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        said = told_by_ray(error)
        outcome = decided(said, job.spec, disk=job.home.here)
        if outcome is not None:
            log.info("%s", outcome.status, exc_info=error)  # the traceback, for those who follow the job
            return outcome
        if said is not error:
            raise said from None
        raise


def trained_to_the_end(job: Job) -> Outcome:
    """The loop: log, draw, save; stop when told to."""
    spec, began = job.spec, time.monotonic()
    context = ray.train.get_context()
    who = Position(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    device = ray.train.torch.get_device()
    if who.ranks == 1 and dist.is_initialized():
        dist.destroy_process_group()  # gloo's threads have OpenMP pools of their own, and with more threads
        # than CPUs libgomp sleeps where it would spin: steps took half as long again (torch 2.15)
    round_products(device, spec.optimizer.precision)
    if device.type == "cpu":
        torch.set_num_threads(threads(context.get_local_world_size(), job.at_once))
    parents = {role: bundle.load(path).trained for role, path in brought(job.parents, who).items()}
    if who.rank == 0:
        job.home.rejoin(JOURNAL)
    state, seconds = started(job, who, parents)
    reader = Reader(spec, feed.Order(job.pieces, spec.seed, job.wanted), job.wanted, who.rank, shared(who))
    supply = batches(reader, first_step=state.step, device=device)
    steps = train(state, supply, optimizer=spec.optimizer, budget=spec.budget, accumulate=spec.forwards)
    recorder = Recorder(job, who, state, parents, seconds_before=seconds + time.monotonic() - began)
    sending = Periodically(Sending(job.home, *((JOURNAL,) if who.rank == 0 else ())))
    with StopSign(job.home, first=who.rank == 0) as sign, sending:
        agreement = Agreement(sign, ranks=who.ranks, drainable=job.drainable)
        return stepped(job, who, steps, recorder, agreement)


def shared(who: Position) -> Any:
    """Where the first worker leaves what it reads for the others; None if there are none."""
    if who.ranks == 1:
        return None
    name = f"legs-{uuid.uuid4().hex}"
    box = mailbox.opened(name, others=who.ranks - 1) if who.rank == 0 else None
    name = ray.train.collective.broadcast_from_rank_zero(name)
    return box or ray.get_actor(name)


def threads(local_workers: int, at_once: int) -> int:
    """Threads of this worker: its fixed share of the CPUs it may run on, even if nobody uses the rest."""
    return max(1, cpus.available() // (local_workers * at_once))


def stepped(
    job: Job, who: Position, steps: Iterator[StepReport], recorder: "Recorder", agreement: Agreement
) -> Outcome:
    """Take every step of the budget, or stop earlier if told to."""
    spec, warned = job.spec, False
    saved_at = (spec.budget.checkpoint_every, spec.keep_every)
    for report in steps:
        recorder.note(report)
        stop, node_will_go = agreement.after(report.step)
        last = report.step == spec.budget.steps
        due = any(every and report.step % every == 0 for every in saved_at)
        if stop or last or due or (node_will_go and not warned):
            recorder.save()
        warned |= node_will_go
        if (every := spec.budget.sample_every) and report.step % every == 0 and who.rank == 0:
            recorder.draw(report.step)  # after the checkpoint, which is worth more
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
    wrapped = ray.train.torch.prepare_model(stage, parallel_strategy_kwargs=dict(wrapping(stage)))
    state = TrainState(wrapped, spec.optimizer, seed=spec.seed, rank=who.rank, ranks=who.ranks)
    name = insisted(partial(newest, job.home), job.home, "read") if who.rank == 0 else ""
    if who.ranks > 1:
        name = ray.train.collective.broadcast_from_rank_zero(name)
    if not name:
        return state, 0.0
    tensors = state.tensors()
    (found,) = brought({name: job.home.at(name)}, who, by_rank_0=True).values()
    facts = checkpoint.read(found, tensors)
    step = facts["step"]
    images = step * spec.batch_size  # older checkpoints counted those of one rank
    state.restored(tensors, step=step, images=images, skipped=facts.get("skipped", 0))
    if who.rank == 0:
        log.info("%s: continues at step %d", spec.name, state.step)
    return state, facts["seconds"]


def brought(homes: Mapping[str, Home], who: Position, *, by_rank_0: bool = False) -> dict[str, Path]:
    """Sealed directories on this node: one worker fetches and verifies those of a store, the others wait.

    What all machines see stays as it is, unverified.

    Args:
        homes: Name -> directory.
        who: This worker; all of them call this.
        by_rank_0: Whether it has done so already.

    Raises:
        sealed.SealError: No copy is whole.
        StorageError: The store is away.
    """
    if who.local == 0 and not (by_rank_0 and who.rank == 0):
        for home in homes.values():
            insisted(home.fetched, home, "read")
    if who.ranks > 1:
        dist.barrier()
    return {name: home.here for name, home in homes.items()}


def insisted(ask: Callable[[], T], home: Home, what: str = "written to") -> T:
    """What a store answers, asked with patience: giving up would end the workers and lose their steps.

    Raises:
        StorageError: It is away for longer than ten minutes, or the address is wrong.
    """

    def final(error: Exception) -> bool:
        return isinstance(error, AddressError) or not isinstance(error, StorageError)

    return insistently(ask, f"{home.address} cannot be {what}", final=final, attempts=INSISTED)


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
        self.journal = Journal(job.home.here / JOURNAL)
        self.reported = max(curves(self.journal.path).get("train/lr", {}), default=0)
        """Last step in the journal; steps that are repeated after a rollback are not written again."""
        self.sums: dict[str, torch.Tensor] = {}
        self.good = 0
        """Number of steps in the sums; those whose gradient was not finite are left out."""
        self.since, self.since_step = time.monotonic(), state.step

    def note(self, report: StepReport) -> None:
        """Add up the metrics of a step; write their mean at every report."""
        self.good += report.good
        for name, value in report.metrics.items() if report.good else ():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if report.step % self.spec.budget.report_every == 0 or report.step == self.spec.budget.steps:
            self.report(report)

    def report(self, report: StepReport) -> None:
        """One line per metric in the journal, by the first worker; all take part."""
        count = report.step - self.since_step
        pace = (time.monotonic() - self.since) / count
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        metrics = {f"train/{name}": value for name, value in self.means().items()} | {
            "train/skipped": float(report.skipped),
            "train/lr": report.learning_rate,
            "time/samples_per_second": self.spec.batch_size / pace,
            "time/remaining_estimate": pace * (self.spec.budget.steps - report.step),
            "memory/peak_bytes": float(rss),
        }
        if torch.cuda.is_available():
            metrics["memory/peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
        if report.step > self.reported and self.who.rank == 0:
            self.journal.log(metrics, report.step)
        self.sums, self.good, self.since, self.since_step = {}, 0, time.monotonic(), report.step

    def means(self) -> dict[str, float]:
        """Of each metric, over the good steps since the last report and over all workers."""
        own = {name: float(total) / self.good for name, total in self.sums.items()}
        every = [own] * self.who.ranks
        if self.who.ranks > 1:
            dist.all_gather_object(every, own)
        names = dict.fromkeys(name for one in every for name in one)
        told = {name: [one[name] for one in every if name in one] for name in names}
        return {name: sum(values) / len(values) for name, values in told.items()}

    def draw(self, step: int) -> None:
        """Draw a grid of pictures, if the stage is of a kind that draws; a failure costs the grid alone.

        The other workers take no part: they wait for this one in the next step.
        """
        name = f"samples/step-{step:08d}.png"
        try:
            now = Trained(self.spec.stage, self.state.average)
            made = samples.drawn(now, self.parents, self.spec.samples, self.shown())
            if made is None:
                return
            samples.save_grid(made, self.job.home.here / name)
            self.job.home.send(name)
        except torch.OutOfMemoryError:
            log.warning("%s: no %s: out of memory; %s", self.spec.name, name, FEWER)
        except Exception as error:  # it would fail again at this step after every restart
            log.warning("%s: no %s: %s", self.spec.name, name, first_line(error))
            log.debug("%s", name, exc_info=True)
        else:
            self.journal.picture("samples", name, step)
            return
        torch.cuda.empty_cache()  # only here has the error released the pictures

    def shown(self) -> PairBatch:
        """The first pairs of the run, for which the grid is drawn."""
        wanted, count = self.job.wanted, self.spec.samples.pictures
        wanted = wanted._replace(image_size=self.spec.stage.image_size)  # a prior trains without images
        order = feed.Order(self.job.pieces, self.spec.seed, wanted)
        table = next(feed.read(order.picks(np.arange(min(count, order.rows))), wanted))
        return paired(table, wanted)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint and the bundle say about themselves."""
        seconds = self.seconds_before + time.monotonic() - self.began
        images = self.state.step * self.spec.batch_size
        return {"step": self.state.step, "images": images, "seconds": seconds, **self.job.facts}

    def save(self) -> None:
        """Write a checkpoint, all ranks together; then remove older ones that are not to be kept."""
        home, step = self.job.home, self.state.step
        place = home.at(f"checkpoints/step-{step:08d}")
        facts = self.facts() | {
            "spec": self.spec.model_dump(mode="json"),
            "skipped": self.state.skipped,
        }
        written = checkpoint.write(place.here, self.state.tensors(), facts)
        if home.stored:
            self.send(place, written)
        if self.who.rank == 0:
            kept, every = self.spec.checkpoints_kept, self.spec.keep_every
            insisted(partial(prune, home, step=step, kept=kept, every=every), home)

    def send(self, place: Home, written: list[str]) -> None:
        """Send a checkpoint: each rank its files, then the journal up to this step, then the manifest.

        None stays here.  Ranks of one machine share the directory, so it is removed only when the manifest
        is in the store.
        """
        if self.who.rank == 0:
            insisted(place.unseal, place)
        for name in written:
            if name != sealed.MANIFEST:
                insisted(partial(place.send, name), place)
        if self.who.ranks > 1:
            dist.barrier()
        if self.who.rank == 0:
            insisted(
                partial(self.job.home.send, JOURNAL, missing_ok=True), place
            )  # none before the first report
            insisted(partial(place.send, sealed.MANIFEST), place)
        if self.who.ranks > 1:
            dist.barrier()
        shutil.rmtree(self.job.home.here / "checkpoints", ignore_errors=True)

    def ship(self) -> None:
        """Save the averaged weights as a bundle, and send it."""
        facts = self.facts() | {"spec": self.spec.model_dump(mode="json")}
        parents = facts.pop("parents")
        weights = {name: value.cpu() for name, value in self.state.average.items()}
        home = self.job.home
        bundle.save(home.here / "bundle", self.spec.stage, weights, parents=parents, facts=facts)
        insisted(partial(home.send, JOURNAL, missing_ok=True), home)
        insisted(partial(home.send, "bundle"), home)
