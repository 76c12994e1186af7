"""The whole chain: raw pairs -> prepared data -> every stage after its parents -> the cascade.

Each step is skipped if its result is there, whole, and made of the same spec, data and parents; a
step that was cut is continued.  So the same call after any interruption goes on where it was.

    <run>/data/raw/*.tar  data/prepared/  <stage>/bundle/  cascade/  seconds.json  metrics.jsonl
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import model_validator

from dd_core import bundle, sealed
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.spec import SafeName, Spec
from dd_core.stages.chain_hop import refuse
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec, published
from workflows import training
from workflows.evaluation import EvaluationSpec
from workflows.pairs import PairsSpec
from workflows.prepare import Prepared, prepare_pairs
from workflows.shape_shards import ShapesSpec, write_shards
from workflows.tracking import Tracked, curves
from workflows.train_spec import TrainSpec

log = logging.getLogger(__name__)
PROGRESS_S = 15.0


class RunSpec(Spec):
    """Everything from raw pairs to a judged cascade."""

    kind: Literal["run"] = "run"
    name: SafeName
    shapes: ShapesSpec | None = None
    """The embedded world to write first; then pairs.shards and pairs.destination follow the run."""
    pairs: PairsSpec
    stages: tuple[TrainSpec, ...]
    """In any order; each is trained after its parents."""
    cascade: CascadeSpec
    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _fits(self) -> "RunSpec":
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two stages are named {min(twice)!r}")
        for stage in self.stages:
            if stage.stage.image_size not in self.pairs.sizes:
                raise ValueError(
                    f"stage {stage.name!r} trains on images of {stage.stage.image_size} px, "
                    f"but pairs.sizes is {self.pairs.sizes}; add it there"
                )
        for hop in self.cascade.hops:
            for name in (hop.stage, *hop.guides.values()):
                if name not in names:
                    raise ValueError(f"cascade: no stage is named {name!r}; there are {', '.join(names)}")
            self.check_hop(hop)
        if self.cascade.context_length != self.pairs.context_length:
            raise ValueError(
                f"cascade.context_length is {self.cascade.context_length}, "
                f"pairs.context_length {self.pairs.context_length}; make them equal"
            )
        in_order(self.stages)
        return self

    def check_hop(self, hop: HopSpec) -> None:
        """What a hop asks, its stage and its guides can do; said before anything is trained.

        Raises:
            ValueError: They cannot.
        """
        kinds = {"classifier": "noised_classifier"}
        for role, name in hop.guides.items():
            kind, wanted = self.stage(name).stage.kind, kinds.get(role, role)
            if kind != wanted:
                raise ValueError(f"hop {hop.stage}: guide {role!r} is a {kind}, a {wanted} is needed")
        spec = self.stage(hop.stage).stage
        if not isinstance(spec, ChainSpec):
            return
        try:
            refuse(spec, hop.how, hop.guides)
        except ValueError as error:
            raise ValueError(f"hop {hop.stage}: {error}") from None
        if spec.context_length not in (0, self.pairs.context_length):
            raise ValueError(
                f"stage {hop.stage!r} reads {spec.context_length} tokens, pairs.context_length is "
                f"{self.pairs.context_length}; make them equal"
            )

    def stage(self, name: str) -> TrainSpec:
        """The stage of this name.

        Raises:
            ValueError: There is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(
            f"{self.name} has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}"
        )


def in_order(stages: tuple[TrainSpec, ...]) -> list[TrainSpec]:
    """Every stage after those it stands on; otherwise as they are listed.

    Raises:
        ValueError: Stages stand on each other in a circle.
    """
    waiting, done = list(stages), list[TrainSpec]()
    while waiting:
        left = {stage.name for stage in waiting}
        ready = next((stage for stage in waiting if not left & set(stage.parents.values())), None)
        if ready is None:
            raise ValueError(f"stages stand on each other in a circle: {', '.join(sorted(left))}")
        done.append(ready)
        waiting.remove(ready)
    return done


class RunResult(NamedTuple):
    """What a run has made."""

    bundles: dict[str, Path]
    """Stage -> bundle."""
    cascade: Path
    digest: str
    """Of the cascade."""
    seconds: dict[str, float]
    """Step -> seconds over all starts; `total` is their sum."""


