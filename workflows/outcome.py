"""How a training run ends: outcomes that all workers reach together, and errors that would recur."""

from pathlib import Path
from typing import Literal, NamedTuple

import ray.exceptions
import torch
from PIL import UnidentifiedImageError
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from dd_core.sealed import SealError
from dd_core.training import DivergedError
from workflows.parts import FULL
from workflows.row_groups import DataError, first_line
from workflows.storage import StorageError
from workflows.train_spec import TrainSpec

Status = Literal["done", "preempted", "diverged", "data", "refused", "checkpoint", "full"]
TOGETHER = ("done", "preempted")
"""Outcomes that all workers reach together."""
COME_AGAIN: tuple[tuple[type[Exception], Status], ...] = (
    (DivergedError, "diverged"),
    (DataError, "data"),
    (SealError, "checkpoint"),
    (ValueError, "refused"),
)


class Outcome(NamedTuple):
    """How a run ended."""

    status: Status
    message: str = ""


class DecidedError(RuntimeError):
    """One of several workers has an outcome that ends the run; the others may wait for it in a collective.

    Args:
        status: Of the Outcome.
        message: Of the Outcome.
    """

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(status, message)
        self.outcome = Outcome(status, message)


def told_by_ray(error: BaseException) -> BaseException:
    """The error itself; for a read task that raised, its cause in one line, without Ray's advice on retries.

    The cause replaces Ray's error only if it concerns the data, the store or a full disk.  Anything else,
    such as a task without memory, may succeed the next time and stays as Ray raised it.
    """
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    match cause:
        case StorageError():
            return StorageError(first_line(cause))
        case DataError() | ValueError() | UnidentifiedImageError():
            return DataError(first_line(cause))
        case Exception() if disk_full(cause):
            return cause
    return error


def decided(error: BaseException, spec: TrainSpec, *, disk: Path) -> Outcome | None:
    """The outcome of an error that would recur; None: it may be another worker's fault, or temporary.

    Args:
        error: Of a worker.
        spec: What it trains.
        disk: Where it writes.
    """
    if disk_full(error):
        return Outcome("full", str(disk))
    if isinstance(error, StorageError):  # the store may come back, and the next attempt finds it
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return Outcome("refused", out_of_memory(spec, error))
    return next((Outcome(status, str(error)) for kind, status in COME_AGAIN if isinstance(error, kind)), None)


def disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is the cause of an error, however deeply nested."""
    match error:
        case None:
            return False
        case OSError() if error.errno in FULL:
            return True
        case SafetensorError() if any(f"(os error {number})" in str(error) for number in FULL):
            return True
        case CheckpointException():
            return any(disk_full(one) for one, _ in error.failures.values())
    return disk_full(error.__cause__)


def out_of_memory(spec: TrainSpec, error: BaseException) -> str:
    """The message about a GPU that is too small, with what to do."""
    images = spec.micro_batch_size or spec.batch_size // spec.num_workers
    said = " ".join(str(error).split()).split(". ")[0]
    return f"{said}, with {images} images in one forward of each worker; lower micro_batch_size"
