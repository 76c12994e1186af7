"""`ddiff submit`: a command of ours as a job on a cluster that is reached over HTTP alone.

What travels is our own packages and the configuration, resolved here; nothing of the user's working
directory, so no data and no secrets.  The cluster has its own: its nodes hold the keys of the store,
of MLflow and of Ray in their environment.

The run is known by its name.  While a job works on it, the same submission returns that job, and another
one is refused; after its end the same submission makes a new job that goes on where the last one stopped.
"""

import hashlib
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dd_core.sealed import digest_of
from dd_core.spec import Spec
from jobs.attempts import ATTEMPTS
from jobs.config import ConfigError, resolve, run_spec, shown
from jobs.environment import for_the_cluster
from jobs.following import Cluster, ClusterError, JobFacts, NameTakenError
from jobs.inputs import path_of, refuse_here, refuse_local
from jobs.secrecy import refuse_secrets, texts
from serve import code
from workflows.evaluation_spec import EvaluationSpec
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec
from workflows.train_spec import TrainSpec

CONFIG = "job.yaml"
JUDGING = ("captions", "seed", "data", "judge")
"""Settings of `ddiff eval`."""
NAMES = 5
"""How many names are tried for a job."""


class Order(NamedTuple):
    """What is to be done on the cluster."""

    words: tuple[str, ...]
    """Of the ddiff command there."""
    run: str
    """What it works on: one job at a time."""
    spec: Spec | None
    source: str
    """Where the spec came from."""

    def digest(self, environment: Mapping[str, str], made_by: str) -> str:
        """Equal for two submissions that ask for the same, to the last value, by the same code."""
        fields = self.spec.model_dump(mode="json") if self.spec else None
        asked = {"words": self.words, "spec": fields, "environment": dict(environment), "code": made_by}
        return digest_of(asked)[:16]


class Pack(NamedTuple):
    """What travels."""

    files: int
    bytes: int
    content: tuple[str, ...]
    code: str
    """Digest of our packages."""


class Submitted(NamedTuple):
    """What became of a submission."""

    id: str
    run: str
    started: bool
    """False: a job was at work on this run already."""
    attempt: int
    """1 for the first job of the run."""
    pack: Pack
    seconds: float


def order_of(words: Sequence[str], recipe: str | None, file: Path | None, changes: Sequence[str]) -> Order:
    """`smoke`, `run`, `train base`, `prepare`, `doctor`, `deploy NAME@ALIAS`, ... -> what to do there.

    Raises:
        ConfigError: The words are no order, or the configuration is refused.
    """
    named, source = recipe is not None or file is not None, recipe or str(file)
    match tuple(words):
        case ("train", stage):
            spec = whole_run(recipe, file, changes)
            spec.stage(stage)
            return Order(("train", stage, "--config", CONFIG), spec.name, spec, source)
        case ("train", *_):
            raise ConfigError("train: name one stage, such as `ddiff submit train base --recipe demo`")
        case ("run",):
            spec = whole_run(recipe, file, changes)
            return Order(("run", "--config", CONFIG), spec.name, spec, source)
        case ("prepare",):
            return preparing(resolve(recipe, file, changes), source)
        case ("doctor",) if named:
            return Order(("doctor", "--config", CONFIG), "doctor", whole_run(recipe, file, changes), source)
        case ("evaluate" | "deploy" | "doctor", *_) if not named:
            return of_the_nodes(words, changes)
        case (name,) if not named:
            spec = whole_run(name, None, changes)
            return Order(("run", "--config", CONFIG), spec.name, spec, name)
    raise no_order(words)


def of_the_nodes(words: Sequence[str], changes: Sequence[str]) -> Order:
    """Orders carried out there since the nodes have the keys: `evaluate URL`, `deploy NAME@ALIAS`, `doctor`.

    Raises:
        ConfigError: The words are no such order.
    """
    match tuple(words):
        case ("evaluate", url):
            return Order(judging(url, changes), f"evaluate-{short(url.rstrip('/'))}", None, "")
        case ("deploy", which):
            return Order(deploying(which, changes), "deploy", None, "")
        case ("doctor",) if not changes:
            return Order(("doctor",), "doctor", None, "")
    raise no_order(words)


def no_order(words: Sequence[str]) -> ConfigError:
    """The error for words that are no order; it says what may be written instead."""
    return ConfigError(
        f"submit {' '.join(words)}: write the name of a recipe; or run, train STAGE or prepare, with "
        "--recipe or --config; or doctor, with one of the two or without; or evaluate URL, deploy NAME@ALIAS "
        "or deploy s3://.../OLD.yaml (a cascade as it was served before), without them"
    )


def preparing(spec: RunSpec | TrainSpec | PairsSpec, source: str) -> Order:
    """The order of `prepare`: of pairs, or of those of a run on own pairs.

    Raises:
        ConfigError: It is of another kind, or no node would find what it reads.
    """
    if isinstance(spec, RunSpec) and spec.shapes is None:
        spec = spec.pairs
    if not isinstance(spec, PairsSpec):
        raise ConfigError(
            f"{source} is of kind {spec.kind!r}; prepare needs kind 'pairs', or a run with shapes: null"
        )
    refuse_local(spec)
    place = spec.destination.rstrip("/")
    name = f"prepare-{place.rpartition('/')[2]}-{short(place)}"
    return Order(("data", "prepare", "--config", CONFIG), name, spec, source)


