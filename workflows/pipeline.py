"""The whole chain: raw pairs -> prepared data -> every stage after its parents -> the cascade.

Stages that do not stand on each other train side by side, as many as the spec says.  Each step is
skipped if its result is there, whole, and made of the same spec, data and parents; a step that was cut
is continued.  So the same call after any interruption goes on where it was.

    <run>/data/raw/*.tar  data/prepared/  <stage>/bundle/  cascade/  seconds.json  metrics.jsonl
    <run>/<clip>/embeddings/64/  of the images, for the stages that learn from them
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dd_core import bundle, sealed
from dd_core.stages.clip import ClipSpec, published
from workflows import training
from workflows.embeddings import embed
from workflows.journal import JOURNAL, Journal, curves, entries
from workflows.parents import parent_home, refuse_start_of_other_clip
from workflows.periodic import Periodically
from workflows.prepare import Prepared, prepare_pairs
from workflows.progress import StepBars, StepProgress, clock
from workflows.registry import CURRENT
from workflows.run_spec import RunSpec, in_order
from workflows.shape_shards import write_shards
from workflows.side_by_side import side_by_side
from workflows.stopping import Stopping, stopped_by_signals
from workflows.storage import Home, StorageError, parsed
from workflows.tracking import Tracked
from workflows.train_spec import TrainSpec

log = logging.getLogger(__name__)
PROGRESS_S = 15.0
SHOWN = ("train/loss", "time/samples_per_second", "time/remaining_estimate")
"""Metrics that are shown while a stage is trained."""
SECONDS = "seconds.json"
EMBEDDING = threading.Lock()
"""Held while embeddings are made: of two stages of one CLIP that begin at once, the second finds them."""
TOTAL = "total"
WRITING = threading.Lock()
"""Held while SECONDS is read and replaced, as stages that train side by side do."""


class RunResult(NamedTuple):
    """What a run has made."""

    bundles: dict[str, Path]
    """Stage -> bundle, or this machine's copy of it."""
    cascade: Home
    digest: str
    """Of the cascade."""
    seconds: dict[str, float]
    """Step -> seconds over all starts; `total` counts those of steps side by side once."""


class Making(NamedTuple):
    """What the stages of a run have in common while they are made."""

    run: Home
    prepared: Prepared
    tracked: Tracked
    at_once: int
    stopping: Stopping
    bars: StepBars


def run_pipeline(spec: RunSpec, *, run: Home | Path, tracked: Tracked) -> RunResult:
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
    run = opened(run)
    check_parents(spec, run)
    with timed(run, TOTAL):
        prepared = tracked_data(spec, run, tracked)
        bundles = all_made(spec, run, prepared, tracked)
        with timed(run, "cascade"):
            digest = cascade_of(spec, run, bundles)
    cascade = run.at("cascade")
    tags = {"bundle_sha256": digest, "bundle": cascade.address}
    tracked.journal.tags(tags)
    tracked.journal.model(spec.cascade.name, cascade.address, alias=CURRENT, tags=tags)
    return RunResult(bundles, cascade, digest, seconds_of(run))


def all_made(spec: RunSpec, run: Home, prepared: Prepared, tracked: Tracked) -> dict[str, Path]:
    """Stage -> bundle, each made after its parents, spec.at_once of them at a time.

    Raises:
        training.PreemptedError: Told to stop; what was in training is saved.
        The error of the first stage that failed; those beside it were told to stop, and are saved.
    """
    parents = {stage.name: tuple(stage.parents.values()) for stage in spec.stages}
    with stopped_by_signals() as stopping, StepBars() as bars:
        making = Making(run, prepared, tracked, spec.at_once, stopping, bars)
        bundles = side_by_side(
            parents, lambda name: made(spec.stage(name), making), at_once=spec.at_once, stop=stopping
        )
    if left := [name for name in parents if name not in bundles]:
        raise training.PreemptedError(f"stopped before {left[0]} began; run the same command to continue")
    return {stage.name: bundles[stage.name] for stage in in_order(spec.stages)}


def opened(run: Home | Path) -> Home:
    """The directory of a run; if it is in a store, with its SECONDS fetched to this machine."""
    home = Home.of(run)
    home.here.mkdir(parents=True, exist_ok=True)
    home.fetch(SECONDS)
    return home


