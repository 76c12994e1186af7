"""`--dry-run`: what a run will take is shown, and refused where it cannot fit; nothing is started."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from jobs.shell import answer

if TYPE_CHECKING:
    from jobs.plan import Plan
    from jobs.submit import Order
    from workflows.run_spec import RunSpec

log = logging.getLogger(__name__)
ELSEWHERE = "store://of-the-nodes"
"""In place of the storage if DDIFF_STORAGE is set on the nodes only."""


def show_plan(plan: Plan) -> None:
    """Print the plan on stdout, then refuse it if it does not fit.

    Raises:
        PlanError: It cannot fit on the nodes that are known, or on the disk.
    """
    from jobs.fit import refusals, refuse  # noqa: PLC0415
    from jobs.nodes import UNSTARTED, unstarted  # noqa: PLC0415 not needed without --dry-run
    from jobs.plan import told  # noqa: PLC0415

    judged = plan
    if unstarted(plan.nodes):
        log.warning(
            "%s: the stages are compared with the nodes by the job itself, before it starts", UNSTARTED
        )
        judged = plan._replace(stages=())  # the disk alone
    answer(plan.facts() | {"refused": refusals(judged)}, told(plan))
    refuse(judged)


def planned(order: Order, address: str) -> Plan:
    """The plan of a submission, on the nodes that its cluster has; its store is not asked, nor needed.

    Args:
        order: A run, or one of its stages.
        address: Of the dashboard.

    Raises:
        ConfigError: The order is neither a run nor one of its stages.
        ValueError: A parent is missing here, or does not fit.
        DashboardError: The cluster does not answer, or not to us.
    """
    from jobs.config import ConfigError  # noqa: PLC0415
    from jobs.environment import for_the_cluster  # noqa: PLC0415
    from jobs.nodes import seen_from_outside  # noqa: PLC0415
    from jobs.plan import plan_of  # noqa: PLC0415
    from workflows.run_spec import RunSpec  # noqa: PLC0415

    if not isinstance(order.spec, RunSpec) or order.words[0] not in ("run", "train"):
        raise ConfigError(f"--dry-run shows the plan of a run, and {order.words[0]} is none; leave it out")
    place = for_the_cluster().get("DDIFF_STORAGE", ELSEWHERE).rstrip("/")
    one = order.words[1] if order.words[0] == "train" else ""
    spec = up_to(order.spec, one) if one else order.spec
    plan = plan_of(spec, seen_from_outside(address), run=f"{place}/{order.run}")
    plan = plan._replace(free=None)  # the directory is not on this machine
    return plan_of_stage(plan, one) if one else plan


def up_to(spec: RunSpec, stage: str) -> RunSpec:
    """A run cut down to one stage and its ancestors, which are planned too: their bundles are not read."""
    from workflows.run_spec import in_order  # noqa: PLC0415

    needed = {stage}
    for one in reversed(in_order(spec.stages)):
        needed |= set(one.parents.values()) if one.name in needed else set()
    return spec.with_stages([one for one in spec.stages if one.name in needed])


def plan_of_stage(plan: Plan, stage: str) -> Plan:
    """The plan of one stage, out of that of `up_to`: its ancestors count as made before."""
    (one,) = [found for found in plan.stages if found.spec.name == stage]
    disk = {"checkpoints": one.checkpoints * one.need.state, "bundles": one.need.bundle}
    return plan._replace(stages=(one,), disk=disk)
