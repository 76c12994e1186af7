"""A store that fails, cuts and swaps gives the same samples as one that does not, or says why not."""

import socket
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.core import S3File

from dd_core import sealed
from jobs.failures import Code, code_of
from tests.answering import answering
from tests.conftest import write_shard
from tests.faults.flaky_store import flaky_store
from tests.s3 import s3_server
from workflows.files import DamagedError, MissingShardError, ShardFile, fingerprint, located
from workflows.parts import SOURCE, UNFINISHED, plain_writer, resumed
from workflows.row_groups import row_group
from workflows.shards import Limits, Sample, samples
from workflows.storage import Home, StorageError

pytestmark = pytest.mark.fault
FILES = {f"{i:03d}.{ext}": f"{ext}{i}".encode() * 9000 for i in range(60) for ext in ("jpg", "txt")}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a.tar", FILES)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workflows.files.time.sleep", lambda _: None)


def read(url: str) -> list[Sample]:
    return list(samples(url, Limits()))


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_faults_at_random_change_nothing(shard: Path, seed: int, *, ranges: bool) -> None:
    random = Random(seed)
    faults = [random.choice(["503", "cut", "short"]) for _ in range(4)]
    faults.insert(random.randrange(5), "ok")  # a good answer in between; a second one would end the reading
    with flaky_store(shard.parent, faults, ranges=ranges) as store:
        assert read(f"{store.url}/a.tar") == read(str(shard))
        assert store.faults == []
        assert len(store.asked) > len(faults)


def test_a_store_that_fails_for_good_says_nothing_of_its_shards(shard: Path) -> None:
    with (
        flaky_store(shard.parent, ["503"] * 100) as store,
        pytest.raises(StorageError, match=r"a\.tar cannot be read at byte 0: 503.* run the same command"),
    ):
        read(f"{store.url}/a.tar")


def test_a_shard_that_disappears_between_listing_and_reading_is_told(shard: Path) -> None:
    with flaky_store(shard.parent, []) as store:
        (found,) = located([f"{store.url}/a.tar"])
        shard.unlink()
        (only,) = read(found.url)
    assert only.reject.startswith(f"shard: {store.url}/a.tar cannot be read at byte 0: ")


def test_a_shard_that_is_replaced_while_it_is_read_is_not_mixed(shard: Path) -> None:
    good = read(str(shard))
    other = write_shard(shard.with_name("b.tar"), {name: data[::-1] for name, data in FILES.items()})
    with flaky_store(shard.parent, ["cut"]) as store:
        store.swaps["/a.tar"] = other.read_bytes()
        *kept, last = read(f"{store.url}/a.tar")
    assert kept == good[: len(kept)]
    assert "was replaced while it was read" in last.reject


def test_the_length_that_the_store_told_is_held_against_what_came(shard: Path) -> None:
    file = ShardFile(str(shard), attempts=2)
    file.read(10)
    with shard.open("r+b") as written:
        written.truncate(5000)
    with pytest.raises(DamagedError, match=r"replaced|cannot be read at byte"):
        file.read(10_000_000)


def addresses(names: list[str]) -> list[str]:
    return [found.url for found in located(names)]


def test_names_expand_to_every_shard_once(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "02.tar", "x.txt"):
        (tmp_path / name).write_bytes(b"x")
    every = [str(tmp_path / f"0{i}.tar") for i in range(3)]
    assert addresses([f"{tmp_path}/{{00..02}}.tar"]) == every
    assert addresses([f"{tmp_path}/*.tar"]) == addresses([f"{tmp_path}/0?.tar"]) == every
    assert addresses([str(tmp_path)]) == every
    assert addresses([f"file://{tmp_path}/{{00,01}}.tar", f"{tmp_path}/*.tar"]) == every
    with flaky_store(tmp_path, []) as store:
        assert addresses([f"{store.url}/{{00..01}}.tar"]) == [f"{store.url}/00.tar", f"{store.url}/01.tar"]
        with pytest.raises(MissingShardError, match=r"05.tar does not exist, .*\(and 1 more\)"):
            addresses([f"{store.url}/{{02,05,06}}.tar"])


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["{tmp}/nothing.tar"], "nothing.tar does not exist, or no tar"),
        (["{tmp}/*.tar"], r"\*.tar does not exist, or no tar"),
        (["{tmp}"], "no tar is there"),
        ([], "no shards are named"),
        ([""], "no shards are named, or one by nothing"),
        (["{tmp}/{0..2.tar"], "unclosed brace"),
        (["nowhere://a.tar"], "cannot be opened: "),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_before_work_starts(
    tmp_path: Path, names: list[str], error: str
) -> None:
    with pytest.raises(MissingShardError, match=error):
        located([name.replace("{tmp}", str(tmp_path)) for name in names])


