"""A folder of pictures and captions as WebDataset tars.

Captions lie beside their pictures (`cat.jpg`, `cat.txt`, perhaps `cat.json`), or in tables with a row for
each sample, as `metadata.jsonl` and `metadata.csv` in Hugging Face's imagefolder.  Every picture goes into a
tar, also one without a caption: what cannot be trained on, `ddiff data prepare` counts, with its reason.
"""

import contextlib
import csv
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from workflows.claim import TakenError, claim
from workflows.pairs import IMAGE_SUFFIXES
from workflows.shard_writing import write_tar
from workflows.storage import Home

TABLES = ("metadata.jsonl", "metadata.csv")
"""Found without being named, in any folder: the first one that is there."""
FILE_NAME = "file_name"
"""The column of a table that names a picture."""
BESIDE = ("txt", "json")
"""Suffixes of the files that may lie beside a picture."""


class Source(NamedTuple):
    """A sample before its files are read."""

    name: Path
    """Of its picture, relative to the folder."""
    parts: Mapping[str, Path | str]
    """Suffix -> file, or text."""


class Table(NamedTuple):
    """Captions of pictures."""

    path: Path
    home: Path
    """The folder to which the names in it are relative."""
    column: str
    """With the captions."""


def pack(
    folder: Path, out: Path, *, table: Path | None = None, column: str = "text", samples_per_shard: int = 1000
) -> dict[str, Any]:
    """Write the pictures of a folder and its subfolders, in a random order that is always the same.

    A key is the path of the picture, with a number before its name and `_` for further dots.

    Args:
        folder: Names in it that begin with a dot are passed over.
        out: A directory that is not there, or empty; it appears when all tars are whole.
        table: Captions, .jsonl or .csv, of pictures relative to it or, if it lies elsewhere, to the folder;
            None: all TABLES in the folder.  Pictures in no table have the files beside them.
        column: Of a table, with the captions.
        samples_per_shard: In a tar.

    Returns:
        Counts: samples, those without caption or picture, files left out by suffix, shards, bytes.

    Raises:
        ValueError: There is no picture, `out` holds something, or a table cannot be used.
        TakenError: Another process packs into `out`.
        OSError: A file cannot be read, or there is no room; `out` is as before.
    """
    folder, out = folder.resolve(), out.resolve()  # links to them stay
    if out.exists() and (os.path.ismount(out) or any(out.iterdir())):
        raise ValueError(f"{out} holds files already, or a file system; name a directory that is not there")
    files = list(files_in(folder))
    paths = list(tables_in(files)) if table is None else [table.resolve()]
    tables = [Table(path, path.parent if folder in path.parents else folder, column) for path in paths]
    rows = [source for one in tables for source in listed(folder, one)]
    named = {part.resolve() for source in rows for part in source.parts.values() if isinstance(part, Path)}
    sources = rows + beside(folder, files, named)
    used = {part for source in sources for part in source.parts.values()} | {one.path for one in tables}
    left_out = Counter(path.suffix.lower() or path.name for path in files if path not in used)
    if not any(pictured(source) for source in sources):
        there = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5)) or "no file"
        raise ValueError(f"{folder} holds no picture ({', '.join(IMAGE_SUFFIXES)}); it has {there}")
    shards, size = written(sources, out, samples_per_shard)
    return {
        "samples": len(sources),
        "without_caption": sum("txt" not in source.parts for source in sources),
        "without_picture": sum(not pictured(source) for source in sources),
        "left_out": dict(left_out.most_common()),
        "shards": shards,
        "bytes": size,
        "out": str(out),
    }


def files_in(folder: Path) -> Iterator[Path]:
    """Every file below, in the order of their names, without names that begin with a dot; links are followed.

    A folder that is reached twice is looked into once.
    """
    seen = set[tuple[int, int]]()
    for directory, inner, names in os.walk(folder, onerror=raised, followlinks=True):
        about = Path(directory).stat()
        if (about.st_dev, about.st_ino) in seen:
            inner.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if not name.startswith("."))


def raised(error: OSError) -> None:
    """For os.walk, which passes over what it cannot look into unless told otherwise."""
    raise error


def suffix_of(path: Path) -> str:
    """`jpg` of a.JPG."""
    return path.suffix[1:].lower()


def is_picture(path: Path) -> bool:
    """Whether it is a file, not a link to nothing or a pipe, with the name of a picture."""
    return suffix_of(path) in IMAGE_SUFFIXES and path.is_file()


def pictured(source: Source) -> bool:
    """Whether it has a picture."""
    return any(suffix in source.parts for suffix in IMAGE_SUFFIXES)


