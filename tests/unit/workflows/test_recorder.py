"""What is written down of the steps: the mean of those that changed the weights, and how many did not."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dd_core.stage import Budget
from dd_core.training import StepReport
from tests.unit.workflows.test_outcome import SPEC
from workflows.journal import JOURNAL, curves
from workflows.storage import Home
from workflows.worker import Position, Recorder


def test_a_skipped_step_is_counted_and_spoils_no_mean(tmp_path: Path) -> None:
    spec = SPEC.but(budget=Budget(steps=9, checkpoint_every=9, report_every=3))
    job: Any = SimpleNamespace(home=Home.of(tmp_path), spec=spec)
    state: Any = SimpleNamespace(step=0)
    recorder = Recorder(job, Position(0, 1), state, {}, seconds_before=0.0)
    losses = [1.0, float("nan"), 3.0, *[float("nan")] * 3, 5.0, 6.0, 7.0]
    skipped = 0
    for step, loss in enumerate(losses, 1):
        good = math.isfinite(loss)
        skipped += not good
        metrics = {"loss": torch.tensor(loss)}
        recorder.note(
            StepReport(step=step, images=8, learning_rate=0.1, metrics=metrics, skipped=skipped, good=good)
        )
    found = curves(tmp_path / JOURNAL)
    assert found["train/loss"] == {3: 2.0, 9: pytest.approx(6.0)}
    assert found["train/skipped"] == {3: 1.0, 6: 4.0, 9: 4.0}
