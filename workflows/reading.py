"""What a worker trains on: its share of the run, read ahead by Ray Data, as tensors on its device."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data.block import BlockMetadata

from dd_core.stage import PairBatch
from workflows import feed
from workflows.mailbox import Leg
from workflows.train_spec import TrainSpec

T = TypeVar("T")
LEG_BYTES = 16 * 2**30
"""Most bytes of images and embeddings in one leg, over all ranks; three legs are in memory at a time."""


class Reads(ray.data.Datasource):
    """The read tasks of a stretch of the run, in order."""

    def __init__(self, tasks: list[list[feed.Pick]], wanted: feed.Wanted) -> None:
        super().__init__()
        self.tasks, self.wanted = tasks, wanted

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of decoded images and embeddings."""
        return sum(len(pick.rows) for task in self.tasks for pick in task) * self.wanted.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
    ) -> list[Any]:
        """One for each list of picks, whose rows become one table."""
        return [
            ray.data.ReadTask(
                partial(feed.read, task, self.wanted),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None),
            )
            for task in self.tasks
        ]


class Reader(NamedTuple):
    """What one worker of a training reads."""

    spec: TrainSpec
    order: feed.Order
    wanted: feed.Wanted
    rank: int
    mailbox: Any = None
    """Where the first worker leaves what it reads, for the others; None: there are none."""


def batches(reader: Reader, *, first_step: int, device: torch.device) -> Iterator[PairBatch]:
    """A worker's share of a run from a step on, a micro batch at a time, on its device.

    While a GPU computes, those of the next step are made in a thread, in memory that the GPU reads by itself.
    A CPU that makes them computes nothing meanwhile.
    """
    pairs = in_memory(reader, first_step)
    if device.type != "cuda":
        yield from (on_device(pair, device) for pair in pairs)
        return
    in_pinned = (pinned(pair, device) for pair in pairs)
    tasks = itertools.repeat(partial(next, in_pinned, None))
    for pair in ahead(tasks, "batch-ahead", ready=reader.spec.forwards):
        yield on_device(pair, device)


def in_memory(reader: Reader, first_step: int) -> Iterator[PairBatch]:
    """The same, in the memory of the host."""
    spec, wanted = reader.spec, reader.wanted
    rows = spec.micro_batch_size or spec.batch_size // spec.num_workers
    for leg in read_ahead(reader, first_step):
        share = feed.Share(leg.first_step, leg.steps, spec.batch_size, reader.rank, spec.num_workers)
        expected, taken = share.positions(), 0
        for table in portions(leg.rows, partial(got, leg.tables), share, rows):
            check_positions(table, expected[taken : taken + len(table)])
            taken += len(table)
            yield paired(table, wanted)


def portions(
    lengths: Sequence[int],
    fetched: Callable[[Sequence[int]], Iterator[pa.Table]],
    share: feed.Share,
    rows: int,
) -> Iterator[pa.Table]:
    """What one rank trains on, out of tables that together hold the rows of all ranks, in order.

    Args:
        lengths: Rows of each table.
        fetched: Yields the tables of these numbers in turn: all those with rows of this rank.
        share: Of the rank.
        rows: Of each table that is yielded; they divide the rank's rows of a step.
    """
    stops = share.first_step * share.batch_size + np.cumsum(lengths)
    own, starts = share.positions(), stops - lengths
    numbers = np.unique(np.searchsorted(stops, own, side="right")).tolist()
    tables, held = zip(numbers, fetched(numbers), strict=True), list[tuple[int, pa.Table]]()
    for start in own[::rows].tolist():
        held = [(number, table) for number, table in held if stops[number] > start]
        while not held or stops[held[-1][0]] < start + rows:
            held.append(next(tables))
        yield pa.concat_tables(table for _, table in held).slice(start - int(starts[held[0][0]]), rows)


def got(tables: Sequence[Any], numbers: Sequence[int]) -> Iterator[pa.Table]:
    """Tables from Ray's object store; the next two are meanwhile fetched to this machine."""
    for place, number in enumerate(numbers):
        if behind := [tables[later] for later in numbers[place + 1 : place + 3]]:
            ray.wait(behind, num_returns=len(behind), timeout=0)
        yield ray.get(tables[number])


