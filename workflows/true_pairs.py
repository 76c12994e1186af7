"""Captions to judge a cascade by, and the pictures that they were written for, from prepared data.

The captions are held-out ones (workflows.pairs), or if there are none, those that were trained on; the choice
is a function of (data, seed).  Runs without Ray.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dd_core import sealed, text
from dd_core.labels import UNLABELLED
from workflows import feed
from workflows.labels import LabelSpec, label_of
from workflows.pairs import HELD_OUT
from workflows.row_groups import PREPARE, DataError, row_group
from workflows.storage import Home

LOOKS = 4
"""Most pairs that are read for each caption that is wanted: captions may occur more than once."""
READERS = 16


class Place(NamedTuple):
    """A caption, and where its picture lies."""

    caption: str
    url: str
    group: int
    row: int
    """Within the row group."""
    label: int = UNLABELLED


class Chosen(NamedTuple):
    """Captions, no two of them the same up to case and blanks."""

    places: tuple[Place, ...]
    held_out: bool
    """Whether no stage was trained on them with this data."""


class Groups(NamedTuple):
    """Row groups that have rows to choose from; entry i of each is row group i."""

    files: list[str]
    group: list[int]
    rows: NDArray[np.int64]
    """Number of rows to choose from, in each."""
    mark: str
    """The value of column `reject` in these rows."""


def chosen(data: Home, count: int, *, seed: int, label: LabelSpec | None = None) -> Chosen:
    """Captions of prepared data, each row as likely as any other.

    Args:
        data: The prepared data.
        count: How many at most; there may be fewer that differ.
        seed: Of the choice.
        label: Where their labels are found, if labels are wanted.

    Raises:
        DataError: There are not two captions that differ, or a file is gone or damaged.
        StorageError: The store is away.
    """
    groups = held_out_groups(data) or usable_groups(data)
    stops = np.cumsum(groups.rows)
    drawn = np.random.default_rng(seed).choice(
        stops[-1], size=min(stops[-1], LOOKS * count), replace=False, shuffle=True
    )
    found: dict[str, Place] = {}
    for start in range(0, len(drawn), count):
        for place in places(groups, stops, drawn[start : start + count], label):
            found.setdefault(text.cleaned(place.caption), place)
        if len(found) >= count:
            break
    if len(found) < 2:
        raise DataError(f"{data.address} has no two captions that differ: nothing can be judged by them")
    return Chosen(tuple(found.values())[:count], groups.mark == HELD_OUT)


def held_out_groups(data: Home) -> Groups | None:
    """Where the pairs that were held out lie; None if there are not two of them."""
    parts = data.facts(sealed.MANIFEST).get("parts", [])
    found = [
        (data.at(part["file"]).address, group, rows)
        for part in parts
        for group, rows in enumerate(part.get("held_out", ()))
        if rows
    ]
    files, group, rows = zip(*found, strict=True) if found else ((), (), ())
    return Groups(list(files), list(group), np.array(rows), HELD_OUT) if sum(rows) > 1 else None


def usable_groups(data: Home) -> Groups:
    """Where the pairs lie that are trained on."""
    pieces = feed.survey(feed.prepared_files(data), feed.Wanted())
    return Groups([pieces.files[file] for file in pieces.file], pieces.group.tolist(), pieces.rows, "")


def places(
    groups: Groups, stops: NDArray[np.int64], drawn: NDArray[np.int64], label: LabelSpec | None
) -> list[Place]:
    """The rows of these numbers, in their order; `stops` says where the numbers of each row group end."""
    inside = np.searchsorted(stops, drawn, side="right")
    numbers = drawn - (stops - groups.rows)[inside]

    def look(group: int) -> list[Place]:
        url, which = groups.files[group], groups.group[group]
        columns = ["caption", "reject", *(["meta"] if label else [])]
        table = row_group(url, which, columns, PREPARE).to_pylist()
        return [
            Place(line["caption"], url, which, row, label_of(line.get("meta"), label))
            for row, line in enumerate(table)
            if line["reject"] == groups.mark
        ]

    every = np.unique(inside).tolist()
    with ThreadPoolExecutor(READERS) as pool:
        rows = dict(zip(every, pool.map(look, every), strict=True))
    return [rows[group][number] for group, number in zip(inside.tolist(), numbers.tolist(), strict=True)]


def true_pictures(data: Home, wanted: Sequence[Place], side: int) -> list[bytes]:
    """The picture of each caption as a PNG, of this side or the next larger one prepared, else the largest.

    Raises:
        DataError: A file is gone or damaged.
        StorageError: The store is away.
    """
    sizes = data.facts(sealed.MANIFEST)["sizes"]
    column = f"image{min((size for size in sizes if size >= side), default=max(sizes))}"

    groups: dict[tuple[str, int], list[Place]] = {}
    for place in wanted:
        groups.setdefault((place.url, place.group), []).append(place)

    def look(group: tuple[str, int]) -> dict[Place, bytes]:
        images = row_group(*group, [column], PREPARE)[column]
        return {place: images[place.row].as_py() for place in groups[group]}

    with ThreadPoolExecutor(READERS) as pool:
        found = {place: png for some in pool.map(look, groups) for place, png in some.items()}
    return [found[place] for place in wanted]
