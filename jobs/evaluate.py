"""How a cascade is judged, and what is said of it: `ddiff eval`, the end of `ddiff run`, `ddiff promote`.

Captions of the embedded world are judged by its oracle; those of a user's own data by a CLIP.  Their scores
cannot be compared with each other.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dd_core.stages.clip import ClipSpec
from jobs.failures import JobFailedError
from workflows.clip_judge import OwnData, evaluate_own, judge_of
from workflows.evaluation import evaluate_endpoint
from workflows.evaluation_spec import EvaluationSpec
from workflows.registry import ASKED, COSINE, JUDGED, PAINTED_IN, SCORE, SCORE_HIGH, SCORE_LOW, SCORED_BY, WAY
from workflows.run_spec import RunSpec
from workflows.storage import Home

log = logging.getLogger(__name__)
Judges = Literal["oracle", "clip"]
NOTHING_HELD_OUT = (
    "nothing is held out of the data, so the cascade will be judged by captions that it was trained on; "
    "--set pairs.held_out=0.02 keeps one in fifty for judging, and prepares and trains anew"
)
NO_JUDGE = (
    "none of its stages is a CLIP: name one with --set evaluation.judge=MODEL/TAG, MODEL:FILE or a bundle"
)


class UnjudgedError(JobFailedError):
    """The cascade is made, and its scores are not to be trusted."""


class Way(NamedTuple):
    """How a cascade is judged."""

    by: Judges
    spec: EvaluationSpec
    own: OwnData | None = None
    """What a CLIP judges by; None if `by` is clip: there is no CLIP, so nothing can be judged."""

    @property
    def possible(self) -> bool:
        """Whether there is a judge."""
        return self.by == "oracle" or self.own is not None

    def fingerprint(self) -> str:
        """Digest of the questions and the judge: scores with the same one can be compared.

        Raises:
            ValueError: There is no such CLIP, or no such data.
        """
        ours = {"judge", "among"} if self.by == "oracle" else {"judge"}
        ours |= set() if self.spec.label else {"label"}  # as before this field existed
        body = self.spec.model_dump_json(exclude=ours)
        asked = body + self.own.digest() if self.own else body
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def way_of(spec: RunSpec, run: Home) -> Way:
    """How a run is judged: by the oracle; on its own data by the CLIP named, else by its own."""
    asked = spec.evaluation.but(label=spec.evaluation.label or spec.label)
    if spec.shapes is not None:
        return Way("oracle", asked)
    own = {
        run.at(f"{stage.name}/bundle").address: stage.stage.pretrained
        for stage in spec.stages
        if isinstance(stage.stage, ClipSpec)
    }
    names = {stage.name for stage in spec.stages}
    parents = {stage.parents.get("clip", "") for stage in spec.stages} - names - {""}
    own |= {Home.of(parent).address: parent for parent in sorted(parents) if embeds(Home.of(parent))}
    clip = asked.judge or next(iter(own), "")
    taught = clip in own.values() or Home.of(clip).address in own
    data = Home.of(spec.pairs.destination).address
    return Way("clip", asked, OwnData(data, clip, taught) if clip else None)


def embeds(clip: Home) -> bool:
    """Whether a CLIP, by its bundle, is more than the text tower of a Stable Diffusion."""
    return bool(clip.facts("spec.json").get("net", {}).get("towers") != "text")


def way_by(spec: EvaluationSpec, data: str) -> Way:
    """How an endpoint of no known run is judged: on the data that are named, else on the embedded world.

    Raises:
        ValueError: Data are named and no CLIP, or a CLIP and no data.
    """
    if bool(data) != bool(spec.judge):
        raise ValueError("--data and --judge go together: prepared pairs, and the CLIP that judges by them")
    return Way("clip", spec, OwnData(Home.of(data).address, spec.judge)) if data else Way("oracle", spec)


def look_ahead(spec: RunSpec, way: Way) -> None:
    """Load the judge now, and warn if no data are held out: both would show only at the end.

    Raises:
        ValueError: There is no such judge.
        sealed.SealError: The judge is damaged.
    """
    if way.by == "oracle":
        return
    if spec.evaluation.judge:
        judge_of(spec.evaluation.judge)  # weights that open_clip has to fetch are fetched now
    if not way.possible:
        log.warning("the cascade will not be judged: %s", NO_JUDGE)
    elif not spec.pairs.held_out:
        log.warning("%s", NOTHING_HELD_OUT)


def judge_endpoint(url: str, way: Way, *, keep: Path | None = None, digest: str = "") -> dict[str, Any]:
    """The scores of whatever is served there.

    Args:
        url: Such as http://127.0.0.1:8000.
        way: How to judge.
        keep: Directory for the pictures and what was said of each.
        digest: Of the cascade that is to be judged; empty: any one.

    Raises:
        NoPainterError: Nothing answers there, or another cascade.
        ValueError: There is no judge.
        The errors of evaluate_own.
    """
    if way.by == "oracle":
        return evaluate_endpoint(url, way.spec, keep=keep, digest=digest)
    if way.own is None:
        raise ValueError(NO_JUDGE)
    return evaluate_own(url, way.spec, way.own, keep=keep, digest=digest)


def judge_and_keep(url: str, way: Way, home: Home, place: str, *, digest: str = "") -> dict[str, Any]:
    """`judge_endpoint`; pictures and verdicts replace those in a directory of the run once it has ended."""
    fresh = home.here / f"{place}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    scores = judge_endpoint(url, way, keep=fresh, digest=digest)
    home.drop(place)
    fresh.rename(home.here / place)
    return scores


def whole(scores: Mapping[str, Any]) -> bool:
    """Whether every picture that was asked for came; true of empty scores."""
    return not scores.get("failed")


def refuse_parts(scores: Mapping[str, Any], remedy: str) -> None:
    """Raises UnjudgedError, with what to do about it, unless every picture came."""
    if not whole(scores):
        lacking = f"{scores['failed']} of {scores['n']} pictures"
        raise UnjudgedError(f"{lacking} did not come, so the cascade is not judged; {remedy}")


def score_tags(way: Way, scores: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a registered cascade: how it is judged, and its scores, which `ddiff promote` compares.

    Scores with pictures missing are left out.
    """
    own = way.own._asdict() if way.own else None
    tags = {SCORED_BY: way.by, WAY: json.dumps({"spec": way.spec.model_dump(mode="json"), "own": own})}
    if not scores or not whole(scores):
        return tags
    name = "all" if way.by == "oracle" else "r_precision"
    low, high = scores["intervals"][name]
    found = {SCORE: scores[name], SCORE_LOW: low, SCORE_HIGH: high, JUDGED: scores["n"]}
    found |= {COSINE: scores["cosine"]} if way.by == "clip" else {}
    found |= {PAINTED_IN: scores["precision"]} if scores.get("precision") else {}
    return tags | {name: str(value) for name, value in found.items()} | {ASKED: way.fingerprint()}


