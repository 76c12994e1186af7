"""What a training run reads, and in which order: row k of a run is a function of (data, seed, k) alone.

An epoch is a permutation of the row groups of all files, drawn from (seed, epoch).  Up to eight
consecutive groups form a mix (fewer if the images are too large for one task to hold them), whose
rows are permuted by (seed, epoch, mix).  Rejected rows are in no mix.  Epochs follow each other
without a seam, so step s of a run trains on the rows [s * batch, (s + 1) * batch), and rank r of n on
the r-th of n equal parts of them: the step alone says what has been read, and a restart, on any
number of workers, reads exactly the rest.

Imports neither Ray nor torch, so that read processes start fast.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dd_core import sealed
from dd_core.addresses import is_address
from workflows.labels import LabelSpec, label_of
from workflows.row_groups import (
    PREPARE,
    REMAKE,
    DataError,
    first_line,
    groups_of,
    parquet_of,
    patiently,
    row_group,
)
from workflows.storage import Home

GROUPS_PER_MIX = 8
"""At most: one task reads a whole mix."""
TABLE_BYTES = 32 * 2**20
"""At most, of decoded images and embeddings in one table that a read task yields."""
TABLE_ROWS = 16_384
"""Of one table at most: the arguments of a task list its rows, and Ray 2.60 fails on a task of a megabyte."""
TASK_TABLES = 4
"""Of one task at most, unless a single row group has more: Ray makes one block of all of them."""
AT_ONCE = 8
"""Row groups that a task fetches at once from a store, where each takes several requests."""
EMBEDDINGS = 1
"""Changes when the same images and the same CLIP would give other embeddings (workflows.embeddings)."""
EMBEDDING = "embedding"
"""Column of the sidecars."""


class Wanted(NamedTuple):
    """What a stage reads of each row."""

    image_size: int = 0
    """Side of the images; 0: none are read."""
    label: LabelSpec | None = None
    embeddings: str = ""
    """Address of the directory where each prepared file has a sidecar of its own name (workflows.embeddings);
    empty: none are read."""
    width: int = 0
    """Length of an embedding."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those to read from the prepared files."""
        image = (f"image{self.image_size}",) if self.image_size else ()
        return (*image, "tokens", *(("meta",) if self.label else ()))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row once it is read, apart from its few tokens."""
        return 3 * self.image_size**2 + 4 * self.width

    def sidecar(self, url: str) -> str:
        """Address of the sidecar of a prepared file."""
        return f"{self.embeddings}/{url.rpartition('/')[2]}"


class Pieces(NamedTuple):
    """The row groups of all files that have a usable row; entry i of each array is row group i."""

    files: tuple[str, ...]
    file: NDArray[np.int32]
    group: NDArray[np.int32]
    rows: NDArray[np.int64]
    """Number of usable rows."""


class Pick(NamedTuple):
    """Some rows of one mix, in the order in which they are wanted."""

    groups: tuple[tuple[str, int], ...]
    """File and row group of each piece of the mix."""
    seed: tuple[int, int, int]
    rows: NDArray[np.int64]
    """Indices into the permuted mix."""
    positions: NDArray[np.int64]
    """The same rows, counted from the beginning of the run."""


class Share(NamedTuple):
    """What one rank reads in a stretch of a run."""

    first_step: int
    steps: int
    batch_size: int
    """Over all ranks."""
    rank: int
    ranks: int

    def positions(self) -> NDArray[np.int64]:
        """Position of every row, counted from the beginning of the run, in order."""
        own = self.batch_size // self.ranks
        starts = (self.first_step + np.arange(self.steps)) * self.batch_size + self.rank * own
        return (starts[:, None] + np.arange(own)).ravel()


def survey(files: Sequence[str], wanted: Wanted) -> Pieces:
    """Find the usable rows of prepared files.

    Raises:
        DataError: A file is gone or damaged, lacks a column or its sidecar, or no row at all is usable.
        StorageError: The store is away.
    """
    noted = noted_rows(files)
    with ThreadPoolExecutor(16) as pool:
        every = list(pool.map(lambda url: usable_rows(url, wanted, noted.get(url, ())), files))
    pieces = ((file, group, rows) for file, groups in enumerate(every) for group, rows in enumerate(groups))
    if not (found := [piece for piece in pieces if piece[2]]):
        raise DataError(
            f"no usable pair in {len(files)} files of prepared data; look at their column 'reject'"
        )
    file_of, group_of, rows = np.array(found).T
    return Pieces(tuple(files), file_of.astype(np.int32), group_of.astype(np.int32), rows.astype(np.int64))


def noted_rows(files: Sequence[str]) -> dict[str, Sequence[int]]:
    """File -> usable rows of each row group, as the manifest notes them; empty if it does not."""
    home = Home.of(files[0].rpartition("/")[0])
    parts = home.facts(sealed.MANIFEST).get("parts", [])
    return {home.at(part["file"]).address: part.get("usable", ()) for part in parts}


def usable_rows(url: str, wanted: Wanted, noted: Sequence[int]) -> Sequence[int]:
    """Usable rows of each row group of a file, as noted or else counted; columns and sidecar are checked."""

    def look() -> tuple[Sequence[int], list[int]]:
        with parquet_of(url) as parquet:
            check_columns(url, parquet, (*wanted.columns, "reject"))
            groups = groups_of(parquet)
            if len(noted) == len(groups):
                return noted, groups
            rejects = [parquet.read_row_group(group, ["reject"])["reject"] for group in range(len(groups))]
            return [pc.sum(pc.equal(column, "")).as_py() or 0 for column in rejects], groups

    try:
        found, groups = patiently(look, url)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{url}: {first_line(error)}; {PREPARE}") from None
    if wanted.embeddings:
        check_sidecar(wanted.sidecar(url), groups, wanted.width)
    return found


def check_columns(url: str, parquet: pq.ParquetFile, columns: Sequence[str]) -> None:
    """Refuse a prepared file that lacks a column."""
    names = parquet.schema_arrow.names
    for column in columns:
        if column not in names:
            raise DataError(
                f"{url} has no column {column!r}, it has {', '.join(names)}; prepare the pairs with this size"
            )


def check_sidecar(url: str, groups: Sequence[int], width: int) -> None:
    """Refuse embeddings that are missing, have other row groups than their file, or are of another width."""
    try:
        kind, rows = patiently(lambda: shape_of(url), url)
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise DataError(f"{url}: {first_line(error)}; {REMAKE}") from None
    if rows != groups:
        raise DataError(f"{url} has other rows than the prepared file of its name; {REMAKE}")
    if kind != pa.list_(pa.float32(), width):
        raise DataError(f"{url} holds {kind}, the stage reads embeddings of {width} numbers; {REMAKE}")


def shape_of(url: str) -> tuple[pa.DataType, list[int]]:
    """The type of a sidecar's embeddings, and the rows of each of its row groups."""
    with parquet_of(url) as parquet:
        return parquet.schema_arrow.field(EMBEDDING).type, groups_of(parquet)


