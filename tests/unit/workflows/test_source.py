"""An epoch holds every usable row once, also across a restart; a changed bit is found."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from tests.conftest import needs_ray
from workflows.epochs import Ledger, epoch_order, merged
from workflows.pairs import pairs_schema
from workflows.source import Shards, usable_tables

SCHEMA = pairs_schema((8,))


def write_prepared(path: Path, count: int) -> str:
    rows = [
        {"shard": 0, "place": i, "key": f"{i}", "reject": "image-broken: bad" if i % 5 == 4 else ""}
        for i in range(count)
    ]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        path,
        row_group_size=3,
        write_page_checksum=True,
        compression="none",
    )
    return str(path)


def places(url: str, done: frozenset[int] = frozenset(), epoch: int = 0) -> list[int]:
    return [p for t in usable_tables(url, 7, done, epoch, ["key"]) for p in t["place"].to_pylist()]


def test_a_restart_reads_exactly_the_rest(tmp_path: Path) -> None:
    url = write_prepared(tmp_path / "a.parquet", 20)
    whole = places(url)
    assert sorted(whole) == [i for i in range(20) if i % 5 != 4]
    ranks = [Ledger(), Ledger()]
    ranks[0].record(0, [7] * 5, whole[:5])
    ranks[1].record(0, [7] * 4, whole[9:13])
    done = merged([rank.facts() for rank in ranks]).done(7)
    assert sorted([*done, *places(url, done)]) == sorted(whole)
    assert merged([ranks[0].facts(), Ledger(epoch=1).facts()]).facts() == {"epoch": 1, "seen": {}}


def test_every_epoch_has_an_order_of_its_own_and_repeats_it(tmp_path: Path) -> None:
    url = write_prepared(tmp_path / "a.parquet", 40)
    assert places(url, epoch=1) == places(url, epoch=1) != places(url, epoch=2)
    assert sorted(places(url, epoch=1)) == sorted(places(url, epoch=2))
    assert epoch_order(3, 0, 50) == epoch_order(3, 0, 50) != epoch_order(3, 1, 50)
    assert sorted(epoch_order(3, 1, 50)) == list(range(50))


def test_the_place_is_the_row_in_the_file(tmp_path: Path) -> None:
    url = write_prepared(tmp_path / "a.parquet", 20)
    for table in usable_tables(url, 7, frozenset(), 3, ["key"]):
        assert table["key"].to_pylist() == [str(place) for place in table["place"].to_pylist()]
        assert set(table["file"].to_pylist()) == {7}
        assert set(table["epoch"].to_pylist()) == {3}


def test_a_flipped_bit_in_prepared_data_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_prepared(path, 20)
    data = bytearray(path.read_bytes())
    data[data.index(b"image-broken: bad") + 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(OSError, match="CRC"):
        places(str(path))
    assert pq.read_table(path) is not None  # without the check it loads


def test_a_ray_that_does_not_count_executions_is_refused(tmp_path: Path) -> None:
    source = Shards(["a"], usable_tables, seed=0, ledger=Ledger())
    with pytest.raises(RuntimeError, match="does not count executions"):
        source.get_read_tasks(1, None, object())


@needs_ray
def test_an_execution_is_an_epoch_and_only_the_first_leaves_the_ledger_out(
    local_ray: None, tmp_path: Path
) -> None:
    urls = [write_prepared(tmp_path / f"{i}.parquet", 10) for i in range(3)]
    ledger = Ledger(epoch=4)
    ledger.record(4, [0, 0, 2], [0, 1, 3])
    dataset = ray.data.read_datasource(
        Shards(urls, partial(usable_tables, columns=("key",)), seed=1, ledger=ledger)
    )
    every = {(file, place) for file in range(3) for place in range(10) if place % 5 != 4}
    for epoch, want in ((4, every - {(0, 0), (0, 1), (2, 3)}), (5, every), (6, every)):
        rows = list(dataset.iter_rows())
        assert sorted((row["file"], row["place"]) for row in rows) == sorted(want)
        assert {row["epoch"] for row in rows} == {epoch}
