"""An event that hits a test from outside while it runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def when(truth: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """During the block, call `act` once, as soon as `truth` holds; the thread that watches ends with it."""
    over = threading.Event()

    def wait() -> None:
        while not truth():
            if over.wait(0.02):
                return
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
