"""Pairs of prepared data to evaluate with: held-out ones, else the last.  Read without Ray."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from dd_core import sealed
from dd_core.stage import PairBatch
from workflows import feed
from workflows.labels import LabelSpec
from workflows.pairs import HELD_OUT
from workflows.row_groups import PREPARE, DataError, parquet_of, patiently, row_group
from workflows.storage import Home


class Yardstick(NamedTuple):
    """Pairs to evaluate with."""

    pairs: PairBatch
    """On the CPU."""
    captions: list[str]
    """Of each pair; empty strings if the data has none."""
    held_out: bool
    """Whether no stage was trained on them with this data."""


def pairs_to_measure_by(data: str, side: int, count: int, label: LabelSpec | None = None) -> Yardstick:
    """The last pairs that were held out, or, where none were, the last usable ones; in their order.

    Args:
        data: Directory or address of prepared data.
        side: Of the images, in pixels.
        count: How many; fewer if there are no more.
        label: Where to find their labels, if labels are wanted.

    Raises:
        DataError: The data are missing, unfinished or damaged, have no images of this side, or no usable row.
        StorageError: The store is away.
    """
    wanted = feed.Wanted(side, label)
    held_out = bool(Home.of(data).facts(sealed.MANIFEST).get("held_out"))
    tables: list[pa.Table] = []
    for url, group, names in backwards(reversed(feed.prepared_files(data))):
        if lacking := [name for name in wanted.columns if name not in names]:
            raise DataError(f"{url} has no {lacking[0]}; prepare the data with that")
        columns = [*wanted.columns, *(["caption"] if "caption" in names else [])]
        tables.insert(0, marked(url, group, columns, HELD_OUT if held_out else ""))
        if sum(map(len, tables)) >= count:
            break
    rows = pa.concat_tables(tables)
    rows = rows.slice(max(0, len(rows) - count))
    if not len(rows):
        raise DataError(f"{data} has no usable row; see `ddiff data stats`")
    captions = rows["caption"].to_pylist() if "caption" in rows.column_names else [""] * len(rows)
    ready = feed.ready(rows.append_column("position", pa.array(range(len(rows)), pa.int64())), wanted)
    return Yardstick(paired(ready, side), captions, held_out)


def backwards(files: Iterable[str]) -> Iterator[tuple[str, int, list[str]]]:
    """Every row group of some files, each file's last first: address, number, columns of the file.

    A file is opened only when its turn comes.
    """
    for url in files:
        groups, names = layout(url)
        for group in reversed(range(groups)):
            yield url, group, names


def layout(url: str) -> tuple[int, list[str]]:
    """How many row groups a file has, and which columns."""

    def look() -> tuple[int, list[str]]:
        with parquet_of(url) as parquet:
            return parquet.num_row_groups, parquet.schema_arrow.names

    return patiently(look, url)


def marked(url: str, group: int, columns: list[str], mark: str) -> pa.Table:
    """The rows of a row group whose column `reject` holds this mark."""
    table = row_group(url, group, [*columns, "reject"], PREPARE)
    kept = [reject == mark for reject in table["reject"].to_pylist()]
    return table.filter(pa.array(kept, pa.bool_())).drop_columns("reject")


def paired(table: pa.Table, side: int) -> PairBatch:
    """A table as tensors."""
    pixels = np.stack([np.frombuffer(image, np.uint8) for image in table["image"].to_pylist()])
    label = torch.tensor(table["label"].to_pylist()) if "label" in table.column_names else None
    return PairBatch(
        image=torch.from_numpy(pixels.reshape(-1, 3, side, side)),
        tokens=torch.tensor(table["tokens"].to_pylist()),
        label=label,
    )