def run_pipeline(spec: RunSpec, *, run: Path, tracked: Tracked) -> RunResult:
    """Make everything of a run that is not there yet.

    Args:
        spec: What to make.
        run: Its directory.
        tracked: Journals of the run, from workflows.tracking.

    Raises:
        ValueError: A parent is missing, or a spec does not fit the data or the cluster.
        training.PreemptedError: Told to stop; everything is saved.
        The errors of prepare_pairs and train_stage.
    """
    run = run.absolute()
    run.mkdir(parents=True, exist_ok=True)
    check_parents(spec, run)
    tracked.journal.params(spec.model_dump(mode="json", exclude={"stages"}))
    with timed(run, "data"):
        prepared = prepared_data(spec, run)
    tracked.journal.artifact(prepared.directory / sealed.MANIFEST)
    tracked.journal.dataset(spec.name, str(prepared.directory), prepared.digest)
    bundles = {stage.name: made(stage, run, prepared, tracked) for stage in in_order(spec.stages)}
    with timed(run, "cascade"):
        digest = cascade_of(spec, run, bundles)
    tags = {"bundle_sha256": digest, "bundle": str(run / "cascade")}
    tracked.journal.tags(tags)
    tracked.journal.model(spec.cascade.name, run / "cascade", alias="current", tags=tags)
    return RunResult(bundles, run / "cascade", digest, seconds_of(run))


def run_stage(spec: RunSpec, name: str, *, run: Path, tracked: Tracked) -> Path:
    """One stage of a run alone, on the run's data and the parents that are there; returns its bundle.

    Raises:
        ValueError: There is no such stage, or a parent has not been trained.
    """
    stage, run = spec.stage(name), run.absolute()
    run.mkdir(parents=True, exist_ok=True)
    for role in stage.parents:
        training.parent_path(stage, role, run)
    with timed(run, "data"):
        prepared = prepared_data(spec, run)
    return made(stage, run, prepared, tracked)


def check_parents(spec: RunSpec, run: Path) -> None:
    """Before any work: every parent is a stage of the run or a bundle that is there."""
    names = {stage.name for stage in spec.stages}
    for stage in spec.stages:
        for role, named in stage.parents.items():
            if named not in names:
                training.parent_path(stage, role, run)


def prepared_data(spec: RunSpec, run: Path) -> Prepared:
    """Raw shards of the embedded world, if it is asked for, then the prepared pairs."""
    pairs = spec.pairs
    if spec.shapes is not None:
        raw = write_shards(spec.shapes, run / "data" / "raw")
        pairs = pairs.but(shards=tuple(map(str, raw)), destination=str(run / "data" / "prepared"))
    return prepare_pairs(pairs)


def made(stage: TrainSpec, run: Path, prepared: Prepared, tracked: Tracked) -> Path:
    """The bundle of one stage: there already, loaded from elsewhere, or trained."""
    found = training.inputs(stage, run=run, data=prepared.directory)
    if (done := training.finished(stage, found, run=run)) is not None:
        log.info("%s: done before", stage.name)
        return done
    training.discard_other_runs(run / stage.name, found.fingerprint)
    journal = tracked.stage(stage.name)
    journal.params(stage.model_dump(mode="json"))
    journal.dataset("prepared", str(prepared.directory), prepared.digest)
    journal.status("RUNNING")
    try:
        with timed(run, stage.name), watched(stage, run):
            path = loaded_or_trained(stage, found, run, prepared.directory)
    except BaseException as error:
        journal.status("KILLED" if isinstance(error, training.PreemptedError) else "FAILED")
        raise
    seal = sealed.verify(path)
    journal.tags({"bundle": str(path), "bundle_sha256": seal.digest})
    journal.status("FINISHED")
    log.info("%s: done in %s", stage.name, clock(seconds_of(run)[stage.name]))
    return path


def loaded_or_trained(stage: TrainSpec, found: training.Inputs, run: Path, data: Path) -> Path:
    """A CLIP that somebody has published is saved as it is; every other stage is trained."""
    if not (isinstance(stage.stage, ClipSpec) and stage.stage.pretrained):
        return training.train_stage(stage, run=run, data=data)
    path = run / stage.name / "bundle"
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = published(stage.stage)
    facts = {"fingerprint": found.fingerprint, "step": 0, "images": 0, "seconds": 0.0, "data": found.data}
    bundle.save(path, taken.spec, taken.weights, parents={}, facts=facts)
    return path


