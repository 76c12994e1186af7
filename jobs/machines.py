"""The state of a machine: its GPU, its disk, its clock; on a cluster every node is asked."""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jobs.failures import cause_of
from jobs.nodes import Room, amount, free_disk, node_of, taken
from workflows.storage import Home

log = logging.getLogger(__name__)
State = Literal["ok", "warn", "fail"]
DRIVER = Path("/proc/driver/nvidia/version")
SPARE_BYTES = 5 * 2**30
"""Less free disk than this is worth a warning where no recipe says what it needs."""
SKEW_WARN_S, SKEW_FAIL_S = 5.0, 600.0
"""Stores with signed requests refuse from 15 minutes on; times in logs mislead long before."""
LOOK_S = 120.0
"""How long a node may take to look at itself, the start of a process and the import of torch included."""
RESTART = "look at what its Ray has logged (ray logs), and start that again"


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    state: State
    says: str
    fix: str = ""
    """What to do, where there is something to do."""


class Seen(NamedTuple):
    """What a node reports."""

    gpu: list[Finding]
    scratch: str
    """Its directory for files that are made or fetched there."""
    free: int
    """Bytes free on the disk of `scratch`."""
    skew_s: float = 0.0
    """How far its clock is ahead of ours."""


class Machine:
    """The machine that this process runs on."""

    def seen(self) -> Seen:
        """Its GPU and its disk."""
        place = tempfile.gettempdir()
        return Seen(list(gpu()), place, free_disk(Path(place)))

    def now(self) -> float:
        """Its clock, in seconds since 1970."""
        return time.time()


def gpu() -> Iterator[Finding]:
    """Whether torch can use the GPU that is here."""
    import torch  # noqa: PLC0415 the other checks do not need it

    from dd_core.compiled import compiled  # noqa: PLC0415 nor torch
    from dd_core.nets import norm  # noqa: PLC0415

    if not DRIVER.exists():
        says = "no NVIDIA driver on this machine: what runs here runs on the CPU"
        if compiled(norm.SOURCE):
            yield Finding("gpu", "ok", says)
        elif sys.platform != "linux":  # as dd_core.compiled has it
            yield Finding("gpu", "ok", f"{says}, where training takes half as long again as on Linux")
        else:
            fix = "apt-get install gcc libc6-dev"
            yield Finding("gpu", "warn", f"{says}, where training takes half as long again without gcc", fix)
        return
    driver = DRIVER.read_text().splitlines()[0].split("  ")
    version = next((part.strip() for part in driver[1:] if part.strip()), "?")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch has no CUDA"
        yield Finding(
            "gpu",
            "fail",
            f"driver {version} is here, but torch sees no GPU: {built}",
            "install a torch whose CUDA the driver knows, or a newer driver; look at CUDA_VISIBLE_DEVICES",
        )
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        total = float(torch.ones(8, device=f"cuda:{number}").sum())
        state: State = "ok" if total == 8 else "fail"
        says = f"{about.name}, {amount(about.total_memory)}, driver {version}, CUDA {torch.version.cuda}"
        yield Finding("gpu", state, says, "" if total == 8 else "it adds wrongly: take it out of service")


def seen_everywhere() -> dict[str, Seen | str]:
    """Node -> its report, or why there is none, of the Ray that this process has joined."""
    import ray  # noqa: PLC0415 seconds, and for a cluster alone
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    looking = ray.remote(num_cpus=0, max_restarts=0)(Machine)
    machines: dict[str, Any] = {}
    for name, node in up().items():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        machines[name] = looking.options(scheduling_strategy=there).remote()
    asked = {name: machine.seen.remote() for name, machine in machines.items()}
    found: dict[str, Seen | str] = {}
    for name, machine in machines.items():
        try:
            seen = ray.get(asked[name], timeout=LOOK_S)
            found[name] = seen._replace(skew_s=skew(partial(clock_of, machine)))
        except ray.exceptions.RayError as error:
            found[name] = " ".join(str(error).split())
    return found