def test_a_server_that_is_not_there_is_not_taken_for_shards_that_are_not() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        name = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        with pytest.raises(StorageError, match=r"a.tar cannot be looked up: .*; check the address") as error:
            located([name])
    assert code_of(error.value) is Code.INTERNAL


@pytest.mark.parametrize(("status", "missing"), [(404, True), (410, True), (403, False), (503, False)])
def test_a_server_that_denies_or_fails_is_away_and_one_that_knows_of_none_has_none(
    status: int, missing: bool
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with (
        answering(Handler) as url,
        pytest.raises(MissingShardError if missing else StorageError, match=r"a\.tar"),
    ):
        located([f"{url}/a.tar"])


def test_the_fingerprint_of_a_source_changes_when_a_shard_does(shard: Path) -> None:
    before = fingerprint(located([str(shard)]))
    assert before == fingerprint(located([str(shard)]))
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert before != fingerprint(located([str(shard)]))


class Counting(MemoryFileSystem):
    """Knows what it was asked for."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[Counter[str]] = Counter()
    removed: ClassVar[list[str | list[str]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("counting://")))

    def info(self, path: str, **options: Any) -> Any:
        self.asked[path] += 1
        return super().info(path, **options)

    def rm(self, path: str | list[str], **options: Any) -> None:
        self.removed.append(path)
        super().rm(path, **options)


def test_a_store_is_asked_once_for_each_shard_that_a_glob_matches() -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    fs = fsspec.filesystem("counting")
    for number in range(40):
        fs.pipe(f"/d/{number:02d}.tar", b"x" * number)
    fs.pipe("/d/inner.tar/x", b"")
    alone = located(["counting://d/{00..39}.tar"])
    Counting.asked.clear()
    assert located(["counting://d/*.tar"]) == alone
    assert {Counting.asked[f"/d/{number:02d}.tar"] for number in range(40)} == {1}


def test_what_is_swept_from_a_store_is_removed_at_once() -> None:
    fsspec.register_implementation("counting", Counting, clobber=True)
    fs, home = fsspec.filesystem("counting"), Home("counting://swept")
    notes = [f"{UNFINISHED}/part-{number:05d}.json" for number in range(40)]
    parts = [f"part-{number:05d}.parquet" for number in range(40)]
    for name in (SOURCE, *notes, *parts, sealed.MANIFEST):
        fs.pipe(f"/swept/{name}", b"{}")
    Counting.removed.clear()
    assert resumed(home, "another", ["a"] * 40) == {}
    assert [sorted(str(path).rpartition("swept/")[2] for path in some) for some in Counting.removed] == [
        notes,
        parts,
    ]
    assert home.names() == [UNFINISHED, sealed.MANIFEST]
    assert home.at(UNFINISHED).names() == ["source.json"]


@pytest.mark.filterwarnings("ignore")  # botocore's and aiohttp's, of themselves
def test_of_prepared_data_in_a_store_only_what_is_wanted_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, size, groups = np.random.default_rng(0), 300_000, 12
    with plain_writer(tmp_path / "part.parquet", pa.schema({"a": pa.binary(), "b": pa.binary()})) as writer:
        for _ in range(groups):
            writer.write_table(pa.table({name: [rng.bytes(size // 4) for _ in range(4)] for name in "ab"}))
    fetched: list[int] = []
    real = S3File._fetch_range

    def counted(file: S3File, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return bytes(real(file, start, end))

    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.url_to_fs("s3://bucket")[0].put(str(tmp_path / "part.parquet"), "bucket/part.parquet")
        monkeypatch.setattr(S3File, "_fetch_range", counted)
        table = row_group("s3://bucket/part.parquet", 5, ["b"], "")
    assert table.nbytes >= size
    assert sum(fetched) < size + 2**17  # the end of the file says where the group is
