"""What is written down of the steps: the mean of those that changed the weights, and how many did not."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dd_core.stage import Budget
from dd_core.training import StepReport
from tests.ranks import run_ranks
from tests.unit.workflows.test_outcome import SPEC
from workflows.journal import JOURNAL, curves, entries
from workflows.storage import Home
from workflows.worker import Position, Recorder


def recorder_in(home: Path, rank: int, ranks: int) -> Recorder:
    spec = SPEC.but(budget=Budget(steps=9, checkpoint_every=9, report_every=3))
    job: Any = SimpleNamespace(home=Home.of(home), spec=spec)
    state: Any = SimpleNamespace(step=0)
    return Recorder(job, Position(rank, ranks), state, {}, seconds_before=0.0)


def noted(recorder: Recorder, losses: list[float]) -> None:
    skipped = 0
    for step, loss in enumerate(losses, 1):
        good = math.isfinite(loss)
        skipped += not good
        metrics = {"loss": torch.tensor(loss)}
        recorder.note(
            StepReport(step=step, images=8, learning_rate=0.1, metrics=metrics, skipped=skipped, good=good)
        )


def test_a_skipped_step_is_counted_and_spoils_no_mean(tmp_path: Path) -> None:
    noted(recorder_in(tmp_path, 0, 1), [1.0, math.nan, 3.0, *[math.nan] * 3, 5.0, 6.0, 7.0])
    found = curves(tmp_path / JOURNAL)
    assert found["train/loss"] == {3: 2.0, 9: pytest.approx(6.0)}
    assert found["train/skipped"] == {3: 1.0, 6: 4.0, 9: 4.0}


def rank_main(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    losses = [1.0, math.nan, 3.0, *[math.nan] * 3, 5.0, 6.0, 7.0]
    noted(recorder_in(root, rank, 2), [10 * rank + loss for loss in losses])
    dist.barrier()
    os._exit(0)  # gloo on CPU sometimes aborts in its own teardown


@pytest.mark.slow
def test_what_is_written_down_is_the_mean_of_all_workers_once(tmp_path: Path) -> None:
    run_ranks(rank_main, (tmp_path,), 2)
    assert curves(tmp_path / JOURNAL)["train/loss"] == {3: 7.0, 9: pytest.approx(11.0)}
    lines = [entry.name for entry in entries(tmp_path / JOURNAL)]
    assert lines.count("train/loss") == 2