def cascade_of(spec: RunSpec, run: Path, bundles: Mapping[str, Path]) -> str:
    """The cascade of these bundles; left as it is if it is made of just these."""
    stages = dict(bundles)
    for stage in spec.stages:
        for role in stage.parents:
            path = training.parent_path(stage, role, run)
            if path not in stages.values():
                stages[f"{stage.name}.{role}"] = path
    digests = {name: sealed.verify(path).digest for name, path in stages.items()}
    directory = run / "cascade"
    try:
        seal = sealed.verify(directory)
        same_spec = json.loads((directory / "cascade.json").read_text()) == spec.cascade.model_dump(
            mode="json"
        )
        if seal.facts["stages"] == digests and same_spec:
            return seal.digest
    except sealed.SealError as error:
        if directory.exists():
            log.warning("the cascade will be made again: %s", error)
    return bundle.save_cascade(directory, spec.cascade, stages, card=card(spec, stages))


def card(spec: RunSpec, stages: Mapping[str, Path]) -> str:
    """The model card, for people: what it is made of."""
    rows = []
    for name, path in stages.items():
        facts, digest = sealed.verify(path)
        rows.append(
            f"| {name} | {facts['step']:,} | {facts['images']:,} | {facts['seconds']:.0f} | `{digest[:12]}` |"
        )
    hops = " -> ".join(hop.stage for hop in spec.cascade.hops)
    return "\n".join(
        [
            "---",
            "tags: [text-to-image, diffusion, ddiff]",
            "---",
            f"# {spec.cascade.name}",
            "",
            f"A text-to-image cascade trained by ddiff, {spec.cascade.image_size} px: {hops}.",
            f"Trained on {'the embedded world of shapes' if spec.shapes else ', '.join(spec.pairs.shards)}.",
            "",
            "| stage | steps | images seen | seconds | bundle |",
            "|---|---|---|---|---|",
            *rows,
            "",
            'Paint: `ddiff sample "a red circle" --cascade .` Serve: `ddiff serve --cascade .`',
            "",
        ]
    )


@contextmanager
def timed(run: Path, name: str) -> Iterator[None]:
    """Add the seconds inside to <run>/seconds.json; a start that is killed loses at most two."""
    before, began, over = seconds_of(run).get(name, 0.0), time.monotonic(), threading.Event()

    def save() -> None:
        seconds = seconds_of(run) | {name: round(before + time.monotonic() - began, 3)}
        del seconds["total"]
        draft = run / "seconds.json.new"
        draft.write_text(json.dumps(seconds))
        draft.replace(run / "seconds.json")

    def keep_saving() -> None:
        while not over.wait(2.0):
            save()

    thread = threading.Thread(target=keep_saving, name="seconds", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        save()


def seconds_of(run: Path) -> dict[str, float]:
    """Step -> seconds over all starts so far, and their total."""
    path = run / "seconds.json"
    seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return seconds | {"total": sum(seconds.values())}


@contextmanager
def watched(stage: TrainSpec, run: Path) -> Iterator[None]:
    """While inside, say now and then how far the training is."""
    over = threading.Event()
    log.info("%s: %s steps of %d images", stage.name, f"{stage.budget.steps:,}", stage.batch_size)

    def say() -> None:
        said = -1
        while not over.wait(PROGRESS_S):
            now = curves(run / stage.name / "metrics.jsonl")
            step = max(now.get("train/loss", {}), default=-1)
            if step > said >= 0 or (said < 0 <= step < stage.budget.steps):
                log.info("%s", progress(stage, now, step))
            said = step

    thread = threading.Thread(target=say, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def progress(stage: TrainSpec, now: Mapping[str, Mapping[int, float]], step: int) -> str:
    """base: step 400 of 2,000, loss 0.123, 310 images/s, 2:10 left."""
    rate, left = now["time/samples_per_second"][step], now["time/remaining_estimate"][step]
    return (
        f"{stage.name}: step {step:,} of {stage.budget.steps:,}, loss {now['train/loss'][step]:.4g}, "
        f"{rate:.0f} images/s, {clock(left)} left"
    )


def clock(seconds: float) -> str:
    """75 -> 1:15."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
