"""Admission: lets in what will be painted in time, at the pace that was measured.  No Ray, no HTTP routes."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from serve.openai_api import ApiError

KEPT = 0.98
"""Decay of the measured pace when a request leaves: the last 34 requests have half of the weight."""
SURE = 0.8
"""Share of a request's patience that its wait, by the measured pace, may fill."""
LONGEST_RETRY_S = 120


class Door:
    """Counts the requests inside, and measures seconds per unit of work at the parallelism there is.

    Work is in steps: images times the steps of their plan.  Time that ended in no image (a deadline, a client
    that has gone) is counted too, so wasted time closes the door.  As many requests as there may be replicas
    are let in whatever the pace, so it opens again, and more replicas are started if those are slow.

    Args:
        room: Images that may be inside at once; a single request of more is let in alone.
        replicas: Most replicas that the hop with the fewest may have.
    """

    def __init__(self, room: int, replicas: int = 1) -> None:
        self.room, self.replicas = room, replicas
        self.requests = self.images = self.work = 0
        self.busy_s, self.done = 0.0, 0.0  # of the same requests, older ones weigh less
        self.since = 0.0
        """When a request last left, or the first came in; on the loop's clock, in seconds."""

    @property
    def pace(self) -> float:
        """Seconds per unit of work; 0 before any was measured.  If none was finished, one is assumed."""
        return self.busy_s / max(self.done, 1.0)

    @contextmanager
    def let_in(self, images: int, work: int, patience_s: float) -> Iterator[None]:
        """Count a request as inside meanwhile; it counts as painted if no exception leaves.

        Raises:
            ApiError: 429, with Retry-After: it would wait too long, or too many are inside.
        """
        if self.requests and (over_s := self.over(images, work, patience_s)) > 0:
            after = math.ceil(min(max(over_s, 1), LONGEST_RETRY_S))
            told = "busy: too many images wait; try again later"
            raise ApiError(429, told, code="busy", headers={"Retry-After": str(after)})
        clock = asyncio.get_running_loop().time
        if not self.requests:
            self.since = clock()
        self.requests += 1
        self.images += images
        self.work += work
        painted = 0
        try:
            yield
            painted = work
        finally:
            self.requests -= 1
            self.images -= images
            self.work -= work
            now = clock()
            self.busy_s = KEPT * self.busy_s + now - self.since
            self.done = KEPT * self.done + painted
            self.since = now

    def over(self, images: int, work: int, patience_s: float) -> float:
        """Seconds until there is room for a request beside those that are inside; 0 if there is now."""
        slow = self.requests >= self.replicas
        late_s = (self.work + work) * self.pace - SURE * patience_s if slow else 0.0
        crowd = (self.images + images - self.room) / self.images
        full_s = max(1.0, crowd * self.work * self.pace) if crowd > 0 else 0.0
        return max(0.0, late_s, full_s)
