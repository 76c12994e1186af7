"""What a run reads is a function of data, seed and step: of nothing that happens to the run."""

import io
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from dd_core.labels import UNLABELLED
from jobs.failures import Code, code_of
from tests.prepared import png, write_prepared
from workflows import feed, files, row_groups
from workflows.feed import Order, Share, Wanted
from workflows.held_out import pairs_to_measure_by
from workflows.labels import LabelSpec, label_of
from workflows.row_groups import DataError, row_group
from workflows.storage import StorageError

BATCH = 12
SIZE = 16
WANTED = Wanted(SIZE)
LABEL = LabelSpec(path="things.0.n", classes=("1", "0"))


def order_of(data: Path, seed: int = 3) -> Order:
    return Order(feed.survey(feed.prepared_files(data), WANTED), seed, WANTED)


def captions(order: Order, share: Share) -> list[int]:
    """The number of every pair that a rank trains on, in order."""
    found: list[int] = []
    for task in feed.tasks(order, share, WANTED):
        for table in feed.read(task, WANTED):
            assert table["position"].to_pylist() == share.positions()[len(found) :][: len(table)].tolist()
            found += [tokens[1] - 1 for tokens in table["tokens"].to_pylist()]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("feed") / "prepared", files=3, rows=40, rejected=3)


USABLE = {file * 40 + place for file in range(3) for place in range(3, 40)}


def test_an_epoch_is_every_usable_pair_once_and_each_is_mixed_anew(data: Path) -> None:
    order = order_of(data)
    assert order.rows == len(USABLE)
    drawn = captions(order, Share(0, 3 * order.rows, 1, 0, 1))
    epochs = [drawn[start : start + order.rows] for start in range(0, len(drawn), order.rows)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(USABLE)] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert captions(order_of(data, seed=4), Share(0, order.rows, 1, 0, 1)) != epochs[0]


def test_a_label_is_that_of_its_pair_and_what_is_no_class_is_told_apart(data: Path) -> None:
    wanted = Wanted(SIZE, LABEL)
    order = Order(feed.survey(feed.prepared_files(data), wanted), 3, wanted)
    picks = feed.tasks(order, Share(0, 10, BATCH, 0, 1), wanted)[0]
    (table,) = feed.read(picks, wanted)
    numbers = [tokens[1] - 1 for tokens in table["tokens"].to_pylist()]
    assert table["label"].to_pylist() == [{0: 1, 1: 0, 2: UNLABELLED}[number % 3] for number in numbers]


@pytest.mark.parametrize(
    ("meta", "label"),
    [
        ('{"a": [{"b": "x"}]}', 0),
        ('{"a": [{"b": "z"}]}', UNLABELLED),
        ('{"a": []}', UNLABELLED),
        ('{"a": 3}', UNLABELLED),
        ('{"a": [{"b": true}]}', 2),
        ('{"a": [{"b": "true"}]}', 2),
        ('{"a": [{"b": 3}]}', 3),
        ('{"a": [{"b": null}]}', UNLABELLED),
        ("[]", UNLABELLED),
        (None, UNLABELLED),
    ],
)
def test_a_label_is_what_json_writes_and_a_json_without_one_is_unlabelled(
    meta: str | None, label: int
) -> None:
    assert label_of(meta, LabelSpec(path="a.0.b", classes=("x", "y", "true", "3"))) == label


@pytest.mark.parametrize("cut", [1, 5, 17, 23])
def test_a_run_cut_anywhere_reads_exactly_the_rest(data: Path, cut: int) -> None:
    whole = captions(order_of(data), Share(0, 24, BATCH, 0, 1))
    head = captions(order_of(data), Share(0, cut, BATCH, 0, 1))
    tail = captions(order_of(data), Share(cut, 24 - cut, BATCH, 0, 1))
    assert head + tail == whole


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_global_step_trains_on_the_same_pairs_whatever_the_number_of_workers(
    data: Path, ranks: int
) -> None:
    alone = np.reshape(captions(order_of(data), Share(2, 20, BATCH, 0, 1)), (20, BATCH))
    shares = [Share(2, 20, BATCH, rank, ranks) for rank in range(ranks)]
    together = [np.reshape(captions(order_of(data), share), (20, -1)) for share in shares]
    assert np.array_equal(np.concatenate(together, axis=1), alone)


