"""Several workers of one training: each gets its own rows, and together they read what one would alone."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dd_core.nets.clip import ClipNetSpec
from dd_core.stage import Budget, OptimizerSpec, PairBatch
from dd_core.stages.clip import ClipSpec
from tests.prepared import write_prepared
from workflows import feed, reading
from workflows.feed import Order, Share, Wanted
from workflows.mailbox import Leg, Mailbox
from workflows.reading import Reader, ahead, batches, portions
from workflows.train_spec import TrainSpec

SIZE, BATCH, STEPS, FIRST = 16, 12, 20, 3
WANTED = Wanted(SIZE)
DEVICE = torch.device("cpu")


def spec_of(workers: int, micro: int | None = None) -> TrainSpec:
    return TrainSpec(
        name="clip",
        stage=ClipSpec(net=ClipNetSpec(image_size=SIZE)),
        optimizer=OptimizerSpec(learning_rate=1e-3),
        budget=Budget(steps=STEPS, checkpoint_every=STEPS),
        batch_size=BATCH,
        num_workers=workers,
        micro_batch_size=micro,
        seed=3,
    )


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    data = write_prepared(tmp_path_factory.mktemp("reading") / "prepared", files=3, rows=80, rejected=3)
    return Order(feed.survey(feed.prepared_files(data), WANTED), 3, WANTED)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that are read, of all workers; without Ray, tables lie in the memory of this process."""
    found, real, counting = Counter[str](), feed.row_group, threading.Lock()

    def counted(url: str, group: int, columns: Any, remedy: str) -> pa.Table:
        table = real(url, group, columns, remedy)
        with counting:  # two legs are read at a time
            found["bytes"] += table.nbytes
        return table

    def read_here(order: Order, share: Share, wanted: Wanted) -> Leg:
        tables = [pa.concat_tables(feed.read(task, wanted)) for task in feed.tasks(order, share, wanted)]
        return Leg(share.first_step, share.steps, tuple(tables), tuple(map(len, tables)))

    def at_hand(result: Any) -> Any:
        return result.result() if isinstance(result, Future) else result

    ray = SimpleNamespace(
        get=at_hand, wait=lambda *_, **__: None, cluster_resources=lambda: {"object_store_memory": 10**7}
    )
    monkeypatch.setattr(feed, "row_group", counted)
    monkeypatch.setattr(feed, "TABLE_BYTES", 40 * WANTED.row_bytes)
    monkeypatch.setattr(reading, "read_leg", read_here)
    monkeypatch.setattr(reading, "ray", ray)
    return found


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Where mailboxes live, as actors do."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def actor(box: Mailbox, loop: asyncio.AbstractEventLoop) -> Any:
    def method(name: str) -> Any:
        act = getattr(box, name)
        return SimpleNamespace(remote=lambda *words: asyncio.run_coroutine_threadsafe(act(*words), loop))

    return SimpleNamespace(put=method("put"), take=method("take"))


def trained_on(workers: int, micro: int | None, order: Order, loop: asyncio.AbstractEventLoop) -> Any:
    """The number of every pair of every step, [steps, batch], as the ranks see them, step by step."""
    box = Mailbox(workers - 1)
    shelf = actor(box, loop) if workers > 1 else None
    spec = spec_of(workers, micro)
    supplies = [
        batches(Reader(spec, order, WANTED, rank, shelf), first_step=FIRST, device=DEVICE)
        for rank in range(workers)
    ]
    forwards = BATCH // workers // (micro or BATCH // workers)
    rows = [
        [int(n) - 1 for supply in supplies for _ in range(forwards) for n in next(supply).tokens[:, 1]]
        for _ in range(STEPS - FIRST)
    ]
    assert [next(supply, None) for supply in supplies] == [None] * workers
    assert not box.legs
    return rows


@pytest.mark.parametrize(("workers", "micro"), [(2, None), (2, 3), (3, 2), (4, 1)])
def test_workers_together_read_the_bytes_that_one_reads_alone_and_train_on_the_same_pairs(
    workers: int,
    micro: int | None,
    order: Order,
    read_bytes: Counter[str],
    loop: asyncio.AbstractEventLoop,
) -> None:
    alone = trained_on(1, None, order, loop)
    once = read_bytes.pop("bytes")
    assert trained_on(workers, micro, order, loop) == alone
    assert read_bytes.pop("bytes") == once


def test_if_each_worker_read_its_own_rows_all_would_be_read_by_each(
    order: Order, read_bytes: Counter[str]
) -> None:
    def read(share: Share) -> int:
        for task in feed.tasks(order, share, WANTED):
            list(feed.read(task, WANTED))
        return read_bytes.pop("bytes")

    whole = read(Share(0, STEPS, BATCH, 0, 1))
    assert [read(Share(0, STEPS, BATCH, rank, 2)) for rank in (0, 1)] == [whole, whole]


