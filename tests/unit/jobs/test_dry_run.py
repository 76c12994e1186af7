"""--dry-run: a plan is refused for what is known to be too small, not for what is not known."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.nodes import UNSTARTED, Node, unstarted


def test_a_cluster_that_has_a_head_alone_so_far_refuses_no_run_but_on_account_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Node("10.0.0.2", cpus=0, gpus=0, memory_bytes=8 * 2**30)
    assert unstarted([head])
    assert not unstarted([head, head._replace(cpus=8)])
    monkeypatch.setattr("jobs.planned_run.nodes_of", lambda: [head])
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    shown = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--dry-run", "--json"])
    assert (shown.exit_code, json.loads(shown.stdout)["refused"]) == (0, []), shown.stderr
    assert UNSTARTED in shown.stderr
    monkeypatch.setattr("jobs.plan.free_disk", lambda _: 1000)
    full = CliRunner().invoke(main, ["run", "--recipe", "smoke", "--dry-run"])
    assert (full.exit_code, "the plan does not fit: disk: " in full.stderr) == (2, True)
