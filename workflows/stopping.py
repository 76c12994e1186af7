"""How trainings are told to save themselves and end: a file in the directory of each that runs."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from workflows.periodic import Periodically
from workflows.storage import Home, StorageError

log = logging.getLogger(__name__)
STOP = "stop"
"""While this file is in a stage's directory, its workers are to save and stop."""
TELL_EVERY_S = 2.0
"""Pause between attempts to tell a stage whose store is away."""


class Stopping:
    """Tells the stages that train now, and those that join later."""

    def __init__(self) -> None:
        self.asked = False
        self.stages: list[Home] = []
        self.lock = threading.Lock()

    def ask(self) -> None:
        """Tell them all, in the background: a signal handler must not wait for a store."""
        self.asked = True
        threading.Thread(target=self.tell, name="stop").start()

    def tell(self) -> None:
        """Write each stage's file, retrying until it is told or has ended: a store may be away."""
        log.info("stopping: %s", ", ".join(stage.here.name for stage in self.stages) or "nothing trains")
        told, complained = set[Home](), False
        while True:
            with self.lock:
                left = [stage for stage in self.stages if stage not in told]
            for stage in left:
                try:
                    with self.lock:
                        if stage in self.stages:
                            stage.write(STOP, "stop")
                    told.add(stage)
                except (StorageError, OSError) as error:
                    if not complained:
                        log.warning("%s is not told to stop yet: %s; it is tried again", stage.address, error)
                    complained = True
            if told.issuperset(left):
                return
            time.sleep(TELL_EVERY_S)

    @contextmanager
    def joined(self, stage: Home) -> Iterator[None]:
        """While inside, this stage is one of those that are told."""
        stage.here.mkdir(parents=True, exist_ok=True)
        stage.drop(STOP)  # left by a driver that was killed
        try:
            with self.lock:
                self.stages.append(stage)
                if self.asked:
                    stage.write(STOP, "stop")
            yield
        finally:
            with self.lock:
                self.stages.remove(stage)
                try:
                    stage.drop(STOP)
                except StorageError as error:  # the next start drops it; how this one ended is what counts
                    log.warning("storage: %s", error)


class StopSign:
    """Whether a stage is told to stop; a store is asked in the background, by the first worker alone."""

    def __init__(self, home: Home, *, first: bool) -> None:
        self.home, self.seen, self.asks = home, False, first and home.stored
        self.asking = Periodically(self.ask)

    def ask(self) -> None:
        self.seen = self.seen or (self.asks and self.home.has(STOP))

    def __enter__(self) -> Self:
        if self.asks:
            self.asking.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.asks:
            self.asking.end()

    def up(self) -> bool:
        """Whether it is told; costs a look at a directory, and nothing where there is a store."""
        return self.seen if self.home.stored else self.home.has(STOP)


@contextmanager
def stopped_by_signals() -> Iterator[Stopping]:
    """While inside, SIGTERM and Ctrl-C ask the stages to save and stop, instead of ending this process.

    A second Ctrl-C is a KeyboardInterrupt, which waits for nothing.  Signals are heard in the main
    thread alone; in another one, nothing is changed.
    """
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if stopping.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.ask()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
