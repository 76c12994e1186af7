"""How far a long job is: a bar with rate and time left on a terminal, plain lines elsewhere."""

import datetime
import logging
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0


class StepBars:
    """One display for all training runs in progress: a bar each on a terminal, nothing elsewhere.

    While it is shown, log lines appear above it.

    Args:
        console: Where to; standard error if not given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f}, {task.fields[about]}"),
        )
        self.bars = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal, transient=True
        )
        self.moved: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def __enter__(self) -> Self:
        plain = sys.stderr
        self.bars.start()
        if sys.stderr is not plain:  # rich has put its own there, which writes above the bars
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is plain:
                    self.moved.append((handler, plain))
                    handler.setStream(sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        for handler, plain in self.moved:
            handler.setStream(plain)
        self.moved = []
        self.bars.stop()


class StepProgress:
    """Progress of one training run, by its journal: a bar while inside, or plain lines.

    Args:
        title: What is trained.
        total: Steps of its budget.
        bars: Where the bar goes.
        every_s: Pause between plain lines.
    """

    def __init__(self, title: str, total: int, *, bars: StepBars, every_s: float = 15.0) -> None:
        self.title, self.total, self.bars, self.every_s = title, total, bars, every_s
        self.said, self.spoken = -1, time.monotonic()

    def __enter__(self) -> Self:
        self.task = self.bars.bars.add_task(self.title, total=self.total, about="starting")
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.bars.remove_task(self.task)

    def show(self, step: int, *, loss: float, rate: float, left_s: float) -> None:
        """Show the step that is reached; a line only every `every_s`, and only for a new step."""
        about = f"loss {loss:.4g}, {rate:.0f} images/s, {clock(left_s)} left"
        if self.bars.console.is_terminal:
            self.bars.bars.update(self.task, completed=step, about=about)
        elif self.said < step < self.total and time.monotonic() - self.spoken >= self.every_s:
            self.said, self.spoken = step, time.monotonic()
            log.info("%s: step %s of %s, %s", self.title, f"{step:,}", f"{self.total:,}", about)


def clock(seconds: float) -> str:
    """75 -> 1:15."""
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text


class SampleProgress:
    """Progress through a source whose number of bytes is known and whose number of samples is not.

    Args:
        title: What is done.
        total_bytes: Of the whole source; 0 if the store does not tell: then no remaining time is shown.
        samples: Done in an earlier run.
        position: Bytes read in an earlier run.
        console: Where to; standard error if not given.
    """

    def __init__(
        self,
        title: str,
        total_bytes: int,
        *,
        samples: int = 0,
        position: int = 0,
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.title, self.total, self.samples, self.position = title, total_bytes, samples, position
        self.first = (samples, position)
        self.start = self.spoken = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[samples]:,} samples, {task.fields[rate]:,.0f}/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(title, total=total_bytes or None, samples=samples, rate=0.0)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
        if not self.console.is_terminal:
            self.speak()

    def advance(self, samples: int, size: int) -> None:
        """Count so many more samples, and bytes of the source."""
        self.samples += samples
        self.position += size
        self.bar.update(self.task, completed=self.position, samples=self.samples, rate=self.rate())
        if not self.console.is_terminal and time.monotonic() - self.spoken > LINE_EVERY_S:
            self.speak()

    def rate(self) -> float:
        """Samples per second of this run."""
        return (self.samples - self.first[0]) / max(time.monotonic() - self.start, 1e-6)

    def speak(self) -> None:
        """Print one plain line."""
        self.spoken = time.monotonic()
        line = f"{self.title}: {self.samples:,} samples, {self.rate():,.0f}/s"
        if self.total:
            line += f", {min(1.0, self.position / self.total):.0%}"
            read = self.position - self.first[1]
            if read > 0 and self.position < self.total:
                left = (self.total - self.position) / read * (self.spoken - self.start)
                line += f", {left:,.0f} s left"
        self.console.print(line, highlight=False, soft_wrap=True)