def run_stage(spec: RunSpec, name: str, *, run: Home | Path, tracked: Tracked) -> Path:
    """One stage of a run alone, on the run's data and the parents that are there; returns its bundle.

    Raises:
        ValueError: There is no such stage, or a parent has not been trained.
    """
    stage, run = spec.stage(name), opened(run)
    for role in stage.parents:
        parent_home(stage, role, run)
    with timed(run, TOTAL):
        prepared = tracked_data(spec, run, tracked)
        with stopped_by_signals() as stopping, StepBars() as bars:
            return made(stage, Making(run, prepared, tracked, spec.at_once, stopping, bars))


def tracked_data(spec: RunSpec, run: Home, tracked: Tracked) -> Prepared:
    """The prepared data of a run, which is told, with its settings, to the journal of the run."""
    tracked.journal.params(spec.model_dump(mode="json", exclude={"stages"}))
    with timed(run, "data"):
        prepared = prepared_data(spec, run)
    tracked.journal.artifact(prepared.home.at(sealed.MANIFEST).address)
    tracked.journal.dataset(spec.name, prepared.home.address, prepared.digest)
    census = {f"data/{name}": prepared.facts[name] for name in ("kept", "rejected")}
    tracked.journal.log(census, step=0)
    return prepared


def check_parents(spec: RunSpec, run: Home | Path) -> None:
    """Check, before any work, that every parent is a stage of the run or a bundle that is there.

    The parents of such a bundle belong to the cascade too, so they must be stages or parents here as well.
    Those of a `start` do not, but what has measured the embeddings of one CLIP goes on with that one.

    Raises:
        ValueError: One is not.
    """
    home, elsewhere = Home.of(run), dict[tuple[str, str], dict[str, Any]]()
    known = {
        stage.name: home.at(f"{stage.name}/bundle").facts(sealed.MANIFEST).get("digest", "")
        for stage in spec.stages
    }
    names = set(known)
    for stage in spec.stages:
        for role, named in stage.parents.items():
            if named not in names:
                elsewhere[stage.name, role] = facts = parent_home(stage, role, run).facts(sealed.MANIFEST)
                known |= {named: facts.get("digest", "")} if role != "start" else {}
    for (name, role), facts in elsewhere.items():
        if role == "start":
            stage = spec.stage(name)
            refuse_start_of_other_clip(stage, facts, known.get(stage.parents.get("clip", ""), ""))
            continue
        for theirs, digest in facts.get("parents", {}).items():
            if theirs != "start" and digest not in known.values():
                raise ValueError(
                    f"{name}: its {role} {spec.stage(name).parents[role]!r} was trained on {theirs} "
                    f"{digest[:12]}, which no stage of {spec.name} stands on; name the bundle of that "
                    f"{theirs} where stages here have a {theirs}, or train the {role} in this run"
                )


def prepared_data(spec: RunSpec, run: Home) -> Prepared:
    """Raw shards of the embedded world, if it is asked for, then the prepared pairs."""
    pairs = spec.pairs
    if spec.shapes is not None:
        raw = write_shards(spec.shapes, run.at("data/raw"))
        pairs = pairs.but(shards=tuple(raw), destination=run.at("data/prepared").address)
    return prepare_pairs(pairs)


def made(stage: TrainSpec, making: Making) -> Path:
    """The bundle of one stage: there already, loaded from elsewhere, or trained."""
    run, prepared = making.run, making.prepared
    found, home = training.inputs(stage, run=run, data=prepared.home), run.at(stage.name)
    found = training.settled(stage, found, run=run)
    if (done := training.finished(stage, found, run=run)) is not None:
        log.info("%s: done before", stage.name)
        caught_up(home, making.tracked.stage(stage.name), done)
        return done
    if (told := training.embeddings_of(stage, found, run=run)) is not None:
        with EMBEDDING, timed(run, "embeddings"):
            embed(told, told_to_stop=lambda: making.stopping.asked)
        if making.stopping.asked:
            raise training.PreemptedError(f"{stage.name}: not begun; run the same command to continue")
    journal = making.tracked.stage(stage.name)
    journal.params(stage.model_dump(mode="json"))
    journal.dataset("prepared", prepared.home.address, prepared.digest)
    journal.status("RUNNING")
    home.send(JOURNAL)
    try:
        with timed(run, stage.name), watched(stage, making):
            path = loaded_or_trained(stage, found, making)
    except BaseException as error:
        try:
            journal.status("KILLED" if isinstance(error, training.PreemptedError) else "FAILED")
            home.send(JOURNAL)
        except (StorageError, OSError) as lost:
            log.warning("%s: how it ended is not written down: %s", stage.name, lost)
        raise
    told_finished(home, journal, path)
    log.info("%s: done in %s", stage.name, clock(seconds_of(run)[stage.name]))
    return path


