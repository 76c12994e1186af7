"""Something that happens to a test from outside, in its midst."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def when(truth: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """While inside: do something, once, as soon as something is so; nothing is left behind."""
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
