"""What is written down of the steps: the mean of those that changed the weights, and how many did not."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import torch.distributed as dist

from dd_core.stage import Budget
from dd_core.training import StepReport
from tests.ranks import run_ranks
from tests.unit.workflows.test_outcome import SPEC
from workflows import samples
from workflows.agreement import Agreement
from workflows.journal import JOURNAL, curves, entries
from workflows.storage import Home, StorageError
from workflows.worker import Position, Recorder, stepped

if TYPE_CHECKING:
    from workflows.stopping import StopSign


AGREED = Agreement(cast("StopSign", SimpleNamespace(up=lambda: False)), ranks=1, drainable=False)


def recorder_in(home: Path, rank: int, ranks: int, sample_every: int = 0) -> Recorder:
    budget = Budget(steps=9, checkpoint_every=9, report_every=3, sample_every=sample_every)
    job: Any = SimpleNamespace(home=Home.of(home), spec=SPEC.but(budget=budget), drainable=False)
    state: Any = SimpleNamespace(step=0, average={})
    return Recorder(job, Position(rank, ranks), state, {}, seconds_before=0.0)


def steps_of(losses: list[float]) -> Iterator[StepReport]:
    skipped = 0
    for step, loss in enumerate(losses, 1):
        good = math.isfinite(loss)
        skipped += not good
        metrics = {"loss": torch.tensor(loss)}
        yield StepReport(step=step, images=8, learning_rate=0.1, metrics=metrics, skipped=skipped, good=good)


def noted(recorder: Recorder, losses: list[float]) -> None:
    for report in steps_of(losses):
        recorder.note(report)


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


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory; lower samples.pictures"),
        (RuntimeError("shapes\n differ"), "shapes"),
        (StorageError("the store is away"), "the store is away"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_told_of_and_costs_itself_alone(
    error: Exception,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[str] = []

    def fails(*_: object) -> None:
        done.append("draw")
        raise error

    monkeypatch.setattr(samples, "drawn", fails)
    monkeypatch.setattr(Recorder, "shown", lambda _: None)
    monkeypatch.setattr(Recorder, "save", lambda _: done.append("save"))
    monkeypatch.setattr(Recorder, "ship", lambda _: done.append("ship"))
    recorder = recorder_in(tmp_path, 0, 1, sample_every=9)
    with caplog.at_level(logging.WARNING, "workflows"):
        ended = stepped(recorder.job, recorder.who, steps_of([1.0] * 9), recorder, AGREED)
    assert ended.status == "done"
    assert done == ["save", "draw", "ship"]
    (line,) = (record.getMessage() for record in caplog.records if record.name == "workflows.worker")
    assert line.startswith(f"x: no samples/step-00000009.png: {why}")
    assert [entry.kind for entry in entries(tmp_path / JOURNAL) if entry.kind == "picture"] == []
    assert set(curves(tmp_path / JOURNAL)["train/loss"]) == {3, 6, 9}


def test_checkpoints_are_made_at_the_multiples_that_stay_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, saved = recorder_in(tmp_path, 0, 1), list[int]()
    monkeypatch.setattr(Recorder, "ship", lambda _: None)
    monkeypatch.setattr(Recorder, "save", lambda _: saved.append(last[0]))
    spec = recorder.job.spec
    job = SimpleNamespace(spec=spec.but(keep_every=2, budget=spec.budget.but(checkpoint_every=3)))
    last = [0]

    def steps() -> Iterator[StepReport]:
        for report in steps_of([1.0] * 9):
            last[0] = report.step
            yield report

    stepped(cast("Any", job), recorder.who, steps(), recorder, AGREED)
    assert saved == [2, 3, 4, 6, 8, 9]
