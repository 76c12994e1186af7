"""The kind of device that computes, since layers take other paths on CPUs; and copies of tensors to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_imagined = ""


def nearest() -> torch.device:
    """This process's GPU if it has one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kind_of(tensor: Tensor) -> str:
    """cpu, cuda or another: the kind of a tensor's device or, inside `imagined`, the kind given there."""
    return _imagined or tensor.device.type


@contextmanager
def imagined(kind: str) -> Iterator[None]:
    """Inside, layers take the paths of this kind of device, to plan for an absent one (FakeTensorMode)."""
    global _imagined  # noqa: PLW0603 torch.compile reads a plain name, not a ContextVar
    before, _imagined = _imagined, kind
    try:
        yield
    finally:
        _imagined = before


def carry(part: Tensor, device: torch.device) -> Tensor:
    """`part` on a device; a copy from the CPU to a GPU does not wait for the work queued there."""
    return part.to(device, non_blocking=part.device.type == "cpu" and device.type == "cuda")


def carried(*parts: Tensor) -> Callable[[torch.device], tuple[Tensor, ...]]:
    """Device -> the parts there, copied at the first call only: for what every step of a request uses."""

    @cache
    def there(device: torch.device) -> tuple[Tensor, ...]:
        return tuple(carry(part, device) for part in parts)

    return there
