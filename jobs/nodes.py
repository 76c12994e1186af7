"""Where work can run: this machine, the nodes of a cluster, or the nodes it may grow to."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, TypeAdapter

from dd_core.spec import Spec
from jobs import environment, ray_session
from jobs.dashboard import Dashboard, is_dashboard
from workflows import cpus

MEMINFO = Path("/proc/meminfo")


class Node(NamedTuple):
    """A node and all its resources, in use or not."""

    name: str
    cpus: float
    gpus: float
    memory_bytes: float
    labels: Mapping[str, str] = {}


class Room(NamedTuple):
    """The disk where a machine makes and fetches the files of a run in a store."""

    node: Node
    free: int
    """Bytes free for them, those that the run has there already included."""


class NodeGroup(Spec):
    """Identical nodes that a cluster starts on demand."""

    name: str
    count: int = Field(ge=0)
    """At most."""
    cpus: float
    gpus: float = 0
    memory_bytes: int
    labels: dict[str, str] = Field(default_factory=dict)

    def nodes(self) -> list[Node]:
        """All nodes that the group may grow to."""
        return [
            Node(f"{self.name}-{number}", self.cpus, self.gpus, self.memory_bytes, self.labels)
            for number in range(self.count)
        ]


def this_machine() -> list[Node]:
    """The node that a Ray of our own would have, with as many CPUs as that Ray counts.

    Its memory is what is available now, less the object store.
    """
    import torch  # noqa: PLC0415 a cluster is asked for its GPUs, this machine by torch

    memory = max(0, available_memory() - ray_session.object_store_bytes())
    return [Node("this machine", ray_session.own_cpus(), torch.cuda.device_count(), memory)]


def nodes_of() -> list[Node]:
    """The nodes of the cluster at RAY_ADDRESS, or this machine where none is named."""
    address = environment.cluster_address()
    if not address:
        return this_machine()
    if is_dashboard(address):
        return seen_from_outside(address)
    with ray_session.ray_cluster():
        return joined()


def available_memory(own_group: Path = cpus.OWN_GROUP, root: Path = cpus.CGROUPS) -> int:
    """Bytes of memory that are available without swapping, within the limits of this container.

    Args:
        own_group: Where the kernel says which control group the process is in.
        root: Where the kernel lists control groups, of version 2 or 1.
    """
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    found = [int(lines["MemAvailable"].split()[0]) * 1024]
    for group in cpus.groups(own_group, root):
        found += left_in(group, "memory.max", "memory.current", "inactive_file")
    found += left_in(root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return max(0, min(found))


def left_in(group: Path, limit: str, used: str, cached: str) -> list[int]:
    """Bytes that a control group may still take, its inactive page cache included, which is freed first.

    Args:
        group: Its directory.
        limit: Name of the file with its limit.
        used: Name of the file with what it has taken.
        cached: Name of the line in its memory.stat with that page cache.

    Returns:
        A list of one number; empty if there is no such group, or no limit to it.
    """
    most, taken = cpus.text_of(group / limit), cpus.text_of(group / used)
    if not (most.isdigit() and taken.isdigit()):  # "max"
        return []
    stat = dict(line.split() for line in cpus.text_of(group / "memory.stat").splitlines())
    return [int(most) - int(taken) + int(stat.get(cached, 0))]


def joined() -> list[Node]:
    """The nodes of the Ray that this process has joined; with an autoscaler, those it may start as well."""
    import ray  # noqa: PLC0415

    alive = [
        node_of(node["NodeManagerAddress"], node["Resources"], node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return grown(alive)


def seen_from_outside(address: str) -> list[Node]:
    """The same, asked over HTTP; nothing is joined.

    Raises:
        DashboardError: It does not answer, or not to us.
    """
    with Dashboard(address) as dashboard:
        found = dashboard.get("/api/v0/nodes", {"detail": "1", "limit": "10000"})["data"]["result"]["result"]
    alive = [
        node_of(node["node_ip"], node["resources_total"], node.get("labels") or {})
        for node in found
        if node["state"] == "ALIVE"
    ]
    return grown(alive)


def node_of(name: str, resources: Mapping[str, Any], labels: Mapping[str, str]) -> Node:
    """A node, from what Ray reports of it."""
    return Node(
        name,
        float(resources.get("CPU", 0)),
        float(resources.get("GPU", 0)),
        float(resources.get("memory", 0)),
        dict(labels),
    )


def grown(alive: Sequence[Node]) -> list[Node]:
    """The nodes alive, or all that the cluster's groups may grow to if it starts nodes on demand."""
    groups = environment.node_groups()
    if not groups:
        return list(alive)
    found = TypeAdapter(list[NodeGroup]).validate_python(json.loads(groups))
    return [node for group in found for node in group.nodes()]


def unstarted(nodes: Sequence[Node]) -> bool:
    """Whether no node has CPUs: a cluster that starts nodes on demand has a head alone at first.

    What it may grow to is in DDIFF_NODE_GROUPS of its pods, which cannot be seen from outside.
    """
    return not any(node.cpus for node in nodes)


UNSTARTED = "no node of the cluster computes yet, and which it starts on demand is not known from here"


def has_labels(node: Node, asked: Mapping[str, str]) -> bool:
    """Whether a node's labels are as asked, in the words of Ray's selectors: a, !a, in(a, b), !in(a, b)."""
    return all(label_fits(node.labels.get(name), choice) for name, choice in asked.items())


def label_fits(value: str | None, choice: str) -> bool:
    """One label against one selector."""
    negated, choice = choice.startswith("!"), choice.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", choice)
    allowed = [part.strip() for part in several[1].split(",")] if several else [choice]
    return (value in allowed) is not negated


def places(nodes: Sequence[Node], *, cpus: float, gpus: float, memory_bytes: float) -> int:
    """How many workers of this size the nodes take together; each lies on one node."""
    return sum(places_on(node, cpus=cpus, gpus=gpus, memory_bytes=memory_bytes) for node in nodes)


def places_on(node: Node, *, cpus: float, gpus: float, memory_bytes: float) -> int:
    """How many fit on one node."""
    pairs = [(node.cpus, cpus), (node.gpus, gpus), (node.memory_bytes, memory_bytes)]
    return min(int(has / wants + 1e-9) for has, wants in pairs if wants)


def left_on(node: Node, *, cpus: float, gpus: float, memory_bytes: float) -> Node:
    """What a worker of this size leaves of a node."""
    return node._replace(
        cpus=node.cpus - cpus, gpus=node.gpus - gpus, memory_bytes=node.memory_bytes - memory_bytes
    )


def free_disk(directory: Path) -> int:
    """Bytes free where a directory is or will be."""
    while not directory.exists():
        directory = directory.parent
    stats = os.statvfs(directory)
    return stats.f_bavail * stats.f_frsize


def taken(directory: Path, names: Sequence[str]) -> int:
    """Bytes that the run has written there before: the plan counts them too."""
    files = [path for name in names for path in (directory / name).rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


def node_text(node: Node) -> str:
    """What a node has, in a few words."""
    gpus = f", {node.gpus:g} GPU" if node.gpus else ""
    labels = "".join(f", {name}={value}" for name, value in shown(node.labels).items())
    return f"{node.name}: {node.cpus:g} CPU{gpus}, {amount(node.memory_bytes)}{labels}"


def shown(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels worth showing: without the node id, which Ray adds to every node."""
    return {name: value for name, value in labels.items() if name not in ("ray.io/node-id",)}


def amount(size: float) -> str:
    """1536 MiB -> 1.5 GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
