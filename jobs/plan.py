"""The plan of a run, shown before anything starts: what it needs, in memory, devices and disk."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Any, NamedTuple

from dd_core.addresses import is_address
from jobs.disk import data_on_disk, written
from jobs.nodes import Node, Room, amount, free_disk, has_labels, node_text, places, taken
from workflows.estimate import Need, needs
from workflows.run_spec import RunSpec, in_order
from workflows.standing import Standing
from workflows.storage import Home
from workflows.train_spec import TrainSpec, cpu_share

PROCESS_BYTES = 1_220_000_000
"""Of a worker before it has a model: Python, torch, Ray.  Measured on four stages of the smoke and the
demo recipe: 1.10e9 to 1.22e9 bytes resident beside what workflows.estimate adds up (torch 2.15, CPU)."""
SENT_COPIES = 3
"""Of its share of a checkpoint, in the machine's memory while a worker on a GPU writes it: the tensors, and
twice the file that safetensors makes of them."""


class StagePlan(NamedTuple):
    """One stage of a plan."""

    spec: TrainSpec
    need: Need
    """Of one worker."""
    gpu: bool
    cpus: float

    @property
    def memory_bytes(self) -> int:
        """Memory of the machine that one worker needs."""
        trains = self.need.gradients > 0
        sent = SENT_COPIES * self.need.state // self.spec.num_workers if trains else 0
        inside = self.need.bundle + self.need.frozen + sent if self.gpu else self.need.total
        return PROCESS_BYTES + inside

    @property
    def gpu_bytes(self) -> int:
        """Memory of a GPU that one worker needs."""
        return self.need.total_on_gpu if self.gpu else 0

    @property
    def reserved_bytes(self) -> int:
        """Memory of the machine that Ray reserves for one worker; at least what it needs."""
        return max(self.memory_bytes, round((self.spec.resources.memory_gib or 0) * 2**30))

    @property
    def scratch_bytes(self) -> int:
        """Most disk that its workers use on a node if the run is in a store.

        The checkpoint that it resumes from, the one that is being written, parents, and its bundle.
        """
        return 2 * self.need.state + self.need.frozen + self.need.bundle

    @property
    def size(self) -> dict[str, float]:
        """Of one worker, for `places`."""
        return {"cpus": self.cpus, "gpus": float(self.gpu), "memory_bytes": float(self.reserved_bytes)}

    def may_lie_on(self, node: Node) -> bool:
        """Whether a worker may be placed there."""
        return has_labels(node, self.spec.resources.labels) and places([node], **self.size) > 0

    @property
    def checkpoints(self) -> int:
        """How many lie on disk at most, the one being written included."""
        budget, kept = self.spec.budget, self.spec.checkpoints_kept + 1
        for_ever = budget.steps // self.spec.keep_every if self.spec.keep_every else 0
        others = for_ever if self.spec.keep_every % budget.checkpoint_every else 0
        return min(-(-budget.steps // budget.checkpoint_every) + others, kept + for_ever)

    def arithmetic(self) -> str:
        """What one worker's memory is made of."""
        need, images = self.need, self.spec.micro_batch_size or self.spec.batch_size // self.spec.num_workers
        parts = {
            "process": 0 if self.gpu else PROCESS_BYTES,
            "weights, optimizer and averages": need.state,
            "gradients": need.gradients,
            "parents": need.frozen,
            f"activations of {images} images": need.activations_on_gpu if self.gpu else need.activations,
        }
        return " + ".join(f"{amount(value)} {name}" for name, value in parts.items() if value)


