"""When the workers of a stage stop or save before their time: all at the same step."""

import time
from typing import NamedTuple

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from workflows.stopping import StopSign

ASK_EVERY_S, ASK_EVERY_STEPS = 5.0, 10
"""Workers ask each other whether to stop after so many seconds, but at least after so many steps: who is told
to stop has two minutes before it is killed, and steps of large batches take many seconds."""


class Agreed(NamedTuple):
    """What all workers do after a step."""

    stop: bool
    node_will_go: bool
    """Ray has announced the loss of a node.  They save and go on: when it is gone, Ray starts them on those
    that are left."""


class Agreement:
    """The same answer on all workers to the question whether to go on.

    Args:
        sign: Tells this worker to stop.
        ranks: How many workers there are.
        drainable: Whether nodes may be taken away.
    """

    def __init__(self, sign: StopSign, *, ranks: int, drainable: bool) -> None:
        self.sign, self.ranks, self.drainable = sign, ranks, drainable
        self.asked: tuple[int, float] | None = None
        """At which step they asked last, and when; None before the first step."""
        self.pause = 1

    def after(self, step: int) -> Agreed:
        """What they do after this step; all workers call it after every step."""
        if self.asked and step < self.asked[0] + self.pause:
            return Agreed(stop=self.ranks == 1 and self.sign.up(), node_will_go=False)
        goes = self.drainable and ray.train.get_preemption_info() is not None
        stop, pause_s = self.most(float(self.sign.up()), self.step_s(step))
        self.asked = step, time.monotonic()
        self.pause = min(ASK_EVERY_STEPS, max(1, int(ASK_EVERY_S / pause_s))) if pause_s else 1
        return Agreed(bool(stop), goes)

    def step_s(self, step: int) -> float:
        """Seconds a step since they asked last; 0 after the first step, which takes longer than others."""
        if self.asked is None:
            return 0.0
        before, when = self.asked
        return (time.monotonic() - when) / (step - before)

    def most(self, *own: float) -> list[float]:
        """Of each value the largest that a worker has."""
        if self.ranks == 1:
            return list(own)
        values = torch.tensor(own, dtype=torch.float64, device=ray.train.torch.get_device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [float(value) for value in values]