def caught_up(home: Home, journal: Journal, path: Path) -> None:
    """Complete the journal of a finished stage, if the start that made it was killed before it could.

    Entries that it wrote and could not deliver are being sent since the journal was opened.
    """
    said = [entry.value for entry in entries(journal.path) if entry.kind == "status"]
    if said and said[-1] != "FINISHED":
        told_finished(home, journal, path)


def told_finished(home: Home, journal: Journal, path: Path) -> None:
    """Write the last entries of a stage's journal: its bundle, and that it is finished."""
    seal = sealed.verify(path)
    journal.tags({"bundle": home.at("bundle").address, "bundle_sha256": seal.digest})
    journal.status("FINISHED")
    home.send(JOURNAL)


def loaded_or_trained(stage: TrainSpec, found: training.Inputs, making: Making) -> Path:
    """A CLIP that somebody has published is saved as it is; every other stage is trained."""
    if not (isinstance(stage.stage, ClipSpec) and stage.stage.pretrained):
        return training.train(stage, found, run=making.run, at_once=making.at_once, stopping=making.stopping)
    home = making.run.at(stage.name)
    path = home.here / "bundle"
    path.parent.mkdir(parents=True, exist_ok=True)
    taken = published(stage.stage)
    facts = found.made_of.facts(found.fingerprint) | {"step": 0, "images": 0, "seconds": 0.0}
    bundle.save(path, taken.spec, taken.weights, parents={}, facts=facts)
    home.send("bundle")
    return path


def cascade_of(spec: RunSpec, run: Home, bundles: Mapping[str, Path]) -> str:
    """Save the cascade of these bundles, unless it is made of just these already; returns its digest.

    Parents from elsewhere belong to it too, except those with initial weights (role `start`): nothing is
    sampled with them.
    """
    stages = dict(bundles)
    for stage in spec.stages:
        for role in (role for role in stage.parents if role != "start"):
            path = parent_home(stage, role, run).fetched()
            if path not in stages.values():
                stages[f"{stage.name}.{role}"] = path
    digests = {name: sealed.verify(path).digest for name, path in stages.items()}
    directory = run.here / "cascade"
    try:
        seal = sealed.verify(run.at("cascade").fetched())
        same_spec = json.loads((directory / "cascade.json").read_text()) == spec.cascade.model_dump(
            mode="json"
        )
        if seal.facts["stages"] == digests and same_spec:
            return seal.digest
    except sealed.SealError as error:
        if run.at("cascade").names():
            log.warning("the cascade will be made again: %s", error)
    digest = bundle.save_cascade(directory, spec.cascade, stages, card=card(spec, stages))
    run.send("cascade")
    return digest


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
            f"Trained on {spec.source}.",
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
def timed(run: Home | Path, *names: str) -> Iterator[None]:
    """Add the seconds spent inside to these entries of <run>/seconds.json; a kill loses two at most."""
    home = Home.of(run)
    known, began = seconds_of(home), time.monotonic()

    def save() -> None:
        spent = time.monotonic() - began
        now = {name: round(known.get(name, 0.0) + spent, 3) for name in names}
        with WRITING:
            home.write(SECONDS, json.dumps(seconds_of(home) | now))

    with Periodically(save):
        yield


def seconds_of(run: Home | Path) -> dict[str, float]:
    """Step -> seconds over all starts so far; of a store's run, as far as known here.

    `total` is elapsed time, not the sum of the steps: stages may train side by side.
    """
    path = Home.of(run).here / SECONDS
    seconds: dict[str, float] = parsed(path.read_text(errors="replace")) if path.exists() else {}
    total = seconds.pop(TOTAL, sum(seconds.values()))
    return seconds | {TOTAL: total}


@contextmanager
def watched(stage: TrainSpec, making: Making) -> Iterator[None]:
    """While inside, show how far the training is: a bar on a terminal, now and then a line elsewhere."""
    log.info("%s: %s steps of %d images", stage.name, f"{stage.budget.steps:,}", stage.batch_size)
    progress = StepProgress(stage.name, stage.budget.steps, bars=making.bars, every_s=PROGRESS_S)
    journal = making.run.here / stage.name / JOURNAL

    def look() -> None:
        now = curves(journal)
        loss, rate, left = (now.get(name, {}) for name in SHOWN)
        if steps := loss.keys() & rate.keys() & left.keys():  # the last line may be cut
            step = max(steps)
            progress.show(step, loss=loss[step], rate=rate[step], left_s=left[step])

    with progress, Periodically(look, every_s=2.0 if making.bars.console.is_terminal else PROGRESS_S):
        yield