def way_in(tags: Mapping[str, str]) -> Way:
    """How a registered cascade is to be judged, by the tags that its run set; without them by the oracle."""
    if WAY not in tags:
        return Way("oracle", EvaluationSpec())
    said = json.loads(tags[WAY])
    own = OwnData(**said["own"]) if said["own"] else None
    by: Judges = "clip" if tags.get(SCORED_BY) == "clip" else "oracle"
    return Way(by, EvaluationSpec.model_validate(said["spec"]), own)


def listed(scores: Mapping[str, Any]) -> str:
    """Scores for people, one a line, each with its 95 % interval if it has one."""
    intervals = scores.get("intervals", {})
    lines = []
    for name, found in scores.items():
        if name != "intervals" and found is not None:
            told = f"{found:.3f}" if isinstance(found, float) else f"{found}"
            low, high = intervals.get(name, (None, None))
            lines.append(f"{name}: {told}" + ("" if low is None else f" ({low:.3f} to {high:.3f})"))
    return "\n".join(lines)


def verdict_of(way: Way, scores: Mapping[str, Any]) -> str:
    """The scores in a line, for people."""
    if not scores:
        return "not judged yet" if way.possible else f"not judged: {NO_JUDGE}"
    if way.by == "oracle":
        right = ", ".join(
            f"{name.replace('_', ' ')} {scores[name]:.1%}"
            for name in ("all", "one_object", "two_object", "unseen")
            if scores.get(name) is not None
        )
        return f"{right} (of {scores['n']} captions, by the oracle)"
    return (
        f"cosine with its caption {scores['cosine']:.3f} (true pictures {scores['true_cosine']:.3f}), own "
        f"caption the nearest of {scores['among']} for {scores['r_precision']:.1%} "
        f"({scores['true_r_precision']:.1%}); of {scores['n']} captions "
        f"{'held out' if scores['held_out'] else 'seen in training'}, by {judge_words(scores['judge'])}"
    )


def judge_words(judge: Mapping[str, Any]) -> str:
    """Who judged, for people."""
    return "the cascade's own CLIP, which flatters" if judge["taught"] else f"the CLIP {judge['name']}"
