"""`ddiff submit`: a command of ours as a job on a cluster that is reached over HTTP alone.

What travels is our own packages and the configuration, resolved here; nothing of the directory the
user stands in, so no data and no secrets.  Those the cluster has: its nodes hold the keys of the
store, of MLflow and of Ray in their own environment.

The run is known by its name.  A job that works on it is returned, not started a second time; after
its end the same submission makes a new job that goes on where the last one stopped.
"""

import json
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dd_core.spec import Spec
from jobs.config import ConfigError, resolve, shown
from jobs.environment import for_the_cluster, secrets_here
from jobs.following import Cluster, ClusterError, JobFacts, NameTakenError
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec

ROOT = Path(__file__).parents[1]
PACKAGES = ("dd_core", "jobs", "serve", "workflows")
KINDS = (".py", ".typed", ".css", ".html", ".js", ".yaml", ".json", "Dockerfile")
CONFIG = "job.yaml"
JUDGING = ("captions", "seed")
"""Settings of `ddiff eval`."""
ATTEMPTS = 3
"""How often a driver that was killed is started again before its job has failed."""
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


class Pack(NamedTuple):
    """What travels."""

    files: int
    bytes: int
    content: tuple[str, ...]


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
    """`smoke`, `run`, `train base`, `prepare`, `evaluate URL`, `deploy NAME@ALIAS` -> what to do there.

    Raises:
        ConfigError: The words are no order, or the configuration is refused.
    """
    match tuple(words):
        case ("train", stage):
            spec = run_of(recipe, file, changes)
            spec.stage(stage)
            return Order(("train", stage, "--config", CONFIG), spec.name, spec, recipe or str(file))
        case ("train", *_):
            raise ConfigError("train: name one stage, such as `ddiff submit train base --recipe demo`")
        case ("run",):
            spec = run_of(recipe, file, changes)
            return Order(("run", "--config", CONFIG), spec.name, spec, recipe or str(file))
        case ("prepare",):
            pairs = resolve(recipe, file, changes)
            if not isinstance(pairs, PairsSpec):
                raise ConfigError(f"{recipe or file} is of kind {pairs.kind!r}; prepare needs kind 'pairs'")
            name = f"prepare-{pairs.destination.rstrip('/').rpartition('/')[2]}"
            return Order(("data", "prepare", "--config", CONFIG), name, pairs, recipe or str(file))
        case ("evaluate" | "deploy" as what, which) if recipe is None and file is None:
            return Order(of_the_served(what, which, changes), what, None, "")
        case (name,) if recipe is None and file is None:
            spec = run_of(name, None, changes)
            return Order(("run", "--config", CONFIG), spec.name, spec, name)
    raise ConfigError(
        f"submit {' '.join(words)}: write a recipe, or run, train STAGE, prepare with --recipe or --config, "
        "evaluate URL, deploy NAME@ALIAS, or deploy s3://... for the address of a former config"
    )


def of_the_served(what: str, which: str, changes: Sequence[str]) -> tuple[str, ...]:
    """The command there for `evaluate URL`, `deploy NAME@ALIAS`, or `deploy` and a former config's address.

    Raises:
        ConfigError: It has no such setting.
    """
    if what == "evaluate":
        given = [change.partition("=") for change in changes]
        for name, _, value in given:
            if name not in JUDGING or not value:
                raise ConfigError(f"--set {name}={value}: evaluate takes captions=N and seed=N")
        return ("eval", "--url", which, *(word for name, _, value in given for word in (f"--{name}", value)))
    if not which.endswith(".yaml"):
        return ("deploy", which, *(word for change in changes for word in ("--set", change)))
    if changes:
        raise ConfigError("a former config is deployed as it was; leave out --set")
    return ("deploy", "--config", which)


def run_of(recipe: str | None, file: Path | None, changes: Sequence[str]) -> RunSpec:
    """The whole run that is meant."""
    spec = resolve(recipe, file, changes)
    if not isinstance(spec, RunSpec):
        raise ConfigError(f"{recipe or file} is of kind {spec.kind!r}; this needs kind 'run'")
    return spec