class Plan(NamedTuple):
    """What a run will take, and what there is."""

    run: str
    stages: tuple[StagePlan, ...]
    nodes: tuple[Node, ...]
    at_once: int
    """How many stages may train side by side."""
    disk: dict[str, int]
    """What -> bytes on disk at the end."""
    free: int | None
    """Bytes free for it; None: a store, or a directory of other machines, which do not say."""
    standing: Mapping[str, Standing] = MappingProxyType({})
    """How far each stage is; empty if that was not looked up."""
    rooms: tuple[Room, ...] = ()
    """For files of a run in a store, on the machines that are up; empty if they were not asked."""
    source: str = ""
    """What it trains on, and that its size is not in `disk` if it is not."""

    @property
    def left(self) -> tuple[StagePlan, ...]:
        """The stages that are still to train, all of them if it was not looked up."""
        return tuple(s for s in self.stages if self.standing.get(s.spec.name, Standing("new")).word != "done")

    @property
    def scratch_bytes(self) -> int:
        """Most disk that a run in a store uses on one node; see workflows.storage."""
        return sum(self.scratch().values()) if is_address(self.run) else 0

    def scratch(self, node: Node | None = None) -> dict[str, int]:
        """What -> most bytes on the disk of a node if the run is in a store; None: one that takes all stages.

        That of the stages that may train there at once, and of every bundle that was fetched before.
        """
        some = [stage for stage in self.left if stage.may_lie_on(node)] if node else self.stages
        together = [(), *((stage,) for stage in some), *groups(self.stages, self.at_once)]
        here = [tuple(stage for stage in group if stage in some) for group in together]
        most = max(here, key=lambda group: sum(stage.scratch_bytes for stage in group))
        found = {f"{one.spec.name} (two checkpoints, parents, bundle)": one.scratch_bytes for one in most}
        return found | {"bundles of all stages": sum(stage.need.bundle for stage in self.stages)}

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": self.run,
            "source": self.source,
            "nodes": [{**node._asdict(), "labels": dict(node.labels)} for node in self.nodes],
            "stages": {
                plan.spec.name: stage_facts(plan) | standing_facts(self.standing.get(plan.spec.name))
                for plan in self.stages
            },
            "at_once": self.at_once,
            "disk_bytes": self.disk | {"total": sum(self.disk.values())},
            "free_bytes": self.free,
            "scratch_bytes_per_node": self.scratch_bytes,
            "scratch_free_bytes": {room.node.name: room.free for room in self.rooms},
        }


def plan_of(
    spec: RunSpec, nodes: Sequence[Node], *, run: str, standing: Mapping[str, Standing] | None = None
) -> Plan:
    """Work out what a run takes; nothing is started.

    Args:
        spec: The run.
        nodes: Where it would run; none if that is not known yet.
        run: Its directory, or its address in a store.
        standing: How far each stage is, if that was looked up.

    Raises:
        ValueError: A parent is missing or does not fit.
    """
    home = Home.of(run)
    gpus = sum(node.gpus for node in nodes) if nodes else None
    needed = needs(in_order(spec.stages), context_length=spec.pairs.context_length, run=home, gpus=gpus)
    stages = tuple(
        stage_plan(stage, needed[stage.name], nodes, at_once=spec.at_once) for stage in in_order(spec.stages)
    )
    disk = data_on_disk(spec) | {
        "checkpoints": sum(plan.checkpoints * plan.need.state for plan in stages),
        "bundles": 2 * sum(plan.need.bundle for plan in stages),  # of the stage, and in the cascade
    }
    source = spec.source if spec.shapes else f"{spec.source}, of unknown size"
    standing = standing or {}
    stays = {name for name, now in standing.items() if now.word == "again"}
    free = None if home.stored else free_disk(home.here) + taken(home.here, written(spec, stays))
    return Plan(run, stages, tuple(nodes), spec.at_once, disk, free, standing, source=source)


def on(plan: Plan, nodes: Sequence[Node]) -> Plan:
    """The same plan on other nodes."""
    stages = tuple(stage_plan(stage.spec, stage.need, nodes, at_once=plan.at_once) for stage in plan.stages)
    return plan._replace(stages=stages, nodes=tuple(nodes))


def stage_plan(spec: TrainSpec, need: Need, nodes: Sequence[Node], *, at_once: int) -> StagePlan:
    """One stage on these nodes; what the spec leaves open is decided as workflows.training does."""
    gpu = spec.on_gpu(sum(node.gpus for node in nodes))
    share = cpu_share(sum(node.cpus for node in nodes), spec.num_workers, at_once)
    return StagePlan(spec, need, gpu, spec.resources.cpus or share)


