"""Work on a run's files that a thread repeats every few seconds in the background: sending, fetching."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from workflows.storage import Home, StorageError

log = logging.getLogger(__name__)
SEND_EVERY_S = 2.0
"""How far the copies that others see of a growing file may lag behind."""


class Periodically:
    """While inside, repeat an action in a thread, and by default once more at the end.

    A failure is logged, and then none until the action has succeeded again.  A failure at the end is raised,
    unless another error is already propagating: that one is the cause.

    Args:
        act: The action.
        every_s: The pause before each repetition.
        at_end: Whether to repeat it once more at the end.
    """

    def __init__(
        self, act: Callable[[], None], *, every_s: float = SEND_EVERY_S, at_end: bool = True
    ) -> None:
        self.act, self.every_s, self.over, self.complained = act, every_s, threading.Event(), False
        self.at_end = at_end
        self.thread = threading.Thread(target=self.keep_on, name="storage", daemon=True)

    def keep_on(self) -> None:
        while not self.over.wait(self.every_s):
            try:
                self.act()
                self.complained = False
            except (StorageError, OSError) as error:  # a full disk must not end this thread for good
                if not self.complained:
                    log.warning("storage: %s; it is tried again", error)
                self.complained = True

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end()
        if not self.at_end:
            return
        try:
            self.act()
        except (StorageError, OSError) as error:
            if kind is None:
                raise
            log.warning("storage: %s; that is not why it ends", error)  # the error that is under way says why

    def end(self) -> None:
        """Stop repeating the action, without a last time."""
        self.over.set()
        self.thread.join()


class Sending:
    """Sends files that have changed since the last time."""

    def __init__(self, home: Home, *patterns: str) -> None:
        self.home, self.patterns, self.sent = home, patterns, dict[Path, tuple[int, int]]()

    def __call__(self) -> None:
        if not self.home.stored:
            return
        for pattern in self.patterns:
            for path in self.home.here.glob(pattern):
                now = path.stat()
                if self.sent.get(path) != (stamp := (now.st_mtime_ns, now.st_size)):
                    self.home.send(path.relative_to(self.home.here).as_posix(), missing_ok=True)
                    self.sent[path] = stamp


def following(home: Home, name: str) -> Periodically:
    """While inside, keep the local copy of a file up to date with the store: another process writes it."""

    def look() -> None:
        size = home.size(name) if home.stored else None
        path = home.here / name
        if size is not None and (not path.exists() or path.stat().st_size < size):
            home.fetch(name)  # on the machine of the writer, its own copy is never behind

    return Periodically(look)
