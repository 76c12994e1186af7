"""Whether a plan can be carried out on the nodes that there are; if not, why, with the arithmetic."""

from collections.abc import Iterator, Sequence

from jobs.nodes import Node, amount, has_labels, left_on, node_text, places
from jobs.plan import Plan, StagePlan, groups, reserved

READER_CPUS = 0.25
"""CPUs of a task that reads data; stages that hold all CPUs would wait for it for ever."""


class PlanError(ValueError):
    """The run cannot fit; the message holds the arithmetic."""


def refusals(plan: Plan) -> list[str]:
    """Why the plan cannot be carried out, one line each; none if it can.  What is done needs nothing."""
    alone = [line for stage in plan.left for line in stage_refusals(stage, plan.nodes)]
    found = alone or list(group_refusals(plan))
    total = sum(plan.disk.values())
    if plan.free is not None and total > plan.free:
        parts = " + ".join(f"{amount(size)} {name}" for name, size in plan.disk.items() if size)
        found.append(
            f"disk: {plan.run} will hold {amount(total)} = {parts}, and {amount(plan.free)} are free; "
            "free some, keep fewer checkpoints (checkpoints_kept), set DDIFF_STORAGE or, where it lies on a "
            "claim of Kubernetes, raise claim_gib"
        )
    return [*found, *room_refusals(plan)]


def room_refusals(plan: Plan) -> Iterator[str]:
    """Which machines have no room for the files of a run in a store."""
    for node, free in plan.rooms:
        parts = plan.scratch(node)
        if (needed := sum(parts.values())) > free:
            what = " + ".join(f"{amount(size)} {name}" for name, size in parts.items())
            yield (
                f"disk: {node.name} has {amount(free)} free in its TMPDIR, and {plan.run} may need "
                f"{amount(needed)} there = {what}; free some, or set its TMPDIR to a larger disk"
            )


def stage_refusals(plan: StagePlan, nodes: Sequence[Node]) -> Iterator[str]:
    """Why a stage cannot run."""
    name, asked = plan.spec.name, plan.spec.resources
    if asked.memory_gib and plan.memory_bytes > asked.memory_gib * 2**30:
        what = "process and copies of weights" if plan.gpu else plan.arithmetic()
        yield (
            f"{name}: a worker needs {amount(plan.memory_bytes)} = {what}, more than "
            f"resources.memory_gib {asked.memory_gib:g}; raise it or set micro_batch_size"
        )
        return
    if asked.gpu_memory_gib and plan.gpu_bytes > asked.gpu_memory_gib * 2**30:
        batchless = plan.gpu_bytes - plan.need.activations_on_gpu
        fix = "set micro_batch_size or more num_workers"
        if batchless > asked.gpu_memory_gib * 2**30:
            fix = "no batch is small enough, as each worker holds the whole network: make it smaller, or "
            fix += "ask for GPUs of more memory"
        yield (
            f"{name}: a worker needs {amount(plan.gpu_bytes)} of its GPU = {plan.arithmetic()}, more than "
            f"resources.gpu_memory_gib {asked.gpu_memory_gib:g}; {fix}"
        )
        return
    fitting = [node for node in nodes if has_labels(node, asked.labels)]
    if (room := places(fitting, **plan.size)) < plan.spec.num_workers:
        each = f"{plan.cpus:g} CPU{', 1 GPU' if plan.gpu else ''} and {amount(plan.reserved_bytes)}"
        reason = "" if plan.gpu or plan.reserved_bytes > plan.memory_bytes else f" = {plan.arithmetic()}"
        found = f"no node of {len(nodes)} has the labels {asked.labels}; set resources.labels, or bring such"
        if there := "; ".join(map(node_text, fitting[:4])):
            found = f"there is room for {room} on {there}; "
            found += "lower num_workers, set micro_batch_size, or bring larger"
        yield f"{name}: {plan.spec.num_workers} workers of {each} each{reason}; {found} nodes"
    elif not fit_together([plan], nodes):
        yield (
            f"{name}: {plan.spec.num_workers} workers of {plan.cpus:g} CPU each leave no {READER_CPUS:g} CPU "
            f"for the data reader on {'; '.join(map(node_text, nodes[:4]))}; lower resources.cpus or "
            "num_workers, or bring larger nodes"
        )


def group_refusals(plan: Plan) -> Iterator[str]:
    """Why stages that may train side by side do not fit together; told of the set that needs most memory.

    Too few GPUs are no reason: those stages take turns.
    """
    bad = [group for group in groups(plan.left, plan.at_once) if not fit_together(group, plan.nodes)]
    if not bad:
        return
    worst = max(bad, key=reserved)
    parts = " + ".join(
        f"{one.spec.num_workers} x {amount(one.reserved_bytes)} and {one.cpus:g} CPU {one.spec.name}"
        for one in worst
    )
    there = "; ".join(map(node_text, plan.nodes[:4]))
    yield (
        f"at_once {plan.at_once}: {amount(reserved(worst))} = {parts} may be needed at a time, with "
        f"{READER_CPUS:g} CPU for the data reader, and there is not so much room on {there}; lower at_once, "
        "num_workers or resources, or bring larger nodes"
    )


def fit_together(group: Sequence[StagePlan], nodes: Sequence[Node]) -> bool:
    """Whether all workers fit at once, placed largest first, and a reading task after them."""
    if sum(plan.spec.num_workers * plan.gpu for plan in group) > sum(node.gpus for node in nodes):
        return True  # they wait for each other's GPUs
    left = list(nodes)
    for plan in sorted(group, key=lambda plan: plan.reserved_bytes, reverse=True):
        for _ in range(plan.spec.num_workers):
            place = next((n for n, node in enumerate(left) if plan.may_lie_on(node)), None)
            if place is None:
                return False
            left[place] = left_on(left[place], **plan.size)
    return places(left, cpus=READER_CPUS, gpus=0, memory_bytes=0) > 0


def refuse(plan: Plan) -> None:
    """Refuse a plan that cannot be carried out.

    Raises:
        PlanError: Every reason, with its arithmetic.
    """
    if found := refusals(plan):
        raise PlanError("the plan does not fit: " + " | ".join(found))
