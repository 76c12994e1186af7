"""Which kind of device computes; layers have a way of their own on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_imagined = ""


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