@pytest.mark.parametrize("table_rows", [1000, 30, 10, 4, 1])
def test_an_epoch_reads_every_row_group_once_however_few_images_a_table_holds(
    data: Path, monkeypatch: pytest.MonkeyPatch, table_rows: int
) -> None:
    monkeypatch.setattr(feed, "TABLE_BYTES", table_rows * WANTED.row_bytes)
    order, reads, real = order_of(data), Counter[tuple[str, int]](), feed.row_group

    def counted(url: str, group: int, *how: Any) -> Any:
        reads[url, group] += 1
        return real(url, group, *how)

    monkeypatch.setattr(feed, "row_group", counted)
    share = Share(0, order.rows, 1, 0, 1)
    assert sorted(captions(order, share)) == sorted(USABLE)
    every = zip(order.pieces.file.tolist(), order.pieces.group.tolist(), strict=True)
    assert reads == Counter((order.pieces.files[file], group) for file, group in every)
    most = max(feed.TASK_TABLES * table_rows, int(order.pieces.rows.max()))
    for task in feed.tasks(order, share, WANTED):
        sizes = [len(table) for table in feed.read(task, WANTED)]
        assert sum(sizes) <= most
        assert sizes[:-1] == [table_rows] * (len(sizes) - 1)


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_picked_from_the_mix_it_lies_in(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    rows = rng.integers(1, 20, count)
    pieces = feed.Pieces(("a",), np.zeros(count, np.int32), np.arange(count, dtype=np.int32), rows)
    order = Order(pieces, seed, WANTED)
    positions = np.flatnonzero(rng.random(3 * order.rows) < rng.random()) + int(rng.integers(order.rows))
    expected: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for position in positions.tolist():
        epoch, place = divmod(position, order.rows)
        edges = order.epoch(epoch)[1].tolist()
        mix = max(number for number, edge in enumerate(edges) if edge <= place)
        expected.setdefault((epoch, mix), []).append((place - edges[mix], position))
    found = order.picks(positions)
    assert [pick.seed for pick in found] == [(seed, *mix) for mix in expected]
    pairs = [list(zip(pick.rows.tolist(), pick.positions.tolist(), strict=True)) for pick in found]
    assert pairs == list(expected.values())
    for pick, (epoch, mix) in zip(found, expected, strict=True):
        groups = order.epoch(epoch)[0][mix * order.mix :][: order.mix].tolist()
        assert pick.groups == tuple(("a", group) for group in groups)


def test_pixels_arrive_as_they_were_prepared(data: Path) -> None:
    order = order_of(data)
    table = next(feed.read(order.picks(np.arange(order.rows)), WANTED))
    for image, tokens in zip(table["image"].to_pylist(), table["tokens"].to_pylist(), strict=True):
        with Image.open(io.BytesIO(png(SIZE, tokens[1] - 1))) as prepared:  # another decoder than ours
            assert image == np.asarray(prepared).transpose(2, 0, 1).tobytes()


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (order_of, "no usable pair in 2 files of prepared data; look at their column 'reject'"),
        (
            lambda data: pairs_to_measure_by(str(data), SIZE, 5),
            "{data} has no usable row; see `ddiff data stats`",
        ),
    ],
    ids=["feed", "held-out"],
)
def test_data_of_which_every_row_was_rejected_are_none(
    read: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    data = write_prepared(tmp_path / "prepared", files=2, rows=20, rejected=20)
    with pytest.raises(DataError) as refused:
        read(data)
    assert str(refused.value) == said.format(data=data)
    assert code_of(refused.value) is Code.DATA


def test_bad_data_is_refused_with_its_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'image64'.*it has key, tokens, image16"):
        feed.survey(feed.prepared_files(data), Wanted(64))
    with pytest.raises(DataError, match="no finished prepared data"):
        feed.prepared_files(tmp_path)
    copy = write_prepared(tmp_path / "cut", files=1)
    order = order_of(copy)
    path = copy / "part-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(DataError, match=r"part-00000.parquet, row group \d+: .*delete it.* prepare the data"):
        captions(order, Share(0, 1, 24, 0, 1))


class AwayError(Exception):
    """As botocore and aiohttp have their own."""


@pytest.mark.parametrize("kind", [TimeoutError, ConnectionResetError, PermissionError, AwayError])
@pytest.mark.parametrize("times", [5, 6])
def test_a_store_that_is_away_is_asked_again_and_is_no_damage(
    data: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], times: int
) -> None:
    real, failures, pauses = (
        row_groups.fsspec.url_to_fs,
        iter([kind("the store is away")] * times),
        list[float](),
    )

    def flaky(*args: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*args, **options)

    monkeypatch.setattr("workflows.row_groups.fsspec.url_to_fs", flaky)
    monkeypatch.setattr("workflows.files.time.sleep", pauses.append)
    url = str(data / "part-00000.parquet")
    if times < files.ATTEMPTS:
        assert len(row_group(url, 0, ["reject"], "")) == 16
    else:
        with pytest.raises(StorageError, match=r"part-00000\.parquet cannot be read: the store is away; run"):
            row_group(url, 0, ["reject"], "")
    assert pauses == sorted(pauses)
    assert len(pauses) == times


def test_the_row_groups_of_a_task_are_fetched_from_a_store_at_the_same_time_and_stay_in_order(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_of(data)
    here = captions(order, Share(0, order.rows, 1, 0, 1))
    there = fsspec.filesystem("memory")
    for file in order.pieces.files:
        there.pipe(f"/feed/{Path(file).name}", Path(file).read_bytes())
    stored = order.pieces._replace(files=tuple(f"memory://feed/{Path(f).name}" for f in order.pieces.files))
    real, together, firsts = feed.row_group, threading.Barrier(2, timeout=30), iter(range(2))

    def met(url: str, group: int, columns: Any, remedy: str) -> Any:
        if next(firsts, None) is not None:
            together.wait()  # for another request
        return real(url, group, columns, remedy)

    monkeypatch.setattr(feed, "row_group", met)
    assert captions(Order(stored, 3, WANTED), Share(0, order.rows, 1, 0, 1)) == here


def test_a_stage_begins_though_the_store_stumbles(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = feed.survey(feed.prepared_files(data), WANTED)
    real, failures = row_groups.fsspec.url_to_fs, iter([AwayError("the store is away")] * 5)

    def flaky(*args: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*args, **options)

    monkeypatch.setattr("workflows.row_groups.fsspec.url_to_fs", flaky)
    monkeypatch.setattr("workflows.files.time.sleep", lambda _: None)
    assert feed.survey(feed.prepared_files(data), WANTED).rows.tolist() == whole.rows.tolist()
    with pytest.raises(DataError, match=r"part-00009.parquet: .*prepare the data again"):
        feed.survey([str(data / "part-00009.parquet")], WANTED)
