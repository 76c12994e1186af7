"""`ddiff train`: one stage of a run, on the run's data and on the parents that are there; again to resume."""

from typing import Any

from jobs.config import keep
from jobs.driver import Driver
from jobs.environment import joins_cluster, refuse_dashboard
from jobs.nodes import joined, this_machine
from jobs.planned_run import announce, bound, home_of, only
from jobs.ray_session import ray_cluster
from jobs.summary import Summary
from jobs.tracked_run import tracked_run
from workflows.parents import parent_home
from workflows.pipeline import run_stage, seconds_of
from workflows.run_spec import RunSpec
from workflows.storage import Home


def train_one(spec: RunSpec, stage: str, *, verbose: bool) -> Summary:
    """Train one stage of a run, or resume it.

    Args:
        spec: The whole run.
        stage: Its name there.
        verbose: Show what Ray says.

    Raises:
        ValueError: No such stage, or a parent is missing; or RAY_ADDRESS is a dashboard.
        PlanError: It cannot fit; nothing has been started.
        AlreadyRunningError: Another process makes this run; nothing has been started.
        The errors of run_stage.
    """
    refuse_dashboard()
    with Driver(home_of(spec)) as driver:
        for role in spec.stage(stage).parents:
            parent_home(spec.stage(stage), role, driver.home)  # before anything is started
        one = only(spec, stage)
        if not joins_cluster():
            announce(one, this_machine())
        home = driver.opened()
        keep(spec, home)
        with tracked_run(home) as tracking, ray_cluster(verbose=verbose):
            if joins_cluster():
                one = bound(one, announce(one, joined()))
            run_stage(one, stage, run=home, tracked=tracking)
    return summary_of(home, spec, stage, mlflow=tracking.book.page())


def summary_of(home: Home, spec: RunSpec, stage: str, *, mlflow: str) -> Summary:
    """How long a stage took, over all starts, and where everything of it lies.

    Args:
        home: Of the run.
        spec: The run.
        stage: That has been trained.
        mlflow: The page of the run; empty if nobody serves it.
    """
    seconds, checkpoints = seconds_of(home).get(stage, 0.0), home.at(f"{stage}/checkpoints")
    places = {
        "bundle": home.at(f"{stage}/bundle").address,
        "checkpoints": checkpoints.address if checkpoints.names() else "",  # a published CLIP has none
        "directory": home.address,
        "mlflow": mlflow,
    }
    lines = [f"{f'{what}:':<14} {place}" for what, place in places.items() if place]
    facts: dict[str, Any] = {"run": spec.name, "stage": stage, "seconds": seconds, **places}
    return Summary(facts, "\n".join([f"{'seconds:':<14} {seconds:,.0f}", *lines]))
