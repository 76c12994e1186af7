"""What a worker trains on: its share of the run, read ahead by Ray Data, as tensors on its device."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray
from ray.data.block import BlockMetadata

from dd_core.stage import PairBatch
from workflows import feed
from workflows.train_spec import TrainSpec

TASKS_PER_LEG = 500
"""Read tasks of one execution of Ray Data; it is told all of them before the first is run."""
READ_AHEAD_BYTES = 512 * 2**20


class Reads(ray.data.Datasource):
    """The read tasks of one rank for a stretch of the run, in order."""

    def __init__(self, tasks: list[list[feed.Pick]], image_size: int) -> None:
        super().__init__()
        self.tasks, self.image_size = tasks, image_size

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of decoded images."""
        return sum(len(pick.rows) for task in self.tasks for pick in task) * 3 * self.image_size**2

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
    ) -> list[Any]:
        """One for each table."""
        return [
            ray.data.ReadTask(
                partial(feed.read, task, self.image_size),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None),
            )
            for task in self.tasks
        ]


def batches(
    spec: TrainSpec, order: feed.Order, first_step: int, rank: int, device: torch.device
) -> Iterator[PairBatch]:
    """A worker's share of a run from a step on, a micro batch at a time."""
    size, own = spec.stage.image_size, spec.batch_size // spec.num_workers
    leg_steps = TASKS_PER_LEG * feed.steps_per_task(own, size)
    for first in range(first_step, spec.budget.steps, leg_steps):
        steps = min(leg_steps, spec.budget.steps - first)
        share = feed.Share(first, steps, spec.batch_size, rank, spec.num_workers)
        expected, taken = share.positions(), 0
        for table in tables(feed.tasks(order, share, size), size, spec.micro_batch_size or own):
            check_positions(table, expected[taken : taken + len(table)])
            taken += len(table)
            yield paired(table, size, device)


def tables(tasks: list[list[feed.Pick]], image_size: int, rows: int) -> Iterator[pa.Table]:
    """The rows of all tasks in order, read ahead by Ray Data, so many at a time."""
    reads = Reads(tasks, image_size)
    dataset = ray.data.read_datasource(
        reads, num_cpus=0.25, concurrency=2, override_num_blocks=len(tasks)
    )  # or Ray cuts what few tasks deliver into 200 blocks
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=READ_AHEAD_BYTES)
    dataset.context.target_max_block_size = None  # a task is a block: never cut, never joined
    dataset.context.enable_progress_bars = False
    yield from dataset.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2)


def check_positions(table: pa.Table, expected: NDArray[np.int64]) -> None:
    """Refuse rows that are not those whose turn it is: then a restart would not be exact."""
    found = table["position"].to_numpy()
    if not np.array_equal(found, expected):
        raise RuntimeError(f"Ray Data handed out row {found[0]} where row {expected[0]} was due")


def paired(table: pa.Table, image_size: int, device: torch.device) -> PairBatch:
    """A table as tensors on the device."""
    image = table["image"].combine_chunks()
    width = 3 * image_size**2
    pixels = np.frombuffer(image.buffers()[1], np.uint8)[image.offset * width :][: len(image) * width]
    tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return PairBatch(
        image=torch.from_numpy(pixels.reshape(-1, 3, image_size, image_size).copy()).to(device),
        tokens=torch.from_numpy(tokens.astype(np.int64)).to(device),
    )
