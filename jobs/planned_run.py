"""A run against the nodes that there are: where it lives, what it will take, and what it is bound to."""

import logging

from dd_core.addresses import is_address
from jobs.disk import written
from jobs.environment import joins_cluster, node_groups, runs
from jobs.fit import refuse
from jobs.machines import free_for, rooms_everywhere
from jobs.nodes import Node, Room, nodes_of
from jobs.plan import Plan, plan_of, told
from workflows.prepare import located_or_done
from workflows.run_spec import RunSpec
from workflows.standing import standings
from workflows.storage import Home

log = logging.getLogger(__name__)


def home_of(spec: RunSpec) -> Home:
    """Where a run of this name lives."""
    return Home.of(f"{runs()}/{spec.name}")


def announce(spec: RunSpec, nodes: list[Node]) -> Plan:
    """Show the plan of a run, and refuse it if it cannot fit.

    Raises:
        PlanError: It cannot.
    """
    plan = with_rooms(judged_plan(spec, nodes), spec)
    for line in told(plan).splitlines():
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
