"""What a container is given counts, whatever machine it stands on."""

import math
import os
from pathlib import Path

import pytest

from workflows import cpus


def told(root: Path, group: str, **quotas: str) -> tuple[Path, Path]:
    """A process in a group; `quotas` of the groups on the way there, by the last part of their names."""
    own = root / "own"
    own.write_text(f"0::{group}\n")
    for place in (Path(group), *Path(group).parents):
        where = root / str(place).strip("/")
        where.mkdir(parents=True, exist_ok=True)
        if quota := quotas.get(place.name or "top"):
            (where / "cpu.max").write_text(f"{quota}\n")
    return own, root


@pytest.mark.parametrize(
    ("quotas", "given"),
    [
        ({}, math.inf),
        ({"pod": "max 100000"}, math.inf),
        ({"pod": "250000 100000"}, 2.5),
        ({"pod": "400000 100000", "slice": "150000 100000"}, 1.5),  # the strictest around it
        ({"top": "50000 100000"}, 0.5),
    ],
)
def test_the_strictest_quota_of_the_groups_around_a_process_counts(
    tmp_path: Path, quotas: dict[str, str], given: float
) -> None:
    own, root = told(tmp_path, "/slice/pod", **quotas)
    assert cpus.quota(own, root) == given
    assert cpus.available(own, root) == max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(given, 1e9))))


def test_groups_of_the_first_version_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpus.quota(tmp_path / "none", tmp_path) == math.inf
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    assert cpus.quota(tmp_path / "none", tmp_path) == 3