def submit(order: Order, cluster: Cluster) -> Submitted:
    """Hand an order to the cluster.

    Raises:
        ConfigError: The configuration holds a secret.
        following.ClusterError: The cluster cannot be reached, or does not let us.
    """
    began, environment = time.monotonic(), for_the_cluster()
    with packed(order, environment) as (directory, pack):
        for taken in range(NAMES):  # by somebody who submits at this moment, or by a job that is not listed
            before = [job for job in cluster.jobs() if job.run == order.run]
            if under_way := [job for job in before if not job.over]:
                job = under_way[0]
                return Submitted(job.id, order.run, False, job.attempt, pack, time.monotonic() - began)
            attempt = 1 + max((job.attempt for job in before), default=0) + taken
            with suppress(NameTakenError):
                made = handed_over(order, attempt, cluster, directory, environment)
                return Submitted(made, order.run, True, attempt, pack, time.monotonic() - began)
    raise ClusterError(f"{order.run}: the names of {NAMES} jobs are taken by jobs that are not listed")


def handed_over(
    order: Order, attempt: int, cluster: Cluster, directory: Path, environment: Mapping[str, str]
) -> str:
    """Start the job; its id.

    Raises:
        following.NameTakenError: There is a job of this run and attempt.
    """
    words = ("python", "-m", "jobs.attempts", str(ATTEMPTS), *order.words, "-v")
    return cluster.start(
        f"{order.run}.{attempt}",
        " ".join(quoted(word) for word in words),
        directory,
        environment=environment,
        marks={"ddiff.run": order.run, "ddiff.attempt": str(attempt), "ddiff.command": order.words[0]},
    )


@contextmanager
def packed(order: Order, environment: Mapping[str, str]) -> Iterator[tuple[Path, Pack]]:
    """A directory with what travels, and nothing else, while inside."""
    text = shown(order.spec, order.source) if order.spec else ""
    refuse_secrets(text, environment)
    with tempfile.TemporaryDirectory(prefix="ddiff-submit-") as name:
        directory = Path(name)
        for package in PACKAGES:
            for path in sorted((ROOT / package).rglob("*")):
                if path.is_file() and path.name.endswith(KINDS) and "__pycache__" not in path.parts:
                    target = directory / path.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
        if text:
            (directory / CONFIG).write_text(text)
        files = [path for path in directory.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        yield directory, Pack(len(files), size, (*PACKAGES, *((CONFIG,) if text else ())))


def refuse_secrets(text: str, environment: Mapping[str, str]) -> None:
    """What travels can be read by everybody who may look at the cluster's dashboard.

    Raises:
        ConfigError: The value of a secret of this environment is in it, or a password in an address.
    """
    everything = text + json.dumps(dict(environment))
    for name, value in secrets_here().items():
        if value in everything:
            raise ConfigError(f"the value of {name} is in the configuration; take it out: the nodes have it")
    for name, value in environment.items():
        if urllib.parse.urlsplit(value).password:
            raise ConfigError(
                f"{name} holds a password; give the nodes user and password as variables of their own"
            )


def quoted(word: str) -> str:
    """A word of an entry point, which is read by a shell."""
    return "'" + word.replace("'", "'\\''") + "'" if set(word) - SAFE else word


SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=@,+")


def as_facts(done: Submitted) -> dict[str, Any]:
    """For scripts."""
    return done._asdict() | {"pack": done.pack._asdict()}


def told(done: Submitted) -> str:
    """For people: what travelled, and what it is called there."""
    state = f"attempt {done.attempt}" if done.started else "already at work, not started again"
    return (
        f"packed {done.pack.files} files, {done.pack.bytes / 1000:,.0f} kB: {', '.join(done.pack.content)}\n"
        f"run {done.run}: {done.id} ({state}, accepted in {done.seconds:.1f} s)"
    )


__all__ = ["JobFacts", "Order", "Submitted", "as_facts", "order_of", "submit", "told"]