def test_a_gpu_trains_on_the_same_pairs_which_are_pinned_ahead_and_moved_when_their_turn_comes(
    order: Order, read_bytes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(spec_of(1), order, WANTED, 0, None)
    gpu, here = torch.device("cuda", 1), torch.get_default_device()
    seen, second = list[str](), threading.Event()

    def pinned(pair: PairBatch, device: torch.device) -> PairBatch:
        assert device == gpu
        seen.append(f"pinned by {threading.current_thread().name.split('_')[0]}")
        if seen.count("pinned by batch-ahead") == 2:
            second.set()
        return pair

    def on_device(pair: PairBatch, device: torch.device) -> PairBatch:
        assert device == gpu
        seen.append(f"moved by {threading.current_thread().name}")
        return pair

    expected = list(batches(reader, first_step=FIRST, device=here))
    monkeypatch.setattr(reading, "pinned", pinned)
    monkeypatch.setattr(reading, "on_device", on_device)
    supply = batches(reader, first_step=FIRST, device=gpu)
    found = [next(supply)]
    assert second.wait(30)  # without being asked for
    found += supply
    assert len(found) == len(expected) == STEPS - FIRST
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.tokens, other.tokens)
    assert Counter(seen) == {"pinned by batch-ahead": STEPS - FIRST, "moved by MainThread": STEPS - FIRST}


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_an_error_made_ahead_is_raised_where_its_item_is_due(at_a_time: int) -> None:
    def broken() -> int:
        raise OSError("the disk")

    supply = ahead([lambda: 1, lambda: 2, broken], "test", at_a_time)
    assert [next(supply), next(supply)] == [1, 2]
    with pytest.raises(OSError, match="the disk"):
        next(supply)


def test_as_many_items_as_are_drawn_at_once_are_made_before_any_of_them_is_asked_for() -> None:
    begun, enough = list[int](), threading.Event()

    def made(number: int) -> int:
        begun.append(number)
        if number == 5:
            enough.set()
        return number

    supply = ahead((partial(made, number) for number in range(9)), "test", ready=3)
    assert [next(supply) for _ in range(3)] == [
        0,
        1,
        2,
    ]  # of one step; as many of the next are made meanwhile
    assert enough.wait(20)
    assert list(supply) == [3, 4, 5, 6, 7, 8]
    assert begun == [*range(9)]


def test_what_is_made_two_at_a_time_comes_in_order_and_no_further_ahead() -> None:
    begun, second = list[int](), threading.Event()

    def made(number: int) -> int:
        begun.append(number)
        if number == 1:
            second.set()
        elif number == 0:
            assert second.wait(20), "the second is not made beside the first"
        return number

    supply = ahead((partial(made, number) for number in range(6)), "test", 2)
    for number in range(6):
        assert next(supply) == number
        time.sleep(0.05)  # for one that should not begin yet
        assert max(begun) <= number + 2
    assert next(supply, None) is None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ranks", "rows"), [(1, 12), (1, 5), (2, 6), (3, 2), (4, 3), (12, 1)])
def test_a_rank_gets_its_rows_in_order_however_the_tables_are_cut_and_asks_for_no_table_in_vain(
    ranks: int, rows: int, seed: int
) -> None:
    share = Share(2, 10, BATCH * rows if rows == 5 else BATCH, 0, 1)
    every = share.positions()
    rng = np.random.default_rng(seed)
    cuts = np.unique([0, len(every), *rng.integers(0, len(every), int(rng.integers(1, 30)))])
    tables = [pa.table({"position": every[a:b]}) for a, b in itertools.pairwise(cuts)]
    for rank in range(ranks):
        own, asked = share._replace(rank=rank, ranks=ranks), list[int]()

        def fetched(numbers: Sequence[int], asked: list[int] = asked) -> Iterator[pa.Table]:
            asked.extend(numbers)
            return (tables[number] for number in numbers)

        found = list(portions([len(one) for one in tables], fetched, own, rows))
        assert all(len(one) == rows for one in found)
        assert np.array_equal(np.concatenate([one["position"].to_numpy() for one in found]), own.positions())
        mine = set(own.positions().tolist())
        assert asked == [n for n, one in enumerate(tables) if mine & set(one["position"].to_pylist())]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_tables_are_brought_before_the_rank_needs_them_and_none_that_it_does_not(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    share, length = Share(0, 10, 64, 0, ranks), 8
    every = share._replace(ranks=1).positions().reshape(-1, length)
    tables = [pa.table({"position": positions}) for positions in every]
    for rank in range(ranks):
        brought, cold, asked = set[int](), list[int](), set[int]()

        def wait(behind: list[pa.Table], brought: set[int] = brought, **_: int) -> None:
            brought.update(table["position"][0].as_py() for table in behind)

        def get(
            table: pa.Table, brought: set[int] = brought, cold: list[int] = cold, asked: set[int] = asked
        ) -> pa.Table:
            first = table["position"][0].as_py()
            asked.add(first)
            if first not in brought:
                cold.append(first)
            return table

        monkeypatch.setattr(reading, "ray", SimpleNamespace(wait=wait, get=get))
        own = share._replace(rank=rank)
        list(portions([length] * len(tables), partial(reading.got, tables), own, 64 // ranks))
        assert cold == own.positions()[:1].tolist()
        assert brought == asked - set(cold)


def test_a_mailbox_keeps_a_leg_until_all_have_taken_it_and_who_comes_early_waits() -> None:
    legs = [Leg(step, 1, (), ()) for step in range(3)]

    async def play() -> None:
        box = Mailbox(2)
        early = asyncio.ensure_future(box.take(1))
        await box.put(0, legs[0])
        assert await box.take(0) == legs[0]
        assert not early.done()
        await box.put(1, legs[1])
        assert await early == legs[1]
        assert set(box.legs) == {0, 1}
        assert await box.take(0) == legs[0]
        assert await box.take(1) == legs[1]
        assert not box.legs

    asyncio.run(play())
