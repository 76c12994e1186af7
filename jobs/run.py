"""`ddiff run`: the main job, from nothing to a served, judged and reported cascade; run again to continue.

<run>/summary.json  scores, seconds, addresses: what scripts read
<run>/report.html   what people look at
<run>/endpoint.*    the server left running, with --serve
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dd_core.addresses import is_address
from dd_core.sealed import MANIFEST
from jobs.config import keep
from jobs.disk import written
from jobs.driver import Driver
from jobs.endpoint import Address, free_address, refuse_taken, start_endpoint, stop_endpoint
from jobs.environment import (
    experiment,
    joins_cluster,
    node_groups,
    refuse_dashboard,
    runs,
    tracking_uri,
)
from jobs.evaluate import (
    Way,
    judge_and_keep,
    look_ahead,
    refuse_parts,
    score_tags,
    verdict_of,
    way_of,
    whole,
)
from jobs.failures import StoppedError
from jobs.machines import free_for, rooms_everywhere
from jobs.nodes import Node, Room, joined, nodes_of, this_machine
from jobs.plan import Plan, plan_of, refuse
from jobs.plan import told as plan_text
from jobs.ray_session import ray_cluster
from jobs.source_tags import source_tags
from workflows.journal import JOURNAL, Journal, entries
from workflows.pairs import HELD_OUT
from workflows.pictures import SHOWN, last_parts
from workflows.pipeline import RunResult, run_pipeline, seconds_of, timed
from workflows.prepare import located_or_done
from workflows.registry import CURRENT
from workflows.report import SHEETS, write_report
from workflows.run_spec import RunSpec
from workflows.standing import standings
from workflows.storage import Home
from workflows.superseded import MADE_OF
from workflows.tracking import Tracked, tracked
from workflows.training import PreemptedError

log = logging.getLogger(__name__)
TOLD_TO_STOP = (StoppedError, PreemptedError)


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
        AlreadyRunningError: Another process makes this run; nothing has been started.
        ValueError: An endpoint is to be left running, and the run is made on a cluster; or RAY_ADDRESS is a
            dashboard.
        UnjudgedError: Pictures did not come; everything else is made.
        The errors of run_pipeline, start_endpoint and write_report.
    """
    if address and joins_cluster():
        raise ValueError(
            "--serve would take over what the cluster at RAY_ADDRESS has on the air; leave it out, and put "
            f"the cascade there afterwards with `ddiff submit deploy {spec.cascade.name}@current`"
        )
    refuse_dashboard()
    with Driver(home_of(spec)) as driver:
        return made_and_judged(spec, driver, address=address, verbose=verbose)


def made_and_judged(spec: RunSpec, driver: Driver, *, address: Address | None, verbose: bool) -> Summary:
    """The same, by the only driver of the run."""
    if address:
        refuse_taken(address, driver.home.here)
    way = way_of(spec, driver.home)
    look_ahead(spec, way)
    if not joins_cluster():
        announce(spec, this_machine())
        take_down(driver.home.here)
    home = driver.opened()
    keep(spec, home)
    with tracked_run(home) as tracking:
        with ray_cluster(verbose=verbose):
            if joins_cluster():
                spec = bound(spec, announce(spec, joined()))
                take_down(home.here)
            made = run_pipeline(spec, run=home, tracked=tracking)
        scores, url = judged_before(home, made, way) or {}, ""
        left = left_to_do(way, scores, stays=address is not None, on_cluster=joins_cluster())
        if left.serve:
            with endpoint(home.here, made.cascade.fetched(), address) as url:
                scores = judged(home, url, way) if left.judge else scores
        facts = concluded(home, spec, made, way, scores, tracking.journal)
    facts |= {"mlflow": tracking.book.page()}  # now that the server has been told all, if it is there
    return Summary(facts, told(home, facts, way, url if address else ""))


def take_down(run: Path) -> None:
    """Stop the endpoint that an earlier start left running: this start, accepted by now, needs the room."""
    if was := stop_endpoint(run):
        log.info("the endpoint at %s, left by an earlier start, is stopped", was)


@contextmanager
def tracked_run(home: Home) -> Iterator[Tracked]:
    """The run in MLflow, on the server and in the experiment of this environment, tagged with its code."""
    uri = tracking_uri() or ""
    with tracked(home, uri=uri, experiment=experiment(), stopped=TOLD_TO_STOP) as tracking:
        tracking.journal.tags(source_tags())
        yield tracking


class Left(NamedTuple):
    """What is left to do with a finished cascade."""

    serve: bool
    judge: bool


def left_to_do(way: Way, before: dict[str, Any], *, stays: bool, on_cluster: bool) -> Left:
    """Whether to serve a finished cascade, and to judge it.

    Args:
        way: How it is to be judged.
        before: Its scores by an earlier start; empty: none that count.
        stays: Whether the endpoint is to be left running.
        on_cluster: Whether Serve is that of a cluster: what it serves there stays.
    """
    judge = way.possible and not before and not on_cluster
    return Left(serve=judge or (stays and not on_cluster), judge=judge)


