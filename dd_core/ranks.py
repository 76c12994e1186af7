"""Gathers values from all ranks of a training, for losses that compare the samples of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

_imagined = 1


class Gathered(torch.autograd.Function):
    """The rows of all ranks, in rank order; backward sums what all ranks say of the rows of each."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        every = values.new_empty(dist.get_world_size() * len(values), *values.shape[1:])
        dist.all_gather_into_tensor(every, values.contiguous())
        return every

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


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
    """The values of all ranks, in rank order; alone: the values.

    A loss of a rank's own rows among those of all has, on each rank, the gradient of the sum over ranks; DDP
    takes the mean, which is the gradient of one worker with the whole batch.

    Args:
        values: The same number of rows on every rank.
    """
    if not spread():
        return values if _imagined == 1 else torch.cat([values] * _imagined)
    rows: Tensor = Gathered.apply(values)
    return rows


def first(rows: int) -> int:
    """Where those of this rank begin among the gathered ones, if each rank has so many."""
    return dist.get_rank() * rows if spread() else 0


def told(share: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """This rank's share of a mean over ranks: its gradient, and the value of the mean."""
    value = share.detach()
    return share + (gathered(value[None]).mean() - value)


def spread() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized()
