"""Prepared files, one a raw shard, each whole or not there, with a note of what is in it.

<directory>/part-00000.parquet          written under another name, renamed (or sent) when whole
<directory>/.unfinished/source.json     what the parts are made from
<directory>/.unfinished/part-00000.json the note: written after the rename
"""

import json
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from dd_core import sealed
from dd_core.spec import Spec
from workflows.addresses import shown
from workflows.files import ShardFile
from workflows.pairs import DAMAGE, PairsSpec, census, pairs_schema, prepared_tables
from workflows.storage import Home

UNFINISHED = ".unfinished"
SOURCE = f"{UNFINISHED}/source.json"


class DestinationError(ValueError):
    """The destination cannot take the prepared files, or does not hold them."""


class Part(Spec):
    """One finished file."""

    shard: int
    """Its number among the raw shards."""
    url: str
    """Of the raw shard, as others may see it."""
    file: str
    rows: int
    kept: int
    rejects: dict[str, int]
    """Reason -> count."""
    damage: str = ""
    """Why the shard could not be read to its end."""
    bytes: int
    sha256: str


def write_part(
    directory: Home | Path, shard: int, url: str, spec: PairsSpec
) -> Iterator[tuple[int, int, Part | None]]:
    """Read, verify, decode, tokenise and write one shard.

    Yields:
        Rows since the last time, bytes of the shard read so far, and at the end the part.

    Raises:
        StorageError: The shard could not be read to its end; there is no part and no note of it.
    """
    home = Home.of(directory)
    here = home.here
    if home.stored:
        here.mkdir(parents=True, exist_ok=True)
    source, counts, damage = ShardFile(url), Counter[str](), ""
    draft, name = here / f".part-{shard:05d}-{uuid.uuid4().hex}.draft", f"part-{shard:05d}.parquet"
    schema = pairs_schema(spec.sizes)
    try:
        with plain_writer(draft, schema) as writer:
            for table in prepared_tables(source, shard, spec):
                writer.write_table(table)  # a row group each
                counts += census([table])
                last = table["reject"][-1].as_py()
                damage = last.partition(": ")[2] if last.startswith(f"{DAMAGE}: ") else ""
                yield len(table), source.position, None
        damage = damage or shortage(url, counts.total())
        part = Part(
            shard=shard,
            url=shown(url),
            file=name,
            rows=counts.total(),
            kept=counts.pop("", 0),
            rejects=dict(counts),
            damage=damage,
            bytes=draft.stat().st_size,
            sha256=sealed.sha256(draft),
        )
        finish(home, draft, part)
        yield 0, source.position, part
    finally:
        draft.unlink(missing_ok=True)


def finish(home: Home, draft: Path, part: Part) -> None:
    """A file that is whole gets its name, and then its note."""
    draft.rename(home.here / part.file)
    home.send(part.file)
    write_json(home, f"{UNFINISHED}/part-{part.shard:05d}.json", part.model_dump(mode="json"))
    if home.stored:
        (home.here / part.file).unlink()  # whoever reads it reads the store


def plain_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Of a file that is read often: nothing is packed, every page has its checksum."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def shortage(url: str, found: int) -> str:
    """What is wrong if the downloader's count beside the shard says that samples are missing.

    A shard whose last members were overwritten with zeros is a valid, shorter archive; img2dataset
    writes NAME_stats.json beside NAME.tar, and that tells.
    """
    beside = url.removesuffix(".tar") + "_stats.json"
    try:
        with fsspec.open(beside, "rb") as file:
            promised = json.load(file)["successes"]
    except Exception:  # noqa: BLE001 most shards have no count; one that cannot be read claims nothing
        return ""
    if isinstance(promised, int) and promised > found:
        return f"{found:,} samples, {beside.rpartition('/')[2]} says {promised:,}"
    return ""


def resumed(directory: Home | Path, source: str) -> dict[int, Part]:
    """Make the directory ready; the good parts of an earlier run from the same source stay.

    Raises:
        DestinationError: If it holds files that are not ours, or cannot be written to.
    """
    home = Home.of(directory)
    try:
        if not home.stored:
            home.here.mkdir(parents=True, exist_ok=True)
        names = home.names()
        if names and not is_ours(home, names):
            raise DestinationError(f"{home.address} holds other files; choose an empty or a new directory")
        known: dict[int, Part] = {}
        if home.facts(SOURCE).get("source") == source:
            known = {part.shard: part for part in noted(home) if is_whole(home, part)}
        else:  # notes of another source never stand beside this one, and at every moment it is ours
            for name in notes(home):
                home.drop(name)
            write_json(home, SOURCE, {"source": source})
        home.drop(sealed.MANIFEST)  # from here on it is unfinished
        keep = {part.file for part in known.values()}
        for name in names:
            if name not in keep and (fnmatch(name, "part-*.parquet") or fnmatch(name, ".part-*.draft")):
                home.drop(name)
    except OSError as error:
        raise DestinationError(f"{home.address} cannot be written to ({error}); choose another") from None
    return known


def is_ours(home: Home, names: Sequence[str]) -> bool:
    """True if an earlier run of this job left it."""
    return UNFINISHED in names or "parts" in home.facts(sealed.MANIFEST)


def notes(home: Home) -> list[str]:
    """The files that name a part each."""
    return [f"{UNFINISHED}/{name}" for name in home.at(UNFINISHED).names() if fnmatch(name, "part-*.json")]


def noted(home: Home) -> Iterator[Part]:
    """The parts that an earlier run finished."""
    for name in notes(home):
        try:
            yield Part(**home.facts(name))
        except ValidationError:
            continue  # a note that was cut: its part is made again


def is_whole(home: Home, part: Part) -> bool:
    """True if the file is there and its bytes are those that were written.

    A store shows an object when all of it has arrived, and its pages are checked when they are read; a
    file system may have lost or changed bytes after a crash.
    """
    if home.size(part.file) != part.bytes:
        return False
    return home.stored or sealed.sha256(home.here / part.file) == part.sha256


def write_json(home: Home, name: str, content: dict[str, Any]) -> None:
    """Write a small JSON object, whole or not at all."""
    home.write(name, json.dumps(content, indent=2, ensure_ascii=False))