def concluded(
    home: Home, spec: RunSpec, made: RunResult, way: Way, scores: dict[str, Any], journal: Journal
) -> dict[str, Any]:
    """Write a run's summary, and its report unless an earlier start has; returns the facts of summary.json.

    Raises:
        UnjudgedError: Pictures did not come; everything else is written.
    """
    shown = home.facts("summary.json")
    facts = write_summary(home, spec, made, way, scores)
    known = all(shown.get(name) == facts[name] for name in ("digest", "evaluation", way.by))
    if not known or not home.has("report.html") or not told_scores(journal, facts, way):
        report(home, spec, journal, facts, way)
        facts = write_summary(home, spec, made, way, scores)  # with the seconds of the report
    remedy = f"see {home.at('evaluation').address} and run the same command again to ask for them all"
    refuse_parts(scores, remedy)
    return facts


def home_of(spec: RunSpec) -> Home:
    """Where a run of this name lives."""
    return Home.of(f"{runs()}/{spec.name}")


def announce(spec: RunSpec, nodes: list[Node]) -> Plan:
    """Show the plan of a run, and refuse it if it cannot fit.

    Raises:
        PlanError: It cannot.
    """
    plan = with_rooms(judged_plan(spec, nodes), spec)
    for line in plan_text(plan).splitlines():
        log.info("%s", line)
    refuse(plan)
    return plan


def with_rooms(plan: Plan, spec: RunSpec) -> Plan:
    """The plan of a run in a store, with the free disk of each machine that keeps files of it meanwhile.

    If this process has joined a cluster, these are the cluster's nodes that are up; if not, this machine.  A
    run in a directory keeps no files elsewhere: its plan is returned as it is.
    """
    if not is_address(plan.run):
        return plan
    names = written(spec)
    if joins_cluster():
        return plan._replace(rooms=tuple(rooms_everywhere(plan.run, names)))
    return plan._replace(rooms=tuple(Room(node, free_for(plan.run, names)) for node in plan.nodes))


def bound(spec: RunSpec, plan: Plan) -> RunSpec:
    """A run as it is given to Ray: bound to the plan where nodes are started on demand, else as it is."""
    return as_planned(spec, plan) if node_groups() else spec


def as_planned(spec: RunSpec, plan: Plan) -> RunSpec:
    """A run whose stages ask for what the plan found them to need.

    Ray itself does not know the nodes yet that a cluster starts on demand: a stage that leaves use_gpu open
    would be trained without a GPU.
    """
    planned = {one.spec.name: one for one in plan.stages}
    stages = []
    for stage in spec.stages:
        found = planned[stage.name]
        stages.append(stage.but(use_gpu=found.gpu, resources=stage.resources.but(cpus=found.cpus)))
    return spec.with_stages(stages)


def rehearsed(spec: RunSpec, stage: str = "") -> Plan:
    """The plan of a run, or of one of its stages, for --dry-run: on the cluster at RAY_ADDRESS, or here.

    Raises:
        ValueError: A parent is missing, or there is no such stage.
        MissingShardError: Shards are missing, and so is what would be prepared from them.
    """
    spec = only(spec, stage) if stage else spec
    if spec.shapes is None:
        located_or_done(spec.pairs)
    plan = judged_plan(spec, nodes_of())
    return plan if joins_cluster() else with_rooms(plan, spec)  # no cluster is given anything to do


def judged_plan(spec: RunSpec, nodes: list[Node]) -> Plan:
    """The plan of a run, with how far each of its stages is.

    Raises:
        ValueError: A parent, or a file that a stage names, is missing.
    """
    home = home_of(spec)
    return plan_of(spec, nodes, run=home.address, standing=standings(spec, home))


def only(spec: RunSpec, stage: str) -> RunSpec:
    """A run of one stage alone, on parents that exist."""
    return spec.with_stages([spec.stage(stage)])


@contextmanager
def endpoint(run: Path, cascade: Path, address: Address | None) -> Iterator[str]:
    """A server for the cascade while inside; it stays afterwards if an address is given."""
    try:
        yield start_endpoint(run, cascade, address or free_address())
    except BaseException:
        stop_endpoint(run)
        raise
    if address is None:
        stop_endpoint(run)


def judged_before(home: Home, made: RunResult, way: Way) -> dict[str, Any] | None:
    """The scores of an earlier start, if they are whole, of this cascade and judged in this way."""
    facts = home.facts("summary.json")
    if (facts.get("digest"), facts.get("evaluation")) == (made.digest, way.fingerprint()):
        scores = facts.get(way.by) or {}
        return scores if scores and whole(scores) else None
    return None


def judged(home: Home, url: str, way: Way) -> dict[str, Any]:
    """The scores of the cascade served there; the pictures stay in the run directory."""
    log.info("judging %d pictures painted by %s", way.spec.captions, url)
    with timed(home, "evaluation", "total"):
        scores = judge_and_keep(url, way, home, "evaluation")
    home.send("evaluation")
    return scores


