"""How far trainings are that go on side by side: one display on a terminal, plain lines elsewhere."""

import io
import logging
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from workflows.progress import StepBars, StepProgress


@pytest.fixture
def plain() -> Iterator[logging.StreamHandler[io.TextIOBase]]:
    """As jobs.shell sets it up: what is logged goes to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


def test_on_a_terminal_every_stage_has_a_bar_in_one_display_and_lines_appear_above_it(
    plain: logging.StreamHandler[io.TextIOBase],
) -> None:
    terminal, before = io.StringIO(), sys.stderr
    console = Console(file=terminal, force_terminal=True, width=120)
    with StepBars(console) as bars:
        with StepProgress("clip", 100, bars=bars) as one, StepProgress("base", 2000, bars=bars) as other:
            one.show(30, loss=0.5, rate=10.0, left_s=75.0)
            other.show(400, loss=0.25, rate=20.0, left_s=5.0)
            bars.bars.refresh()
            shown = terminal.getvalue()
            logging.getLogger("workflows").warning("clip: a line")
        assert not bars.bars.tasks  # who is done has none
    assert "30 of 100, loss 0.5, 10 images/s, 1:15 left" in shown
    assert "400 of 2,000, loss 0.25, 20 images/s, 0:05 left" in shown
    assert "clip: a line" in terminal.getvalue()[len(shown) :]
    assert sys.stderr is before
    assert plain.stream is before


def test_elsewhere_each_stage_says_its_name_in_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    plain = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO, "workflows"), StepBars(plain) as bars:
        for name in ("clip", "base"):
            with StepProgress(name, 10, bars=bars, every_s=0.0) as progress:
                for _ in range(2):  # a step is said once
                    progress.show(3, loss=0.5, rate=10.0, left_s=75.0)
                progress.show(10, loss=0.5, rate=10.0, left_s=0.0)  # the end says itself
    lines = [record.message for record in caplog.records if record.name == "workflows.progress"]
    assert [line.partition(",")[0] for line in lines] == ["clip: step 3 of 10", "base: step 3 of 10"]