def judging(url: str, changes: Sequence[str]) -> tuple[str, ...]:
    """The command there for `evaluate URL`.

    Raises:
        ConfigError: There is no such setting, data or judge is named alone, or no node would find it.
        ValidationError: A value is refused.
    """
    given = [change.partition("=") for change in changes]
    for name, _, value in given:
        if name not in JUDGING or not value:
            raise ConfigError(
                f"--set {name}={value}: evaluate takes captions=N and seed=N, and for captions of your own "
                "data=PREPARED and judge=CLIP"
            )
    asked = {name: value for name, _, value in given}
    if ("data" in asked) != ("judge" in asked):
        raise ConfigError(
            "evaluate: data=PREPARED and judge=CLIP go together, the pairs and who judges by them"
        )
    EvaluationSpec.model_validate({name: value for name, value in asked.items() if name != "data"})
    for place, path in asked.items():
        if place == "data" or (place == "judge" and (path := path_of(path))):
            refuse_here(place, path)
    settings = (word for name, _, value in given for word in (f"--{name}", value))
    return ("eval", "--url", url, *settings, "--record")


def deploying(which: str, changes: Sequence[str]) -> tuple[str, ...]:
    """The command there for `deploy NAME@ALIAS`, or for `deploy` and a former config's address.

    Raises:
        ConfigError: A former config is to be changed, or lies on this machine alone.
    """
    if not which.endswith(".yaml"):
        return ("deploy", which, *(word for change in changes for word in ("--set", change)))
    if changes:
        raise ConfigError("a former config is deployed as it was; leave out --set")
    refuse_here("deploy", which)
    return ("deploy", "--config", which)


def whole_run(recipe: str | None, file: Path | None, changes: Sequence[str]) -> RunSpec:
    """The run that is meant; all that it reads lies where the nodes find it.

    Raises:
        ConfigError: It is refused, or reads what only this machine has.
    """
    spec = run_spec(recipe, file, changes)
    refuse_local(spec)
    return spec


def short(text: str) -> str:
    """Eight hexadecimal digits for a name, different for every text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def submit(order: Order, cluster: Cluster) -> Submitted:
    """Hand an order to the cluster.

    Raises:
        ConfigError: A secret would travel.
        following.ClusterError: The cluster cannot be reached, refuses us, or works on this run already by
            another order.
    """
    began, environment = time.monotonic(), for_the_cluster()
    with packed(order, environment) as (directory, pack):
        digest = order.digest(environment, pack.code)
        for taken in range(NAMES):  # names taken by another submission just now, or by unlisted jobs
            before = [job for job in cluster.jobs() if job.run == order.run]
            if job := next((job for job in before if not job.over), None):
                refuse_another(order, job, digest)
                return Submitted(job.id, order.run, False, job.attempt, pack, time.monotonic() - began)
            attempt = 1 + max((job.attempt for job in before), default=0) + taken
            with suppress(NameTakenError):
                made = handed_over(order, attempt, cluster, directory, environment, digest)
                return Submitted(made, order.run, True, attempt, pack, time.monotonic() - began)
    raise ClusterError(f"{order.run}: the names of {NAMES} jobs are taken by jobs that are not listed")


def refuse_another(order: Order, job: JobFacts, digest: str) -> None:
    """Refuse an order unless the job at work, which keeps its order and its code, was given the same.

    Raises:
        following.ClusterError: The job's order has another digest, or its digest is unknown.
    """
    if job.order != digest:
        own = ", or name this run otherwise: --set name=..." if isinstance(order.spec, RunSpec) else ""
        raise ClusterError(
            f"{job.id} works on {order.run} and was told something else, or with other code "
            f"({job.command or '?'}, {job.status}); wait for its end: ddiff logs -f {job.id}, or stop it: "
            f"ddiff stop {job.id}{own}"
        )


def handed_over(
    order: Order, attempt: int, cluster: Cluster, directory: Path, environment: Mapping[str, str], digest: str
) -> str:
    """Start the job; return its id.

    Raises:
        following.NameTakenError: There is a job of this run and attempt.
    """
    words = ("python", "-m", "jobs.attempts", str(ATTEMPTS), *order.words, "-v")
    return cluster.start(
        f"{order.run}.{attempt}",
        shlex.join(words),
        directory,
        environment=environment,
        marks={
            "ddiff.run": order.run,
            "ddiff.attempt": str(attempt),
            "ddiff.command": order.words[0],
            "ddiff.order": digest,
        },
    )


@contextmanager
def packed(order: Order, environment: Mapping[str, str]) -> Iterator[tuple[Path, Pack]]:
    """A directory with what travels, and nothing else, while inside."""
    text = shown(order.spec, order.source) if order.spec else ""
    refuse_secrets(travelling(order, environment))
    with tempfile.TemporaryDirectory(prefix="ddiff-submit-") as name:
        directory = Path(name)
        ours = code.files()
        for place, path in ours.items():
            (directory / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / place)
        if text:
            (directory / CONFIG).write_text(text)
        size = sum((directory / place).stat().st_size for place in (*ours, *((CONFIG,) if text else ())))
        content = (*code.PACKAGES, *((CONFIG,) if text else ()))
        yield directory, Pack(len(ours) + bool(text), size, content, code.digest())


def travelling(order: Order, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every text that goes to the cluster: (where it stands, text)."""
    yield from (("the command", word) for word in (*order.words, order.source))
    yield from environment.items()
    if order.spec:
        yield from texts(order.spec.model_dump(mode="json"))


def as_facts(done: Submitted) -> dict[str, Any]:
    """For scripts."""
    return done._asdict() | {"pack": done.pack._asdict()}


def told(done: Submitted) -> str:
    """For people: what travelled, and what it is called there."""
    state = f"attempt {done.attempt}" if done.started else "already at work, not started again"
    return (
        f"packed {done.pack.files} files, {done.pack.bytes / 1000:,.0f} kB: {', '.join(done.pack.content)}; "
        f"code {done.pack.code[:12]}\n"
        f"run {done.run}: {done.id} ({state}, accepted in {done.seconds:.1f} s)"
    )
