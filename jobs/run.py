"""`ddiff run`: the main job, from nothing to a served, judged and reported cascade; run again to continue.

<run>/summary.json  scores, seconds, addresses: what scripts read
<run>/report.html   what people look at
<run>/endpoint.*    the server left running, with --serve
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jobs.conclusion import concluded, judged_before, told
from jobs.config import keep
from jobs.driver import Driver
from jobs.endpoint import Address, free_address, refuse_taken, start_endpoint, stop_endpoint
from jobs.environment import joins_cluster, refuse_dashboard
from jobs.evaluate import Way, judge_and_keep, look_ahead, way_of
from jobs.nodes import joined, this_machine
from jobs.planned_run import announce, bound, home_of
from jobs.ray_session import ray_cluster
from jobs.summary import Summary
from jobs.tracked_run import tracked_run
from workflows.pipeline import run_pipeline, timed
from workflows.run_spec import RunSpec
from workflows.storage import Home

log = logging.getLogger(__name__)


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


def judged(home: Home, url: str, way: Way) -> dict[str, Any]:
    """The scores of the cascade served there; the pictures stay in the run directory."""
    log.info("judging %d pictures painted by %s", way.spec.captions, url)
    with timed(home, "evaluation", "total"):
        scores = judge_and_keep(url, way, home, "evaluation")
    home.send("evaluation")
    return scores
