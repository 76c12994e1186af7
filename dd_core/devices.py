"""Which kind of device computes, for layers have a way of their own on CPUs; and what is carried to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

_imagined = ""


def nearest() -> torch.device:
    """The GPU that this process computes with where it has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kind_of(tensor: Tensor) -> str:
    """cpu, cuda or another: of the device that computes with a tensor, or of the one that is imagined to."""
    return _imagined or tensor.device.type


@contextmanager
def imagined(kind: str) -> Iterator[None]:
    """While inside, layers do as on such a device; to plan for one that is not here (FakeTensorMode)."""
    global _imagined  # noqa: PLW0603 torch.compile reads a plain name, not a ContextVar
    before, _imagined = _imagined, kind
    try:
        yield
    finally:
        _imagined = before


def carry(part: Tensor, device: torch.device) -> Tensor:
    """`part` on a device; one of the host goes to a GPU without waiting for what that is at work on."""
    return part.to(device, non_blocking=part.device.type == "cpu" and device.type == "cuda")


def carried(*parts: Tensor) -> Callable[[torch.device], tuple[Tensor, ...]]:
    """What a request says once and every step uses: device -> the parts there, carried at the first call."""

    @cache
    def there(device: torch.device) -> tuple[Tensor, ...]:
        return tuple(carry(part, device) for part in parts)

    return there
