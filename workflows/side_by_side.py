"""Runs steps that depend on each other, each as soon as its parents are made, so many at a time."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from queue import SimpleQueue
from typing import NamedTuple, Protocol, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")


class Stop(Protocol):
    """How the steps that run are told to save themselves and end."""

    asked: bool

    def ask(self) -> None:
        """Tell them; returns at once."""


class Ended(NamedTuple):
    """A step is over."""

    name: str
    error: BaseException | None


def side_by_side(
    parents: Mapping[str, Collection[str]], make: Callable[[str], T], *, at_once: int, stop: Stop
) -> dict[str, T]:
    """Make every step after its parents; of those that may begin, the first of the list begins.

    Each is made in a thread of its own, while this one waits, so that signals are handled.  When one
    fails, those beside it are told to save and end, and no other is begun.

    Args:
        parents: Step -> the steps it stands on, in the order of the list; names of no step are passed over.
        make: Makes a step, in any thread.
        at_once: How many steps may be in the making at a time.
        stop: Tells those that run to end; once it is asked, by anybody, no other step is begun.

    Returns:
        Step -> what was made; after a stop, of the steps that were completed.

    Raises:
        The error of the first step that failed; those of the others are logged.
    """
    waiting, running = list(parents), set[str]()
    made: dict[str, T] = {}
    ended, first = SimpleQueue[Ended](), None

    def begin(name: str) -> None:
        try:
            made[name] = make(name)
        except BaseException as error:  # noqa: BLE001 raised again by the waiting thread
            ended.put(Ended(name, error))
        else:
            ended.put(Ended(name, None))

    while True:
        while not stop.asked and len(running) < at_once and (name := ready(waiting, parents, made)):
            waiting.remove(name)
            running.add(name)
            threading.Thread(target=begin, args=(name,), name=name, daemon=True).start()
        if not running:
            break
        name, error = ended.get()
        running.remove(name)
        if error is not None and first is None:
            first = error
            stop.ask()
        elif error is not None:
            log.warning("%s", str(error) or repr(error))
    if first is not None:
        raise first
    return {name: made[name] for name in parents if name in made}


def ready(waiting: list[str], parents: Mapping[str, Collection[str]], made: Collection[str]) -> str:
    """The first waiting step whose parents are made; empty if there is none."""
    return next((name for name in waiting if all(p in made for p in parents[name] if p in parents)), "")