def write_summary(
    home: Home, spec: RunSpec, made: RunResult, way: Way, scores: dict[str, Any]
) -> dict[str, Any]:
    """Replace summary.json as a whole; its scores stand under the name of the judge.

    Without scores, those of the same cascade that somebody has recorded meanwhile stay.
    """
    before = home.facts("summary.json")
    same = (before.get("digest"), before.get("evaluation")) == (made.digest, way.fingerprint())
    facts = {
        "run": spec.name,
        way.by: scores or (before.get(way.by, {}) if same else {}),
        "seconds": seconds_of(home),
        "data": data_of(home, spec).address,
        "bundle": made.cascade.address,
        "digest": made.digest,
        "stages": {name: home.at(f"{name}/bundle").address for name in made.bundles},
        "evaluation": way.fingerprint(),
        "report": home.at("report.html").address,
    }
    home.write("summary.json", json.dumps(facts, indent=2))
    return facts


def data_of(home: Home, spec: RunSpec) -> Home:
    """The prepared data: within the run where the run makes it, else where pairs.destination says."""
    return home.at("data/prepared") if spec.shapes is not None else Home.of(spec.pairs.destination)


def report(home: Home, spec: RunSpec, journal: Journal, facts: dict[str, Any], way: Way) -> None:
    """Write the page, then log it and the scores to MLflow; the model's line is last, see `told_scores`."""
    with timed(home, "report", "total"):
        gather(home, spec)
        path = write_report(home.here, prompts=prompts_of(spec))
    home.send("report.html")
    for name in SHEETS:
        if (home.here / f"{name}.png").exists():
            home.send(f"{name}.png")
            journal.picture(name, f"{name}.png", 0)
    if whole(facts[way.by]):
        shares = {f"{way.by}/{name}": it for name, it in facts[way.by].items() if isinstance(it, float)}
        journal.log(shares, 0)
    for file in (path.name, "summary.json"):
        journal.artifact(file)
    journal.model(spec.cascade.name, home.at("cascade").address, alias=CURRENT, tags=version_tags(facts, way))


def told_scores(journal: Journal, facts: dict[str, Any], way: Way) -> bool:
    """Whether an earlier start has written all of its report into the journal: the line of the model too."""
    tags = version_tags(facts, way)
    return any(entry.kind == "model" and entry.value["tags"] == tags for entry in entries(journal.path))


def version_tags(facts: dict[str, Any], way: Way) -> dict[str, str]:
    """Tags of a registered version."""
    return {"bundle_sha256": facts["digest"]} | score_tags(way, facts[way.by])


def gather_data(home: Home, spec: RunSpec) -> None:
    """Fetch the parts of prepared data that the page shows, if the data are in a store."""
    data = Home.of(data_of(home, spec).address)
    if data.stored:
        shown = {*last_parts(data, SHOWN), *last_parts(data, SHOWN, HELD_OUT)}
        data.fetch(MANIFEST, *sorted(shown))


def gather(home: Home, spec: RunSpec) -> None:
    """Fetch from a store what the report needs and this machine may lack: data, cascade, journals, grids."""
    gather_data(home, spec)
    if not home.stored:
        return
    home.at("cascade").fetched()
    for stage in spec.stages:
        grids = home.at(f"{stage.name}/samples")
        home.fetch(f"{stage.name}/{JOURNAL}", f"{stage.name}/{MADE_OF}")
        grids.fetch(*grids.names())


def prompts_of(spec: RunSpec, count: int = 16) -> list[str]:
    """Captions for the report, some of every judged group; none of own data: the report finds them itself."""
    if spec.shapes is None:
        return []
    asked = spec.evaluation.cases()
    step = max(1, len(asked) // count)
    return [case.caption for case in asked[::step]][:count]


def told(home: Home, facts: dict[str, Any], way: Way, url: str) -> str:
    """The scores, and where everything is, for people."""
    scores, seconds = facts[way.by], facts["seconds"]
    lines = [
        f"{'painted right:' if way.by == 'oracle' else 'judged:       '} {verdict_of(way, scores)}",
        f"seconds:       {seconds['total']:,.0f} in all",
        f"cascade:       {facts['bundle']}",
        f"report:        {facts['report']}",
    ]
    if scores:
        lines.append(f"pictures:      {home.at('evaluation').address}")
    if facts["mlflow"]:
        lines.append(f"mlflow:        {facts['mlflow']}")
    if not scores:
        own = f" --data {way.own.data} --judge {way.own.clip}" if way.own else ""
        how = f"to judge it:   deploy it, then `ddiff eval --url http://HOST:PORT{own}`"
        lines += [how] if way.possible else []
    if url:
        body = '{"prompt": "a red circle above a small blue square"}'
        call = f"curl {url}/v1/images/generations -H content-type:application/json -d '{body}'"
        lines += [f"endpoint:      {url}, until `ddiff stop --run {home.here}`", f"try:           {call}"]
    return "\n".join(lines)