def beside(folder: Path, files: Sequence[Path], named: Set[Path]) -> list[Source]:
    """A sample for each picture that no table names (by its resolved path), with the files beside it."""
    texts = [path for path in files if suffix_of(path) in BESIDE and path.is_file()]
    others, found = {path.with_suffix(f".{suffix_of(path)}"): path for path in texts}, []
    for picture in files:
        if is_picture(picture) and picture.resolve() not in named:
            near = {kind: others.get(picture.with_suffix(f".{kind}")) for kind in BESIDE}
            parts = {suffix_of(picture): picture} | {kind: path for kind, path in near.items() if path}
            found.append(Source(picture.relative_to(folder), parts))
    return found


def tables_in(files: Sequence[Path]) -> Iterator[Path]:
    """The table of each folder that has one."""
    there = set(files)
    for home in dict.fromkeys(path.parent for path in files):
        yield from [home / name for name in TABLES if home / name in there][:1]


def listed(folder: Path, table: Table) -> Iterator[Source]:
    """A sample for each row, with all its columns as json.

    Raises:
        ValueError: A row names no picture, or lacks a caption that is a text.
    """
    for number, row in enumerate(rows_of(table.path), 1):
        where = f"{table.path}, row {number}"
        if None in row:
            raise ValueError(f"{where} has more fields than the first line; quote a caption with commas")
        for needed in (FILE_NAME, table.column):
            if needed not in row:
                there = ", ".join(map(repr, row))
                raise ValueError(
                    f"{where}: there is no {needed!r}, only {there}; {FILE_NAME!r} names the picture,"
                    " --caption-column the column of the caption"
                )
        name, caption = row[FILE_NAME], row[table.column]
        if not isinstance(name, str) or not Path(name).name:
            raise ValueError(f"{where}: {FILE_NAME!r} is {name!r:.40}, not the path of a picture")
        if not isinstance(caption, str | None):
            raise ValueError(f"{where}: {table.column!r} is {caption!r:.40}; a caption is a text, or null")
        picture = Path(os.path.normpath(table.home / name))
        parts: dict[str, Path | str] = {"json": json.dumps(row)}
        parts |= {suffix_of(picture): picture} if is_picture(picture) else {}
        parts |= {} if caption is None else {"txt": caption}
        yield Source(Path(os.path.relpath(picture, folder)), parts)


def rows_of(table: Path) -> Iterator[dict[str | None, Any]]:
    """The rows of a .jsonl or .csv.

    Raises:
        ValueError: It is of another kind, or cannot be read.
    """
    count = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            match suffix_of(table):
                case "csv":
                    csv.field_size_limit(2**31 - 1)
                    every: Iterable[Any] = csv.DictReader(file)
                case "jsonl":
                    every = map(json.loads, filter(str.strip, file))
                case _:
                    raise ValueError("a table of captions is a .jsonl or a .csv")
            for row in every:
                if not isinstance(row, dict):
                    raise ValueError(f"{row!r:.40} is not an object")
                yield row
                count += 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{table}, after {count:,} rows: {error}") from None


def written(sources: Sequence[Source], out: Path, samples_per_shard: int) -> tuple[int, int]:
    """Write the tars beside `out` and rename the directory; how many there are, and their bytes."""
    draft = out.with_name(f".{out.name}.packing")
    order = list(range(len(sources)))
    random.Random(0).shuffle(order)  # noqa: S311 neighbours in a folder are alike, and in training must not be
    shards = range(0, len(order), samples_per_shard)
    with claimed(out):
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        draft.mkdir()
        try:
            for shard, first in enumerate(shards):
                some = order[first : first + samples_per_shard]
                write_tar(draft / f"{shard:05d}.tar", (sample(number, sources[number]) for number in some))
            size = sum(path.stat().st_size for path in draft.iterdir())
            draft.rename(out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return len(shards), size


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """While inside, be the only process that packs into a directory.

    Raises:
        TakenError: Another does.
    """
    lock = out.with_name(f".{out.name}.packing.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with claim(Home.of(lock.parent), lock.name):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except TakenError as error:
        raise TakenError(f"{out} is being packed by {error}; wait until that has ended, or stop it") from None


def sample(number: int, source: Source) -> tuple[str, dict[str, bytes]]:
    """Its key and its members."""
    *folders, name = source.name.parts
    inside = [part for part in folders if part != ".."]
    key = "/".join([*inside, f"{number:08d}_{Path(name).stem.replace('.', '_')}"])
    return key, {suffix: content(of) for suffix, of in source.parts.items()}


def content(of: Path | str) -> bytes:
    """The bytes of a file, or of a text."""
    if isinstance(of, str):
        return of.encode(errors="surrogatepass")
    try:
        return of.read_bytes()
    except OSError as error:
        error.filename = error.filename or str(of)  # a disk that fails does not say where
        raise
