"""How many CPUs to count on: those that this process may run on, at most the quota of its container."""

import math
import os
from pathlib import Path, PurePosixPath

OWN_GROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available(own_group: Path = OWN_GROUP, root: Path = CGROUPS) -> int:
    """CPUs that this process can keep busy, at least 1: affinity, and the quotas of control groups.

    Args:
        own_group: Where the kernel says which group the process is in.
        root: Where it shows the groups, of version 2 or 1.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), quota(own_group, root))))


def quota(own_group: Path, root: Path) -> float:
    """Quota in CPUs of the strictest control group around this process; infinite if none has one."""
    texts = [text_of(group / "cpu.max") for group in groups(own_group, root)]
    found = [share(text) for text in texts if text]
    older = text_of(root / "cpu" / "cpu.cfs_quota_us"), text_of(root / "cpu" / "cpu.cfs_period_us")
    if all(older) and int(older[0]) > 0:
        found.append(int(older[0]) / int(older[1]))
    return min(found, default=math.inf)


def groups(own_group: Path, root: Path) -> list[Path]:
    """Directories of the control groups of version 2 around this process, its own first."""
    lines = own_group.read_text().splitlines() if own_group.exists() else []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    return [root / str(place).strip("/") for place in (PurePosixPath(own), *PurePosixPath(own).parents)]


def share(text: str) -> float:
    """CPUs that a `cpu.max` grants: its limit (microseconds, or max) over its period."""
    limit, period = text.split()
    return math.inf if limit == "max" else int(limit) / int(period)


def text_of(path: Path) -> str:
    """The text of a file, stripped; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
