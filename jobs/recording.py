"""`ddiff eval --record`: scores of an endpoint, kept where the cascade that it serves is known.

<run>/evaluation/             pictures and verdicts, if the questions are those of the run itself
<run>/evaluation-1a2b3c4d/    of other questions, by their digest; scores.json in both
"""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import httpx

from jobs import environment
from jobs.evaluate import Way, judge_and_keep, judge_endpoint, score_tags, verdict_of, way_in, whole
from workflows.painting_client import NoPainterError, client_of
from workflows.registry import Registry, Version
from workflows.storage import Home

log = logging.getLogger(__name__)
CASCADE = "/cascade"
"""Where a run keeps its cascade, within its directory."""


def judge_and_record(url: str, way: Way) -> dict[str, Any]:
    """Judge whatever is served at a URL, and record the scores wherever its cascade is known by its digest.

    That is every version of it in MLflow, and the run that made it, in MLflow and in its directory; scores
    with pictures missing go to the directory alone.  A cascade of a user's own data is judged on these data,
    as its run is.

    Raises:
        NoPainterError: No cascade of ours answers there, or another one meanwhile; nothing has been recorded.
        RegistryError: MLflow does not answer; if it did before the judging, the scores are in the run's
            directory.
        The errors of judge_endpoint.
    """
    digest = served(url)
    registry = Registry(uri) if (uri := environment.tracking_uri()) else None
    known = registry.of_digest(digest) if registry else []
    if not known:
        log.warning(
            "no MLflow knows cascade %s (MLFLOW_TRACKING_URI): its scores are here alone", digest[:12]
        )
    way = suited(way, known[0].tags if known else {})
    home = run_of(known[0]) if known else None
    facts = home.facts("summary.json") if home else {}
    own = (facts.get("digest"), facts.get("evaluation")) == (digest, way.fingerprint())
    place = "evaluation" if own else f"evaluation-{way.fingerprint()[:8]}"
    if home:
        scores = judge_and_keep(url, way, home, place, digest=digest)
    else:
        scores = judge_endpoint(url, way, digest=digest)
    if home:
        home.write(f"{place}/scores.json", json.dumps(scores, indent=2))
        home.send(place)
        if (
            own and (facts := home.facts("summary.json")).get("digest") == digest
        ):  # it may have run on meanwhile
            home.write("summary.json", json.dumps(facts | {way.by: scores}, indent=2))
        log.info("pictures and scores: %s", home.at(place).address)
    if registry and whole(scores):
        shares = {f"{way.by}/{name}": it for name, it in scores.items() if isinstance(it, float)}
        for version in known:
            registry.note(version, score_tags(way, scores))
            registry.log(version, shares)
            log.info("%s, version %s: %s", version.name, version.number, verdict_of(way, scores))
    return scores


def suited(way: Way, tags: Mapping[str, str]) -> Way:
    """How a version with these tags is judged: as asked, or on its run's data if the oracle cannot judge.

    It is asked for the classes that its run's data have.
    """
    said = way_in(tags)
    if way.by == "clip" or said.by == "oracle":
        return way._replace(spec=way.spec.but(label=said.spec.label))
    return said._replace(spec=said.spec.but(captions=way.spec.captions, seed=way.spec.seed))


def served(url: str) -> str:
    """Digest of the cascade that answers there.

    Raises:
        NoPainterError: None of ours does.
    """
    try:
        with client_of(url, 20) as client:
            digest = client.get("/health/ready").headers.get("x-model-version", "")
    except httpx.HTTPError as error:
        raise NoPainterError(f"{url} does not answer ({type(error).__name__}: {error})") from None
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise NoPainterError(f"{url} is no endpoint of ddiff: it does not say which cascade it serves")
    return digest


def run_of(version: Version) -> Home | None:
    """The directory of the run that made a version; None if its address is not within a run."""
    address = version.address.rstrip("/")
    if not address.endswith(CASCADE):
        return None
    home = Home.of(address.removesuffix(CASCADE))
    if not home.stored and not home.here.is_dir():
        log.warning("the run in %s is not on this machine: pictures and scores are not kept there", home.here)
        return None
    return home
