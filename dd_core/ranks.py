"""Gathers values from all ranks of a training, for losses that compare the samples of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

_imagined = 1


class Gathered(torch.autograd.Function):
    """The rows of all ranks, in rank order; each rank keeps the gradient of its own rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        every = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(every, values.contiguous())
        ctx.count = len(values)
        return torch.cat(every)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.count
        return gradient[first : first + ctx.count] * dist.get_world_size()


@contextmanager
def among(ranks: int) -> Iterator[None]:
    """Inside, a process alone gathers its own values from so many ranks, to plan for them."""
    global _imagined  # noqa: PLW0603 torch.compile reads a plain name, not a ContextVar
    before, _imagined = _imagined, ranks
    try:
        yield
    finally:
        _imagined = before


def gathered(values: Shaped[Tensor, " b *s"]) -> Shaped[Tensor, " n *s"]:
    """The values of all ranks, so that all compute the same loss of the same batch; alone: the values.

    Each rank keeps the gradient of its own rows, times the number of ranks: DDP takes the mean over ranks,
    and the sum of what each rank's own samples contribute is the gradient of one worker with the whole batch.
    The backward pass communicates nothing.

    Args:
        values: The same number of rows on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values if _imagined == 1 else torch.cat([values] * _imagined)
    rows: Tensor = Gathered.apply(values)
    return rows
