"""Where the first worker of a training leaves what it has read, for the others.

An actor, since references to Ray's objects may travel only in Ray's calls: if one is pickled elsewhere, its
object stays in the object store for ever.  Without torch, so that its process starts fast.
"""

import asyncio
from collections import Counter
from typing import Any, NamedTuple

import ray


class Leg(NamedTuple):
    """The rows of a stretch of a run, those of all ranks, in order, in Ray's object store."""

    first_step: int
    steps: int
    tables: tuple[Any, ...]
    """References."""
    rows: tuple[int, ...]
    """Number of rows of each table."""


class Mailbox:
    """Keeps each leg until all other workers have taken it.

    Args:
        others: How many other workers there are.
    """

    def __init__(self, others: int) -> None:
        self.others, self.news = others, asyncio.Condition()
        self.legs: dict[int, Leg] = {}
        self.taken: Counter[int] = Counter()

    async def put(self, number: int, leg: Leg) -> None:
        """Leave the leg of this number, counted from 0."""
        async with self.news:
            self.legs[number] = leg
            self.news.notify_all()

    async def take(self, number: int) -> Leg:
        """The leg of this number, as soon as it is there; each of the other workers takes it once."""
        async with self.news:
            await self.news.wait_for(lambda: number in self.legs)
            self.taken[number] += 1
            return self.legs[number] if self.taken[number] < self.others else self.legs.pop(number)


def opened(name: str, *, others: int) -> Any:
    """A new mailbox of this name, which ends with the process that opened it."""
    return ray.remote(Mailbox).options(name=name, num_cpus=0).remote(others)