def groups(plans: Sequence[StagePlan], at_once: int) -> Iterator[tuple[StagePlan, ...]]:
    """Every set of 2 to at_once stages that may train side by side: none is an ancestor of another."""
    below: dict[str, set[str]] = {}
    for plan in plans:  # parents come first
        parents = [name for name in plan.spec.parents.values() if name in below]
        below[plan.spec.name] = set(parents).union(*(below[name] for name in parents))
    for count in range(2, at_once + 1):
        for group in combinations(plans, count):
            names = {plan.spec.name for plan in group}
            if not any(names & below[name] for name in names):
                yield group


def reserved(group: Sequence[StagePlan]) -> int:
    """Memory of all their workers."""
    return sum(plan.spec.num_workers * plan.reserved_bytes for plan in group)


def stage_facts(plan: StagePlan) -> dict[str, Any]:
    """For programs."""
    spec = plan.spec
    return {
        "kind": spec.stage.kind,
        "parameters": plan.need.parameters,
        "workers": spec.num_workers,
        "cpus_per_worker": plan.cpus,
        "gpus_per_worker": int(plan.gpu),
        "memory_bytes_per_worker": plan.memory_bytes,
        "reserved_bytes_per_worker": plan.reserved_bytes,
        "gpu_bytes_per_worker": plan.gpu_bytes,
        "memory_is": plan.need._asdict(),
        "labels": spec.resources.labels,
        "steps": spec.budget.steps,
        "images": spec.budget.steps * spec.batch_size,
        "checkpoints": plan.checkpoints,
        "checkpoint_bytes": plan.need.state,
    }


def standing_facts(standing: Standing | None) -> dict[str, Any]:
    """How far a stage is, for programs; empty if that was not looked up."""
    if standing is None:
        return {}
    return {"standing": standing.word, "step": standing.step, "because": list(standing.because)}


def told(plan: Plan) -> str:
    """The plan for people: a table, the disk, the nodes."""
    head = ("stage", "parameters", "workers", "memory each", "GPU memory", "steps", "images", "checkpoints")
    rows = [head, *(row(stage) for stage in plan.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(one, widths, strict=True)) for one in rows]
    total = sum(plan.disk.values())
    parts = ", ".join(f"{name} {amount(size)}" for name, size in plan.disk.items() if size)
    place = "a store" if is_address(plan.run) else "a directory of the nodes"
    free = place if plan.free is None else f"{amount(plan.free)} free"
    each = f"; up to {amount(plan.scratch_bytes)} in TMPDIR of each node" if plan.scratch_bytes else ""
    if plan.rooms:
        least = min(plan.rooms, key=lambda room: room.free)
        each += f", of which {least.node.name} has least free: {amount(least.free)}"
    more = f" and {len(plan.nodes) - 4} more" if len(plan.nodes) > 4 else ""
    return "\n".join(
        [
            f"plan of {plan.run}",
            *(line.rstrip() for line in table),
            *(f"{name}: {now.text}" for name, now in plan.standing.items()),
            f"data:  {plan.source}",
            f"disk:  {amount(total)} ({parts}), {free}{each}",
            *together_told(plan),
            f"nodes: {'; '.join(map(node_text, plan.nodes[:4]))}{more}",
        ]
    )


def together_told(plan: Plan) -> list[str]:
    """A line on the largest set of stages that may train side by side, if there is one."""
    most = max(groups(plan.stages, plan.at_once), key=reserved, default=())
    names = " and ".join(one.spec.name for one in most)
    return [f"at once: {plan.at_once} stages, at most {amount(reserved(most))} ({names})"] if most else []


def row(plan: StagePlan) -> tuple[str, ...]:
    """One line of the table."""
    spec = plan.spec
    labels = "".join(f" {name}={value}" for name, value in spec.resources.labels.items())
    return (
        spec.name,
        f"{plan.need.parameters:,}",
        f"{spec.num_workers} x {plan.cpus:g} CPU{' + 1 GPU' if plan.gpu else ''}{labels}",
        amount(plan.reserved_bytes),
        amount(plan.gpu_bytes) if plan.gpu else "-",
        f"{spec.budget.steps:,}",
        f"{spec.budget.steps * spec.batch_size:,}",
        f"{plan.checkpoints} x {amount(plan.need.state)}",
    )
