"""What a worker trains on: its share of the run, read ahead by Ray Data, as tensors on its device."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray
from ray.data.block import BlockMetadata
from ray.data.dataset import MaterializedDataset

from dd_core.stage import PairBatch
from workflows import feed
from workflows.train_spec import TrainSpec

LEG_BYTES = 2 * 2**30
"""Decoded images, or embeddings, of one leg at most; two legs are in memory at a time."""


class Reads(ray.data.Datasource):
    """The read tasks of one rank for a stretch of the run, in order."""

    def __init__(self, tasks: list[list[feed.Pick]], wanted: feed.Wanted) -> None:
        super().__init__()
        self.tasks, self.wanted = tasks, wanted

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of decoded images and embeddings."""
        return sum(len(pick.rows) for task in self.tasks for pick in task) * self.wanted.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
    ) -> list[Any]:
        """One for each table."""
        return [
            ray.data.ReadTask(
                partial(feed.read, task, self.wanted),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None),
            )
            for task in self.tasks
        ]


def batches(
    spec: TrainSpec,
    order: feed.Order,
    wanted: feed.Wanted,
    *,
    first_step: int,
    rank: int,
    device: torch.device,
) -> Iterator[PairBatch]:
    """A worker's share of a run from a step on, a micro batch at a time."""
    rows = spec.micro_batch_size or spec.batch_size // spec.num_workers
    for share, leg in read_ahead(order, legs(spec, wanted, first_step, rank), wanted):
        expected, taken = share.positions(), 0
        for table in leg.iter_batches(batch_size=rows, batch_format="pyarrow", prefetch_batches=2):
            check_positions(table, expected[taken : taken + len(table)])
            taken += len(table)
            yield paired(table, wanted, device)


def legs(spec: TrainSpec, wanted: feed.Wanted, first_step: int, rank: int) -> Iterator[feed.Share]:
    """The stretches of a run that are read at once: short at first, so that training begins soon."""
    own = spec.batch_size // spec.num_workers
    store = ray.cluster_resources().get("object_store_memory", 0) / spec.num_workers
    steps = max(1, feed.table_rows(wanted) // own)  # about a table
    most = max(steps, int(min(LEG_BYTES, store / 8)) // (own * wanted.row_bytes))
    while first_step < spec.budget.steps:
        now = min(steps, spec.budget.steps - first_step)
        yield feed.Share(first_step, now, spec.batch_size, rank, spec.num_workers)
        first_step, steps = first_step + now, min(2 * steps, most)


def read_ahead(
    order: feed.Order, shares: Iterator[feed.Share], wanted: feed.Wanted
) -> Iterator[tuple[feed.Share, MaterializedDataset]]:
    """Every leg, read to its end while the one before it is trained on.

    Ray Data's executor is not left waiting for the training: with all its outputs full it asks in a
    loop whether that has changed, and holds the interpreter's lock while it does (Ray 2.60: training
    on two cores went at a third of its rate).  A leg that has been read to its end has no executor.
    """
    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        share = next(shares, None)
        reading = share and reader.submit(read_leg, order, share, wanted)
        while share is not None and reading is not None:
            leg, after = reading.result(), next(shares, None)
            reading = after and reader.submit(read_leg, order, after, wanted)
            yield share, leg
            share = after
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def read_leg(order: feed.Order, share: feed.Share, wanted: feed.Wanted) -> MaterializedDataset:
    """The rows of one leg, in order, in Ray's object store."""
    tasks = feed.tasks(order, share, wanted)
    readers = max(2, int(ray.cluster_resources().get("CPU", 0)) // (2 * share.ranks))
    dataset = ray.data.read_datasource(
        Reads(tasks, wanted), num_cpus=0.25, concurrency=readers, override_num_blocks=len(tasks)
    )  # or Ray cuts what few tasks deliver into 200 blocks
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # a task is a block: never cut, never joined
    dataset.context.enable_progress_bars = False
    return dataset.materialize()


def check_positions(table: pa.Table, expected: NDArray[np.int64]) -> None:
    """Refuse rows that are not those whose turn it is: then a restart would not be exact."""
    found = table["position"].to_numpy()
    if not np.array_equal(found, expected):
        raise RuntimeError(f"Ray Data handed out row {found[0]} where row {expected[0]} was due")


def paired(table: pa.Table, wanted: feed.Wanted, device: torch.device) -> PairBatch:
    """A table as tensors on the device; images of no pixels where none are wanted."""
    side, rows = wanted.image_size, len(table)
    pixels, embedding = np.zeros(0, np.uint8), None
    if side:
        image, width = table["image"].combine_chunks(), 3 * side**2
        pixels = np.frombuffer(image.buffers()[1], np.uint8)[image.offset * width :][: rows * width]
    if wanted.embeddings:
        embedding = torch.from_numpy(feed.numbers_of(table).copy()).to(device)
    tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    label = torch.tensor(table["label"].to_numpy()).to(device) if "label" in table.column_names else None
    return PairBatch(
        image=torch.from_numpy(pixels.reshape(rows, 3, side, side).copy()).to(device),
        tokens=torch.from_numpy(tokens.astype(np.int64)).to(device),
        label=label,
        embedding=embedding,
    )
