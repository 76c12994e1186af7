"""Jobs that are not a whole run: preparing, training one stage, stopped at work and gone on with."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dd_core import sealed
from jobs import dashboard
from jobs.cli import main
from tests.ray_head import Head, ray_head

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore"),  # Ray's and MLflow's, of themselves
]
STEPS = 300
TRAIN = (
    "submit", "train", "upsampler", "--recipe", "smoke", "--set", "shapes.pairs=32",
    "--set", f"stages.upsampler.budget.steps={STEPS}",
    "--set", "stages.upsampler.budget.report_every=5",
    "--set", "stages.upsampler.budget.checkpoint_every=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of a node: a job is begun by its `python`
    with ray_head(variables={"PATH": path}) as started:
        yield started


@pytest.fixture
def runs(head: Head, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs are kept, by a user of that cluster."""
    for name, value in head.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dashboard, "TIMEOUT_S", 300.0)  # of a busy machine
    directory = tmp_path_factory.mktemp("runs")
    monkeypatch.setenv("DDIFF_STORAGE", str(directory))
    return directory


def ddiff(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def last_step(journal: Path) -> int:
    """That a training has told of."""
    text = journal.read_text() if journal.exists() else ""
    return max(map(int, re.findall(r'"train/loss", [^,]+, (\d+),', text)), default=0)


def test_pairs_are_prepared_by_a_job(runs: Path) -> None:
    assert ddiff("data", "shapes", "--out", str(runs / "raw"), "--pairs", "30", "--seed", "1").exit_code == 0
    config = runs / "pairs.yaml"
    config.write_text(
        f"kind: pairs\nshards: ['{runs}/raw/*.tar']\ndestination: {runs}/prepared\nsizes: [64]\n"
    )
    sent = ddiff("submit", "prepare", "--config", str(config), "--follow")
    assert sent.exit_code == 0, sent.stderr
    assert re.fullmatch(r"prepare-prepared-[0-9a-f]{8}\.1\n", sent.stdout)
    facts = sealed.verify(runs / "prepared").facts
    assert (facts["kept"], facts["rejected"]) == (30, 0)


def test_a_stage_is_trained_by_a_job_that_saves_itself_when_it_is_stopped(runs: Path) -> None:
    first = ddiff(*TRAIN)
    assert first.stdout == "smoke.1\n", first.stderr
    journal = runs / "smoke" / "upsampler" / "metrics.jsonl"
    end = time.monotonic() + 1500
    while last_step(journal) < 10:
        assert time.monotonic() < end, ddiff("logs", "smoke.1").stdout[-2000:]
        time.sleep(0.2)
    stopped = ddiff("stop", "smoke.1", "--json")
    assert stopped.exit_code == 0, stopped.stderr
    assert json.loads(stopped.stdout)["status"] == "STOPPED"
    saved = last_step(journal)
    assert 10 <= saved < STEPS
    names = sorted(path.name for path in (runs / "smoke" / "upsampler" / "checkpoints").iterdir())
    assert int(names[-1].removeprefix("step-")) >= saved  # none was due: it was saved because it was told

    again = ddiff(*TRAIN, "--follow")
    assert (again.exit_code, again.stdout) == (0, "smoke.2\n"), again.stderr
    begun = re.search(r"upsampler: continues at step (\d+)", again.stderr)
    assert begun is not None, again.stderr
    assert int(begun[1]) >= saved
    assert sealed.verify(runs / "smoke" / "upsampler" / "bundle").facts["step"] == STEPS