def clock_of(machine: Any) -> float:
    """What the clock of a node says, in seconds since 1970."""
    import ray  # noqa: PLC0415 as above

    said: float = ray.get(machine.now.remote(), timeout=LOOK_S)
    return said


def skew(clock: Callable[[], float]) -> float:
    """Seconds by which another machine's clock is ahead of ours, by the fastest of three answers."""

    def looked() -> tuple[float, float]:
        before = time.time()
        now = clock()
        after = time.time()
        return after - before, now - (before + after) / 2

    return min(looked() for _ in range(3))[1]


def up() -> dict[str, dict[str, Any]]:
    """Name -> what Ray says of each node that is up: its address, with its id where several have that."""
    import ray  # noqa: PLC0415 as above

    found: dict[str, dict[str, Any]] = {}
    for node in ray.nodes():
        if node["Alive"]:
            address = str(node["NodeManagerAddress"])
            found[f"{address} ({node['NodeID'][:6]})" if address in found else address] = node
    return found


def free_for(run: str, names: Sequence[str]) -> int:
    """Bytes free where this machine keeps the files of a run in a store, those that are there included.

    Args:
        run: Its address.
        names: Paths within it of files that it will write or fetch.

    Raises:
        AddressError: That directory is somebody else's.
    """
    here = Home.of(run).here
    return free_disk(here) + taken(here, names)


def rooms_everywhere(run: str, names: Sequence[str]) -> list[Room]:
    """What `free_for` is on every node of the Ray that this process has joined.

    A node that is not up yet, or does not answer, is passed over.
    """
    import ray  # noqa: PLC0415 as above
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    asking = ray.remote(num_cpus=0, max_retries=0)(free_for)
    asked: dict[Any, Any] = {}
    for name, node in up().items():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = asking.options(scheduling_strategy=there).remote(run, names)
        asked[answer] = node_of(name, node["Resources"], node.get("Labels", {}))
    ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_S)
    found = []
    for answer, node in asked.items():
        try:
            found.append(Room(node, ray.get(answer, timeout=0)))
        except ray.exceptions.RayError as error:
            why = " ".join(str(cause_of(error)).split())
            log.warning("%s does not say how much disk it has free: %.200s", node.name, why)
    return found


def told_of(name: str, seen: Seen | str, scratch_bytes: int) -> Iterator[Finding]:
    """The lines of one node.

    Args:
        name: Of the node.
        seen: Its report, or why there is none.
        scratch_bytes: What a run would write to its disk at most; 0: unknown.
    """
    if isinstance(seen, str):
        yield Finding("nodes", "fail", f"{name} says nothing of itself: {seen:.200}", RESTART)
        return
    yield room(f"{name}: {amount(seen.free)} free in {seen.scratch}", seen.free, scratch_bytes)
    yield skewed(name, seen.skew_s)
    for line in seen.gpu:
        yield line._replace(says=f"{name}: {line.says}")


def room(says: str, free: int, needed: int) -> Finding:
    """Whether the disk of a node has room for what is made and fetched there."""
    if free < needed:
        says = f"{says}, and the run may write {amount(needed)} there before it is sent to its store"
        return Finding("disk", "fail", says, "free some there, or set TMPDIR of the node to a larger disk")
    if not needed and free < SPARE_BYTES:
        return Finding("disk", "warn", says, "free some there, or set TMPDIR of the node to a larger disk")
    return Finding("disk", "ok", f"{says}, of which {amount(needed)} may be needed" if needed else says)


def skewed(name: str, skew_s: float) -> Finding:
    """Whether a clock agrees with ours."""
    off = abs(skew_s)
    state: State = "fail" if off > SKEW_FAIL_S else "warn" if off > SKEW_WARN_S else "ok"
    fix = "" if state == "ok" else "let both follow a time server (chrony, systemd-timesyncd)"
    return Finding("clock", state, f"{name} is {skew_s:+.0f} s from this machine", fix)
