"""A folder of pictures and captions as WebDataset tars.

Captions lie beside their pictures (`cat.jpg`, `cat.txt`, perhaps `cat.json`), or in one table with a row for
each sample, as `metadata.jsonl` and `metadata.csv` in Hugging Face's imagefolder.  Every picture goes into a
tar, also one without a caption: what cannot be trained on, `ddiff data prepare` counts, with its reason.
"""

import csv
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from workflows.pairs import IMAGE_SUFFIXES
from workflows.shard_writing import write_tar

TABLES = ("metadata.jsonl", "metadata.csv")
"""Found in a folder without being named: the first one that is there."""
FILE_NAME = "file_name"
"""The column of a table that names a picture, relative to the table."""
BESIDE = ("txt", "json")
"""Suffixes of the files that may lie beside a picture."""


class Source(NamedTuple):
    """A sample before its files are read."""

    name: Path
    """Of its picture, relative to the folder or the table."""
    parts: Mapping[str, Path | str]
    """Suffix -> file, or text."""


def pack(
    folder: Path, out: Path, *, table: Path | None = None, column: str = "text", samples_per_shard: int = 1000
) -> dict[str, Any]:
    """Write the pictures of a folder and its subfolders, in a random order that is always the same.

    A key is the path of the picture, with a number before its name and `_` for further dots.

    Args:
        folder: Names in it that begin with a dot are passed over.
        out: A directory that is not there, or empty; it appears when all tars are whole.
        table: Captions, .jsonl or .csv; None: one of TABLES in the folder, else files beside the pictures.
        column: Of the table, with the captions.
        samples_per_shard: In a tar.

    Returns:
        Counts: samples, those without caption or picture, files left out by suffix, shards, bytes.

    Raises:
        ValueError: There is no picture, `out` holds something, or the table cannot be used.
        OSError: A file cannot be read, or there is no room; `out` is as before.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already; name a directory that is empty or not there")
    files = list(files_in(folder))
    table = table or next((folder / name for name in TABLES if folder / name in files), None)
    sources = beside(folder, files) if table is None else listed(folder, files, table, column)
    used = {part for source in sources for part in source.parts.values()} | {table}
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
    """Every file below, in the order of their names, without names that begin with a dot."""
    for directory, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if not name.startswith("."))


def suffix_of(path: Path) -> str:
    """`jpg` of a.JPG."""
    return path.suffix[1:].lower()


def pictured(source: Source) -> bool:
    """Whether it has a picture."""
    return any(suffix in source.parts for suffix in IMAGE_SUFFIXES)


def beside(folder: Path, files: Sequence[Path]) -> list[Source]:
    """A sample for each picture, with the files beside it."""
    others = {path.with_suffix(f".{kind}"): path for path in files if (kind := suffix_of(path)) in BESIDE}
    found = []
    for picture in files:
        if (suffix := suffix_of(picture)) in IMAGE_SUFFIXES:
            near = {kind: others.get(picture.with_suffix(f".{kind}")) for kind in BESIDE}
            parts = {suffix: picture} | {kind: path for kind, path in near.items() if path}
            found.append(Source(picture.relative_to(folder), parts))
    return found


def listed(folder: Path, files: Sequence[Path], table: Path, column: str) -> list[Source]:
    """A sample for each row of a table, its other columns as json; then the pictures it does not name."""
    found, named = [], set[Path]()
    try:
        every = list(rows(table))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not UTF-8: {error}") from None
    for row in every:
        for needed in (FILE_NAME, column):
            if needed not in row:
                raise ValueError(
                    f"{table}: a row has no {needed!r}, only {', '.join(map(repr, row))}; {FILE_NAME!r} names"
                    " the picture, --caption-column the column of the caption"
                )
        picture, caption = table.parent / str(row[FILE_NAME]), row[column]
        parts: dict[str, Path | str] = {"json": json.dumps(row)}
        if picture.is_file():
            parts |= {suffix_of(picture): picture}
        if caption is not None:
            parts |= {"txt": str(caption)}
        named.add(picture)
        found.append(Source(Path(str(row[FILE_NAME])), parts))
    pictures = (path for path in files if suffix_of(path) in IMAGE_SUFFIXES and path not in named)
    return found + [Source(path.relative_to(folder), {suffix_of(path): path}) for path in pictures]


def rows(table: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl or .csv.

    Raises:
        ValueError: It is of another kind, or a line is no object.
    """
    with table.open(encoding="utf-8-sig", newline="") as file:
        match suffix_of(table):
            case "csv":
                yield from csv.DictReader(file)
            case "jsonl":
                for number, line in enumerate(filter(str.strip, file), 1):
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{table}, row {number}: not JSON: {error}") from None
                    if not isinstance(row, dict):
                        raise ValueError(f"{table}, row {number}: {line.strip()!r:.40} is not an object")
                    yield row
            case _:
                raise ValueError(f"{table}: a table of captions is a .jsonl or a .csv")


def written(sources: Sequence[Source], out: Path, samples_per_shard: int) -> tuple[int, int]:
    """Write the tars beside `out` and rename the directory; how many there are, and their bytes."""
    draft = out.with_name(f".{out.name}.packing")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(parents=True)
    order = list(range(len(sources)))
    random.Random(0).shuffle(order)  # noqa: S311 neighbours in a folder are alike, and in training must not be
    shards = range(0, len(order), samples_per_shard)
    try:
        for shard, first in enumerate(shards):
            some = order[first : first + samples_per_shard]
            write_tar(draft / f"{shard:05d}.tar", (sample(number, sources[number]) for number in some))
        size = sum(path.stat().st_size for path in draft.iterdir())
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return len(shards), size


def sample(number: int, source: Source) -> tuple[str, dict[str, bytes]]:
    """Its key and its members."""
    *folders, name = source.name.parts
    inside = [part for part in folders if part not in ("/", "..")]
    key = "/".join([*inside, f"{number:08d}_{Path(name).stem.replace('.', '_')}"])
    read = {
        suffix: of.read_bytes() if isinstance(of, Path) else of.encode(errors="surrogatepass")
        for suffix, of in source.parts.items()
    }
    return key, read