def stretches(spec: TrainSpec, wanted: feed.Wanted, first_step: int) -> Iterator[feed.Share]:
    """The stretch of each leg, for all ranks: short at first, so that training begins soon."""
    store = ray.cluster_resources().get("object_store_memory", 0)
    steps = max(1, feed.table_rows(wanted) // spec.batch_size)  # about a table
    most = max(steps, int(min(LEG_BYTES, store / 12)) // (spec.batch_size * wanted.row_bytes))
    while first_step < spec.budget.steps:
        now = min(steps, spec.budget.steps - first_step)
        yield feed.Share(first_step, now, spec.batch_size, 0, 1)
        first_step, steps = first_step + now, min(2 * steps, most)


def read_ahead(reader: Reader, first_step: int) -> Iterator[Leg]:
    """Every leg, read to its end while those before it are trained on: by the first worker, for all.

    A mix is read as a whole, and every rank trains on some of it: if each rank read for itself, each would
    read everything.  Two legs are read at a time: one alone leaves cores idle while its first task starts and
    its last one ends.

    Ray Data's executor is not left waiting for the training: with all its outputs full it polls in a
    loop and holds the GIL while it does (Ray 2.60: training on two cores went at a third of its rate).
    A leg that has been read to its end has no executor.
    """
    if reader.rank:
        return ahead(itertools.repeat(partial(next, theirs(reader, first_step), None)), "read-ahead")
    shares = enumerate(stretches(reader.spec, reader.wanted, first_step))
    return ahead((partial(ours, reader, number, share) for number, share in shares), "read-ahead", 2)


def ahead(
    tasks: Iterable[Callable[[], T | None]], thread: str, at_a_time: int = 1, *, ready: int = 1
) -> Iterator[T]:
    """What the tasks return, in turn, until one returns None.

    While items are used, threads of this name carry out the next tasks; an error is raised where its item is
    due.

    Args:
        tasks: As many as are asked for.
        thread: Name of the threads.
        at_a_time: How many there are.
        ready: How many items may be ready at a time.
    """
    waiting, pool = iter(tasks), ThreadPoolExecutor(at_a_time, thread_name_prefix=thread)
    try:
        making = deque(pool.submit(task) for task in itertools.islice(waiting, max(at_a_time, ready)))
        while making and (item := making.popleft().result()) is not None:
            making.extend(pool.submit(task) for task in itertools.islice(waiting, 1))
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ours(reader: Reader, number: int, share: feed.Share) -> Leg:
    """Read the leg of this number, and leave it for the other ranks."""
    leg = read_leg(reader.order, share, reader.wanted)
    if reader.mailbox is not None:
        ray.get(reader.mailbox.put.remote(number, leg))
    return leg


def theirs(reader: Reader, first_step: int) -> Iterator[Leg]:
    """Every leg that the first rank reads."""
    for number in itertools.count():
        if first_step >= reader.spec.budget.steps:
            return
        leg: Leg = ray.get(reader.mailbox.take.remote(number))
        yield leg
        first_step = leg.first_step + leg.steps


def read_leg(order: feed.Order, share: feed.Share, wanted: feed.Wanted) -> Leg:
    """The rows of one leg, in order, in Ray's object store; two legs together may use every CPU."""
    tasks = feed.tasks(order, share, wanted)
    readers = max(2, int(ray.cluster_resources().get("CPU", 0)) // 2)
    dataset = ray.data.read_datasource(
        Reads(tasks, wanted), num_cpus=0.25, concurrency=readers, override_num_blocks=len(tasks)
    )  # or Ray splits the output of few tasks into 200 blocks
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # a task is a block: never cut, never joined
    dataset.context.enable_progress_bars = False
    rows = tuple(sum(len(pick.rows) for pick in task) for task in tasks)
    tables = dataset.materialize().to_arrow_refs()
    assert len(tables) == len(rows), (len(tables), len(rows))
    return Leg(share.first_step, share.steps, tuple(tables), rows)


def check_positions(table: pa.Table, expected: NDArray[np.int64]) -> None:
    """Refuse rows that are not the next in order: with them a restart would not be exact."""
    found = table["position"].to_numpy()
    if not np.array_equal(found, expected):
        raise RuntimeError(f"Ray Data handed out row {found[0]} where row {expected[0]} was due")


def paired(table: pa.Table, wanted: feed.Wanted) -> PairBatch:
    """A table as tensors; images of height and width 0 where none are wanted."""
    side, rows = wanted.image_size, len(table)
    pixels, embedding = np.zeros(0, np.uint8), None
    if side:
        image, width = table["image"].combine_chunks(), 3 * side**2
        pixels = np.frombuffer(image.buffers()[1], np.uint8)[image.offset * width :][: rows * width]
    if wanted.embeddings:
        embedding = torch.from_numpy(feed.numbers_of(table).copy())
    tokens = table["tokens"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    label = torch.tensor(table["label"].to_numpy()) if "label" in table.column_names else None
    return PairBatch(
        image=torch.from_numpy(pixels.reshape(rows, 3, side, side).copy()),
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        label=label,
        embedding=embedding,
    )


def pinned(pair: PairBatch, gpu: torch.device) -> PairBatch:
    """The same in memory that stays where it is, so that this GPU can read it beside its work."""
    with torch.cuda.device(gpu):  # a thread begins with the first one, and would take memory there
        return PairBatch._make(None if part is None else part.pin_memory() for part in pair)


def on_device(pair: PairBatch, device: torch.device) -> PairBatch:
    """The same on a device, which reads pinned memory when it comes to it."""
    return PairBatch._make(None if part is None else part.to(device, non_blocking=True) for part in pair)
