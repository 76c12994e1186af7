"""`--dry-run`: what a run will take is shown, and refused where it cannot fit; nothing is started."""

import logging

from jobs.nodes import UNSTARTED, unstarted
from jobs.plan import Plan, refusals, refuse, told
from jobs.shell import answer

log = logging.getLogger(__name__)


def show_plan(plan: Plan) -> None:
    """The plan on stdout; one that does not fit ends like any other error.

    Raises:
        PlanError: It cannot fit on the nodes that are known, or on the disk.
    """
    judged = plan
    if unstarted(plan.nodes):
        log.warning(
            "%s: the stages are compared with the nodes by the job itself, before it starts", UNSTARTED
        )
        judged = plan._replace(stages=())  # the disk alone
    answer(plan.facts() | {"refused": refusals(judged)}, told(plan))
    refuse(judged)
