"""Cascades by name in MLflow's registry: which version an alias means, and moving it to a better one.

`demo@current`     the newest that a run of this name has made
`demo@production`  what `ddiff promote` has moved there
`demo`             the same as demo@current
"""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from pydantic import TypeAdapter, ValidationError

from dd_core.spec import SafeName
from workflows.addresses import redacted
from workflows.journal import unreachable
from workflows.mlflow_errors import ABSENT, INVALID, code_of
from workflows.model_versions import address_of
from workflows.tracking import Book, away

CURRENT = "current"
SCORE, SCORE_LOW, SCORE_HIGH, JUDGED, ASKED = (
    "score.all",
    "score.low",
    "score.high",
    "score.captions",
    "score.evaluation",
)
"""Tags of a version: share of captions painted right, its interval, number of captions, digest of which."""
SCORED_BY, COSINE, WAY = "score.by", "score.cosine", "score.way"
"""Who judges a version (the oracle, if absent); the mean cosine, if the score is R-precision; and how it is
judged, in JSON (jobs.evaluate)."""
PAINTED_IN = "score.precision"
"""Precision in which the judged pictures were computed, if it is known: bf16, fp32."""
DELETES = "delete the artifact"
"""A step of `probe` that no run takes."""
NAME: TypeAdapter[str] = TypeAdapter(SafeName)


class RegistryError(ValueError):
    """The registry does not have what was asked for, or cannot be asked."""


class PromotionError(ValueError):
    """The candidate is not known to be better than what holds the alias."""


class Version(NamedTuple):
    """A registered cascade."""

    name: str
    number: str
    address: str
    """Where the run left it; what is there may have changed since: the digest tells."""
    digest: str
    tags: dict[str, str]
    run_id: str = ""
    """Of the MLflow run that registered it."""

    @property
    def score(self) -> float | None:
        """Share of pictures that are right, or nearest to their own caption by a CLIP; None: never judged."""
        return float(self.tags[SCORE]) if SCORE in self.tags else None

    @property
    def judge(self) -> str:
        """Who gave the score."""
        return self.tags.get(SCORED_BY, "oracle")

    def says(self) -> str:
        """For people."""
        if self.score is None:
            return f"version {self.number} (never judged)"
        within = f"{float(self.tags[SCORE_LOW]):.1%} to {float(self.tags[SCORE_HIGH]):.1%}"
        if self.judge == "oracle":
            return f"version {self.number} ({self.score:.1%} right of {self.tags[JUDGED]}, {within})"
        found = f"{self.score:.1%} of {self.tags[JUDGED]} found by a CLIP, {within}"
        return f"version {self.number} ({found}, cosine {float(self.tags[COSINE]):.3f})"