class Order:
    """The order of a whole run.

    Args:
        pieces: From `survey`.
        seed: Of the run.
        wanted: What is read of each row: the larger that is, the fewer row groups form a mix.
    """

    def __init__(self, pieces: Pieces, seed: int, wanted: Wanted) -> None:
        self.pieces, self.seed, self.rows = pieces, seed, int(pieces.rows.sum())
        in_a_task = TASK_TABLES * table_rows(wanted) // int(pieces.rows.max())
        self.mix = max(1, min(GROUPS_PER_MIX, in_a_task))
        """Row groups of a mix."""
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted pieces of an epoch, and where each mix begins (the end of the last included)."""
        permuted = np.random.default_rng((self.seed, epoch)).permutation(len(self.pieces.rows))
        stops = np.cumsum(self.pieces.rows[permuted])
        ends = np.append(stops[self.mix - 1 : -1 : self.mix], stops[-1])
        return permuted, np.concatenate([[0], ends])

    def picks(self, positions: NDArray[np.int64]) -> list[Pick]:
        """Where the rows at these ascending positions lie, one entry for each mix."""
        found: list[Pick] = []
        epochs = positions // self.rows
        for epoch in np.unique(epochs).tolist():
            permuted, edges = self.epoch(epoch)
            wanted = positions[epochs == epoch]
            places = wanted - epoch * self.rows
            mixes = np.searchsorted(edges, places, side="right") - 1
            found_mixes, begins = np.unique(mixes, return_index=True)  # they ascend, as the positions do
            for mix, begin, end in zip(found_mixes.tolist(), begins, [*begins[1:], len(mixes)], strict=True):
                inside = slice(begin, end)
                pieces = permuted[mix * self.mix : (mix + 1) * self.mix].tolist()
                groups = tuple(
                    (self.pieces.files[self.pieces.file[i]], int(self.pieces.group[i])) for i in pieces
                )
                rows = places[inside] - edges[mix]
                found.append(Pick(groups, (self.seed, epoch, mix), rows, wanted[inside]))
        return found


def tasks(order: Order, share: Share, wanted: Wanted) -> list[list[Pick]]:
    """The reads of one rank, by task: picks that fit in one table, or a larger pick; mixes are read whole."""
    found, room = list[list[Pick]](), 0
    for pick in order.picks(share.positions()):
        if len(pick.rows) > room:
            found.append([])
            room = table_rows(wanted)
        found[-1].append(pick)
        room -= len(pick.rows)
    return found


def table_rows(wanted: Wanted) -> int:
    """Most rows of one table."""
    return max(1, min(TABLE_ROWS, TABLE_BYTES // wanted.row_bytes))


def read(picks: Sequence[Pick], wanted: Wanted) -> Iterator[pa.Table]:
    """The rows of one task, in order, as tables: tokens, position and what is wanted.

    That is image (bytes of uint8 [3, s, s]), embedding (float32 [d]), label.
    """
    groups = [group for pick in picks for group in pick.groups]
    with ThreadPoolExecutor(AT_ONCE if is_address(groups[0][0]) else 1) as pool:
        stored = pool.map(lambda place: usable(place[0], place[1], wanted), groups)
        rows = pa.concat_tables([picked(pick, stored) for pick in picks])
    for start in range(0, len(rows), table_rows(wanted)):
        yield ready(rows.slice(start, table_rows(wanted)), wanted)


def picked(pick: Pick, stored: Iterator[pa.Table]) -> pa.Table:
    """Some rows of one mix, whose groups come next, as they are stored, each with its position."""
    table = pa.concat_tables(itertools.islice(stored, len(pick.groups)))
    permutation = np.random.default_rng(pick.seed).permutation(len(table))
    rows = table.take(pa.array(permutation[pick.rows]))
    return rows.append_column("position", pa.array(pick.positions))


def ready(table: pa.Table, wanted: Wanted) -> pa.Table:
    """Rows with their images decoded and their labels found."""
    found = {name: table[name].combine_chunks() for name in ("tokens", "position")}
    if side := wanted.image_size:
        memory = pa.py_buffer(decoded(table[f"image{side}"].to_pylist(), side))
        kind = pa.binary(3 * side**2)
        found["image"] = pa.FixedSizeBinaryArray.from_buffers(kind, len(table), [None, memory])
    if wanted.embeddings:
        found[EMBEDDING] = table[EMBEDDING].combine_chunks()
    if (label := wanted.label) is not None:
        found["label"] = pa.array([label_of(meta, label) for meta in table["meta"].to_pylist()], pa.int64())
    return pa.table(found)


def usable(url: str, group: int, wanted: Wanted) -> pa.Table:
    """The rows of a row group that were not rejected, each with its embedding if that is wanted.

    Raises:
        DataError: A file is gone, cut or changed.
        StorageError: The store is away.
    """
    table = row_group(url, group, [*wanted.columns, "reject"], PREPARE)
    if wanted.embeddings:
        beside = row_group(wanted.sidecar(url), group, [EMBEDDING], REMAKE)
        if len(beside) != len(table):
            raise DataError(f"{wanted.sidecar(url)} has other rows than the prepared file; {REMAKE}")
        table = table.append_column(EMBEDDING, beside[EMBEDDING])
    rows = table.filter(pc.equal(table["reject"], "")).drop_columns("reject")
    if wanted.embeddings and not numbers_of(rows).any(axis=1).all():
        raise DataError(f"{wanted.sidecar(url)} lacks embeddings of usable rows; {REMAKE}")
    return rows


def numbers_of(table: pa.Table) -> NDArray[np.float32]:
    """The embeddings of a table, [rows, d].

    Those of rejected rows are zeros: pyarrow cannot read back null lists of a fixed size (version 25).
    """
    found: NDArray[np.float32] = table[EMBEDDING].combine_chunks().flatten().to_numpy()
    return found.reshape(len(table), table.schema.field(EMBEDDING).type.list_size)


def decoded(files: Sequence[bytes], side: int) -> NDArray[np.uint8]:
    """PNGs of our own making, decoded, [n, 3, side, side]."""
    pixels = np.empty((len(files), 3, side, side), np.uint8)
    for planes, data in zip(pixels, files, strict=True):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert image is not None
        assert image.shape == (side, side, 3), image.shape
        cv2.split(image, list(planes))  # into them
    return pixels


def prepared_files(data: Home | Path | str) -> list[str]:
    """The addresses of the Parquet files of a prepared directory.

    Raises:
        DataError: It is not there or not finished.
    """
    home = Home.of(data)
    names, listed = home.names(), home.facts(sealed.MANIFEST).get("files")
    files = [home.at(name).address for name in sorted(listed or names) if fnmatch(name, "part-*.parquet")]
    if sealed.MANIFEST not in names or not files:
        raise DataError(
            f"{home.address} is no finished prepared data; run `ddiff data prepare --out {home.address}`"
        )
    return files
