"""`ddiff run`: the main job, from nothing to a served, judged and reported cascade; run again to continue.

<run>/summary.json  scores, seconds, addresses: what scripts read
<run>/report.html   what people look at
<run>/endpoint.*    the server left running, with --serve
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jobs.deploy import Address, free_address, refuse_taken, start_endpoint, stop_endpoint
from jobs.environment import joins_cluster, ray_cluster, runs, tracking_uri
from jobs.nodes import Node, joined, nodes_of, this_machine
from jobs.plan import Plan, plan_of, refuse
from jobs.plan import told as plan_text
from workflows.evaluation import EvaluationSpec, evaluate_endpoint
from workflows.pipeline import RunResult, RunSpec, run_pipeline, run_stage, seconds_of, timed
from workflows.registry import ASKED, CURRENT, JUDGED, SCORE, SCORE_HIGH, SCORE_LOW
from workflows.report import write_report
from workflows.tracking import Tracked, tracked
from workflows.training import parent_path

log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """What a run came to."""

    facts: dict[str, Any]
    """As in summary.json."""
    text: str
    """For people."""


def run_all(spec: RunSpec, *, address: Address | None, verbose: bool) -> Summary:
    """Make whatever of a run is not there yet, judge it over HTTP and write its report.

    Args:
        spec: The run.
        address: Where to leave the endpoint running; None stops it when the judging is done.
        verbose: Show what Ray says.

    Raises:
        PlanError: It cannot fit; nothing has been started.
        PortTakenError: Something else listens at the address; nothing has been started.
        The errors of run_pipeline, start_endpoint and write_report.
    """
    run = runs() / spec.name
    if not joins_cluster():
        announce(spec, this_machine())
    run.mkdir(parents=True, exist_ok=True)
    stop_endpoint(run)
    if address:
        refuse_taken(address)
    with tracked(run, uri=tracking_uri() or "") as tracking:
        with ray_cluster(verbose=verbose):
            if joins_cluster():
                announce(spec, joined())
            made = run_pipeline(spec, run=run, tracked=tracking)
        before = judged_before(run, made, spec.evaluation)
        url = ""
        if address or not before:
            with endpoint(run, made.cascade, address) as url:
                scores = before or judged(run, url, spec.evaluation)
        else:
            scores = before
        facts = write_summary(run, spec, made, scores)
        if not before or not (run / "report.html").exists():
            report(run, spec, tracking, facts)
            facts = write_summary(run, spec, made, scores)  # with the seconds of the report
    return Summary(facts, told(run, facts, url if address else ""))


def train_one(spec: RunSpec, stage: str, *, verbose: bool) -> dict[str, Any]:
    """One stage of a run, on the run's data and on the parents that are there.

    Raises:
        ValueError: No such stage, or a parent is missing.
    """
    run = runs() / spec.name
    for role in spec.stage(stage).parents:
        parent_path(spec.stage(stage), role, run)  # before anything is started
    one = only(spec, stage)
    if not joins_cluster():
        announce(one, this_machine())
    with tracked(run, uri=tracking_uri() or "") as tracking, ray_cluster(verbose=verbose):
        if joins_cluster():
            announce(one, joined())
        path = run_stage(spec, stage, run=run, tracked=tracking)
    return {"bundle": str(path), "seconds": seconds_of(run).get(stage, 0.0)}


def announce(spec: RunSpec, nodes: list[Node]) -> None:
    """Show the plan of a run, and refuse it if it cannot fit.

    Raises:
        PlanError: It cannot.
    """
    plan = plan_of(spec, nodes, run=str(runs() / spec.name))
    for line in plan_text(plan).splitlines():
        log.info("%s", line)
    refuse(plan)


def rehearsed(spec: RunSpec, stage: str = "") -> Plan:
    """The plan of a run, or of one of its stages, for --dry-run: on the cluster at RAY_ADDRESS, or here.

    Raises:
        ValueError: A parent is missing, or there is no such stage.
    """
    return plan_of(only(spec, stage) if stage else spec, nodes_of(), run=str(runs() / spec.name))


def only(spec: RunSpec, stage: str) -> RunSpec:
    """A run as far as one stage goes: that stage, on parents that are there."""
    return spec.model_construct(**(dict(spec) | {"stages": (spec.stage(stage),)}))


@contextmanager
def endpoint(run: Path, cascade: Path, address: Address | None) -> Iterator[str]:
    """A server for the cascade while inside, and afterwards too if it has an address of its own."""
    url = start_endpoint(run, cascade, address or free_address())
    try:
        yield url
    except BaseException:
        stop_endpoint(run)
        raise
    if address is None:
        stop_endpoint(run)


def judged_before(run: Path, made: RunResult, spec: EvaluationSpec) -> dict[str, Any] | None:
    """The scores of an earlier start, if they are of this cascade and these captions."""
    try:
        facts = json.loads((run / "summary.json").read_text())
        if (facts["digest"], facts["evaluation"]) == (made.digest, fingerprint(spec)):
            oracle: dict[str, Any] = facts["oracle"]
            return oracle
    except (OSError, ValueError, KeyError):
        return None
    return None


def fingerprint(spec: EvaluationSpec) -> str:
    """What was asked, in short."""
    return hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16]


def judged(run: Path, url: str, spec: EvaluationSpec) -> dict[str, Any]:
    """The scores of the cascade served there; the pictures stay in the run directory."""
    log.info("judging %d pictures painted by %s", spec.captions, url)
    with timed(run, "evaluation"):
        return evaluate_endpoint(url, spec, keep=run / "evaluation")


def write_summary(run: Path, spec: RunSpec, made: RunResult, scores: dict[str, Any]) -> dict[str, Any]:
    """summary.json, replaced whole."""
    facts = {
        "run": spec.name,
        "oracle": scores,
        "seconds": seconds_of(run),
        "bundle": str(run / "cascade"),
        "digest": made.digest,
        "stages": {name: str(run / name / "bundle") for name in made.bundles},
        "evaluation": fingerprint(spec.evaluation),
        "report": str(run / "report.html"),
    }
    draft = run / ".summary.json"
    draft.write_text(json.dumps(facts, indent=2))
    draft.replace(run / "summary.json")
    return facts


def report(run: Path, spec: RunSpec, tracking: Tracked, facts: dict[str, Any]) -> None:
    """The page, then page and scores to MLflow."""
    with timed(run, "report"):
        path = write_report(run, prompts=prompts_of(spec))
    shares = {f"oracle/{name}": value for name, value in facts["oracle"].items() if isinstance(value, float)}
    tracking.journal.log(shares, 0)
    tags = {"bundle_sha256": facts["digest"]} | score_tags(facts["oracle"], spec.evaluation)
    tracking.journal.model(spec.cascade.name, run / "cascade", alias=CURRENT, tags=tags)
    for file in (path, run / "summary.json"):
        tracking.journal.artifact(file)


def score_tags(scores: dict[str, Any], spec: EvaluationSpec) -> dict[str, str]:
    """What a registered cascade says of how well it paints; `ddiff promote` compares it."""
    low, high = scores["intervals"]["all"]
    found = {SCORE: scores["all"], SCORE_LOW: low, SCORE_HIGH: high, JUDGED: scores["n"]}
    return {name: str(value) for name, value in found.items()} | {ASKED: fingerprint(spec)}


def prompts_of(spec: RunSpec, count: int = 16) -> list[str]:
    """Captions to paint in the report: some of every group that is judged."""
    asked = spec.evaluation.cases()
    step = max(1, len(asked) // count)
    return [case.caption for case in asked[::step]][:count]


def told(run: Path, facts: dict[str, Any], url: str) -> str:
    """Where everything is."""
    scores, seconds = facts["oracle"], facts["seconds"]
    right = ", ".join(
        f"{name.replace('_', ' ')} {scores[name]:.1%}"
        for name in ("all", "one_object", "two_object", "unseen")
        if scores[name] is not None
    )
    lines = [
        f"painted right: {right} (of {scores['n']} captions, by the oracle)",
        f"seconds:       {seconds['total']:,.0f} in all",
        f"cascade:       {facts['bundle']}",
        f"report:        {facts['report']}",
        f"pictures:      {run / 'evaluation'}",
    ]
    if url:
        body = '{"prompt": "a red circle above a small blue square"}'
        call = f"curl {url}/v1/images/generations -H content-type:application/json -d '{body}'"
        lines += [f"endpoint:      {url}, until `ddiff stop --run {run}`", f"try:           {call}"]
    return "\n".join(lines)