class Registry:
    """The models of a tracking server.

    Args:
        uri: Of the server, or sqlite:///... for the store of one run.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        book = Book(Path(), uri=uri)
        book.connect()
        self.client: Any = book.client

    def version(self, wanted: str) -> Version:
        """What NAME@ALIAS means now.

        Raises:
            RegistryError: There is none, it is no cascade of ours, or MLflow does not answer.
        """
        name, alias = split(wanted)
        found = self.asked(name, alias)
        if found is None:
            there = ", ".join(self.known()) or "none"
            raise RegistryError(f"MLflow has no {name}@{alias}; there are: {there}")
        if "bundle_sha256" not in found.tags:
            raise RegistryError(f"{name}@{alias} is no cascade of ddiff: it has no tag bundle_sha256")
        return version_of(found)

    def of_digest(self, digest: str) -> list[Version]:
        """Every version, under whatever name, of the cascade of this digest; the newest first.

        Args:
            digest: 64 hexadecimal digits.

        Raises:
            RegistryError: MLflow does not answer, or denies access.
        """
        with self.answering():
            found = self.client.search_model_versions(f"tags.bundle_sha256 = '{digest}'")
        return [version_of(one) for one in found]

    def asked(self, name: str, alias: str) -> Any | None:
        """The version, or None if there is none."""
        from mlflow.exceptions import MlflowException

        with self.answering():
            try:
                return self.client.get_model_version_by_alias(name, alias)
            except MlflowException as error:
                if code_of(error) in (ABSENT, INVALID):
                    return None
                raise

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Turn what MLflow raises inside into one line: where it is, what is wrong, what to do.

        Raises:
            RegistryError: With that line.
        """
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if why := away(error, self.uri):
                raise RegistryError(why) from error
            if error.get_http_status_code() == 401 or " 401 " in str(error):
                raise RegistryError(
                    f"MLflow at {redacted(self.uri)} answers 401: set MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD, or `ddiff submit` it to nodes that have them"
                ) from error
            raise RegistryError(
                f"MLflow at {redacted(self.uri)}: {one_line(error)}; `ddiff doctor`"
            ) from error

    def known(self) -> list[str]:
        """Every name with its aliases, for messages."""
        with self.answering():
            models = self.client.search_registered_models(max_results=100)
        return [f"{model.name}@{alias}" for model in models for alias in model.aliases]

    def promote(self, candidate: Version, alias: str, *, force: bool = False) -> Version | None:
        """Move an alias to a version that scores better than the one that holds it, and return that one.

        Args:
            candidate: The version.
            alias: Such as production.
            force: Move it whatever the scores say.

        Raises:
            PromotionError: It is not better, or the two cannot be compared; the alias stays where it was.
            RegistryError: MLflow does not answer, or denies access.
        """
        NAME.validate_python(alias)
        found = self.asked(candidate.name, alias)
        holder = None if found is None else self.version(f"{candidate.name}@{alias}")
        if not force and (why := worse(candidate, holder)):
            raise PromotionError(f"{candidate.name}@{alias} stays: {why}; --force moves it nevertheless")
        with self.answering():
            self.client.set_registered_model_alias(candidate.name, alias, candidate.number)
        return holder

    def note(self, version: Version, tags: dict[str, str]) -> Version:
        """Write scores down on a version, and return it with them.

        Raises:
            RegistryError: MLflow does not answer, or denies access.
        """
        with self.answering():
            for tag, value in tags.items():
                self.client.set_model_version_tag(version.name, version.number, tag, value)
        return version._replace(tags=version.tags | tags)

    def log(self, version: Version, metrics: dict[str, float]) -> None:
        """Write metrics down with the MLflow run that registered a version, if that is known.

        Raises:
            RegistryError: MLflow does not answer, or denies access.
        """
        with self.answering():
            for name, value in metrics.items() if version.run_id else ():
                self.client.log_metric(version.run_id, name, value)

    def probe(self, experiment: str) -> dict[str, str]:
        """Do once what a run does, and undo it: what could not be done -> why; empty if all is well.

        The experiment is made if it is new; the run that is begun in it is deleted again, with its artifact.
        """
        refused: dict[str, str] = {}
        name = f"ddiff-doctor-{uuid.uuid4().hex[:8]}"
        try:
            book = Book(Path(), uri=self.uri, experiment=experiment)
            book.connect()
            run_id = self.client.create_run(book.experiment_id, run_name=name).info.run_id
        except Exception as error:  # noqa: BLE001 whatever the server or the network says is the finding
            return {"begin a run": one_line(error)}
        for what, act in {
            "log a metric": lambda: self.client.log_metric(run_id, "probe", 1.0),
            "store an artifact": lambda: self.client.log_text(run_id, "probe", "probe.txt"),
            DELETES: lambda: self.emptied(run_id),
            "register a model": lambda: self.registered(name),
            "delete the run": lambda: self.client.delete_run(run_id),
        }.items():
            try:
                act()
            except Exception as error:  # noqa: BLE001 as above
                refused[what] = one_line(error)
        return refused

    def emptied(self, run_id: str) -> None:
        """Delete the artifacts of a run, which MLflow's client cannot, and on a disk their directory."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        place = self.client.get_run(run_id).info.artifact_uri
        get_artifact_repository(place, tracking_uri=self.uri).delete_artifacts()
        if (here := unquote(place.removeprefix("file://"))).startswith("/"):
            with contextlib.suppress(OSError):  # it is gone, or holds what is not ours
                Path(here).parent.rmdir()

    def registered(self, name: str) -> None:
        """Make a model without versions and delete it."""
        self.client.create_registered_model(name)
        self.client.delete_registered_model(name)


def version_of(found: Any) -> Version:
    """MLflow's version of a cascade of ours."""
    tags, digest = dict(found.tags), found.tags.get("bundle_sha256", "")
    return Version(found.name, str(found.version), address_of(found), digest, tags, found.run_id or "")


def worse(candidate: Version, holder: Version | None) -> str:
    """Why a candidate may not take a holder's place; empty if it may."""
    if candidate.score is None:
        return f"the candidate is {candidate.says()}; run its recipe to the end, which judges it"
    if holder is None or holder.digest == candidate.digest:
        return ""
    if holder.score is None:
        return f"its holder is {holder.says()}"
    if why := apart(candidate, holder):
        return f"{why}, so their scores say nothing of each other"
    if rank(candidate) <= rank(holder):
        return f"the candidate, {candidate.says()}, is not better than its holder, {holder.says()}"
    return ""


def apart(candidate: Version, holder: Version) -> str:
    """Why two scores cannot be compared; empty if they can."""
    if holder.judge != candidate.judge:
        return f"the candidate was judged by the {candidate.judge}, its holder by the {holder.judge}"
    if holder.tags.get(ASKED) == candidate.tags.get(ASKED):
        mine, theirs = (one.tags.get(PAINTED_IN, "") for one in (candidate, holder))
        other = mine and theirs and mine != theirs
        return f"the candidate was painted in {mine}, its holder in {theirs}" if other else ""
    if candidate.judge == "clip":
        return (
            "candidate and holder were judged on other captions, or by two CLIPs (one evaluation.judge and "
            "the same data for both runs would make them comparable)"
        )
    return "candidate and holder were judged on other captions"


def rank(version: Version) -> tuple[float, float]:
    """Sort key: the score, then the mean cosine, which only a CLIP gives."""
    return version.score or 0.0, float(version.tags.get(COSINE, 0))


def split(wanted: str) -> tuple[str, str]:
    """NAME@ALIAS, or NAME for its current version.

    Raises:
        RegistryError: These are no names.
    """
    name, _, alias = wanted.partition("@")
    try:
        return NAME.validate_python(name), NAME.validate_python(alias or CURRENT)
    except ValidationError:
        raise RegistryError(f"{wanted!r} is no NAME@ALIAS; letters, digits, '.', '_', '-' in both") from None


def one_line(error: BaseException) -> str:
    """An error in one short line, the cause first; MLflow repeats its address, so passwords are removed."""
    said = [unreachable(error), redacted(" ".join(str(error).split()))]
    return f"{': '.join(one for one in said if one):.240}" or type(error).__name__
