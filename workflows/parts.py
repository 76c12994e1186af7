"""Prepared files, one a raw shard, each whole or not there, with a note of what is in it.

<directory>/part-00000.parquet          written under another name, renamed when whole
<directory>/.unfinished/source.json     what the parts are made from
<directory>/.unfinished/part-00000.json the note: written after the rename
"""

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
from pydantic import ValidationError

from dd_core import sealed
from dd_core.spec import Spec
from workflows.files import ShardFile
from workflows.pairs import DAMAGE, PairsSpec, census, pairs_schema, prepared_tables

UNFINISHED = ".unfinished"


class DestinationError(ValueError):
    """The destination cannot take the prepared files, or does not hold them."""


class Part(Spec):
    """One finished file."""

    shard: int
    """Its number among the raw shards."""
    url: str
    """Of the raw shard."""
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
    directory: Path, shard: int, url: str, spec: PairsSpec
) -> Iterator[tuple[int, int, Part | None]]:
    """Read, verify, decode, tokenise and write one shard.

    Yields:
        Rows since the last time, bytes of the shard read so far, and at the end the part.
    """
    source, counts, damage = ShardFile(url), Counter[str](), ""
    draft, name = directory / f".part-{shard:05d}-{uuid.uuid4().hex}.draft", f"part-{shard:05d}.parquet"
    schema = pairs_schema(spec.sizes)
    try:
        with pq.ParquetWriter(
            draft,
            schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        ) as writer:
            for table in prepared_tables(source, shard, spec):
                writer.write_table(table)  # a row group each
                counts += census([table])
                last = table["reject"][-1].as_py()
                damage = last.partition(": ")[2] if last.startswith(f"{DAMAGE}: ") else ""
                yield len(table), source.position, None
        damage = damage or shortage(url, counts.total())
        part = Part(
            shard=shard,
            url=url,
            file=name,
            rows=counts.total(),
            kept=counts.pop("", 0),
            rejects=dict(counts),
            damage=damage,
            bytes=draft.stat().st_size,
            sha256=sealed.sha256(draft),
        )
        draft.rename(directory / name)
        write_json(directory / UNFINISHED / f"part-{shard:05d}.json", part.model_dump(mode="json"))
        yield 0, source.position, part
    finally:
        draft.unlink(missing_ok=True)


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


def resumed(directory: Path, source: str) -> dict[int, Part]:
    """Make the directory ready; the good parts of an earlier run from the same source stay.

    Raises:
        DestinationError: If it holds files that are not ours, or cannot be written to.
    """
    notes = directory / UNFINISHED
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not is_ours(directory):
            raise DestinationError(f"{directory} holds other files; choose an empty or a new directory")
        (directory / sealed.MANIFEST).unlink(missing_ok=True)  # from here on it is unfinished
        known: dict[int, Part] = {}
        if read_json(notes / "source.json").get("source") == source:
            known = {part.shard: part for part in noted(notes) if is_whole(directory / part.file, part)}
        else:
            shutil.rmtree(notes, ignore_errors=True)
        keep = {part.file for part in known.values()}
        for path in (*directory.glob("part-*.parquet"), *directory.glob(".part-*.draft")):
            if path.name not in keep:
                path.unlink()
        notes.mkdir(exist_ok=True)
        write_json(notes / "source.json", {"source": source})
    except OSError as error:
        raise DestinationError(f"{directory} cannot be written to ({error}); choose another") from None
    return known


def is_ours(directory: Path) -> bool:
    """True if an earlier run of this job left it."""
    return (directory / UNFINISHED).is_dir() or "parts" in read_json(directory / sealed.MANIFEST)


def noted(notes: Path) -> Iterator[Part]:
    """The parts that an earlier run finished."""
    for path in notes.glob("part-*.json"):
        try:
            yield Part(**read_json(path))
        except ValidationError:
            continue  # a note that was cut: its part is made again


def is_whole(path: Path, part: Part) -> bool:
    """True if the file is there and its bytes are those that were written."""
    return path.is_file() and path.stat().st_size == part.bytes and sealed.sha256(path) == part.sha256


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty if it is not there or was cut."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON object, whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    os.replace(draft, path)
