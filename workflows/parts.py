"""Prepared files, one a raw shard, each whole or not there, with a note of what is in it.

<directory>/part-00000.parquet          written under another name, renamed (or sent) when whole
<directory>/part-00000-1a2b3c4d.parquet the same, where a file that is still in use has the plain name
<directory>/.unfinished/source.json     what the parts are made from
<directory>/.unfinished/part-00000.json the note: written after the rename
<directory>/.unfinished/lock            held by the process that prepares (workflows.claim)
"""

import contextlib
import errno
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from dd_core import sealed, text
from dd_core.spec import Spec
from workflows.addresses import redacted
from workflows.claim import TakenError, claim
from workflows.files import ShardFile
from workflows.pairs import (
    CAPTIONS_CUT,
    DAMAGE,
    ENLARGED,
    HELD_OUT,
    MISSING,
    PairsSpec,
    census,
    first_rejects,
    pairs_schema,
    prepared_tables,
    remark,
    usable_pairs,
)
from workflows.storage import Home

log = logging.getLogger(__name__)
UNFINISHED = ".unfinished"
SOURCE = f"{UNFINISHED}/source.json"
LOCK = f"{UNFINISHED}/lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which there was no room: nothing is wrong with the request."""
AT_ONCE, LONG = 16, 10**10
"""Files that are read in parallel, and above how many bytes the reading is logged before it begins."""


class DestinationError(ValueError):
    """The destination cannot take the prepared files, or does not hold them."""


class Part(Spec):
    """One finished file."""

    shard: int
    """Its number among the raw shards."""
    url: str
    """Of the raw shard, without user, password and query."""
    file: str
    rows: int
    kept: int
    """Usable rows, held-out ones included."""
    rejects: dict[str, int]
    """Reason -> count; all samples but the `missing` ones have a row."""
    damage: str = ""
    """Why the shard could not be read to its end."""
    counted: bool = False
    """Whether the downloader's count beside the shard tells how many samples it has had."""
    bytes: int
    sha256: str
    source: str = ""
    """Digest of the shard as it was and of how the part is made; empty if only that of all parts is known."""
    usable: tuple[int, ...] = ()
    """Number of rows to train on, by row group; empty where an older version wrote the part."""
    held_out: tuple[int, ...] = ()
    """Number of held-out rows, by row group; empty where there are none."""
    enlarged: int = 0
    """Kept images that have fewer pixels than the largest size."""
    captions_cut: int = 0
    """Kept captions that have more tokens than the context."""
    first_rejects: dict[str, tuple[str, str]] = Field(default_factory=dict)
    """Reason -> key of the first sample rejected for it, and the full reason; empty in older parts."""


def write_part(
    directory: Home | Path, shard: int, url: str, spec: PairsSpec, source: str = ""
) -> Iterator[tuple[int, int, Part | None]]:
    """Read, verify, decode, tokenise and write one shard; `source` is noted with it.

    Yields:
        Rows since the last time, bytes of the shard read so far, and at the end the part.

    Raises:
        StorageError: The shard could not be read to its end; there is no part and no note of it.
    """
    home = Home.of(directory)
    here = home.here
    if home.stored:
        here.mkdir(parents=True, exist_ok=True)
    raw, counts, remarks, damage = ShardFile(url), Counter[str](), Counter[str](), ""
    usable, held, firsts = list[int](), list[int](), dict[str, tuple[str, str]]()
    draft = here / f".part-{shard:05d}-{uuid.uuid4().hex}.draft"
    schema = pairs_schema(spec.sizes)
    try:
        with plain_writer(draft, schema, compression="zstd") as writer:
            for table in prepared_tables(raw, shard, spec, remarks=remarks):
                writer.write_table(table)  # a row group each
                found = census([table])
                firsts = first_rejects(table) | firsts
                usable.append(found[""])
                held.append(found.pop(HELD_OUT, 0))
                counts += found + Counter({"": held[-1]})
                last = table["reject"][-1].as_py()
                damage = last.partition(": ")[2] if last.startswith(f"{DAMAGE}: ") else ""
                yield len(table), raw.position, None
        rows, sha256 = counts.total(), sealed.sha256(draft)
        counted = missing_counted(url, rows, counts, firsts)
        damage = damage or firsts.get(MISSING, ("", ""))[1]
        part = Part(
            shard=shard,
            url=redacted(url),
            file=free_name(home, shard, sha256),
            rows=rows,
            kept=counts.pop("", 0),
            rejects=dict(counts),
            damage=damage,
            counted=counted,
            bytes=draft.stat().st_size,
            sha256=sha256,
            source=source,
            usable=tuple(usable),
            held_out=tuple(held) if any(held) else (),
            enlarged=remarks[ENLARGED],
            captions_cut=remarks[CAPTIONS_CUT],
            first_rejects=firsts,
        )
        finish(home, draft, part)
        yield 0, raw.position, part
    finally:
        draft.unlink(missing_ok=True)


def free_name(home: Home, shard: int, sha256: str) -> str:
    """File name of a new part: never one that exists, since that file may still be in use."""
    name = f"part-{shard:05d}.parquet"
    return f"part-{shard:05d}-{sha256[:8]}.parquet" if home.has(name) else name


def finish(home: Home, draft: Path, part: Part) -> None:
    """Give a complete draft the name of its part (and send it), then write the note."""
    draft.rename(home.here / part.file)
    home.send(part.file)
    write_json(home, f"{UNFINISHED}/part-{part.shard:05d}.json", part.model_dump(mode="json"))
    if home.stored:
        (home.here / part.file).unlink()  # readers read it from the store


def plain_writer(
    path: Path, schema: pa.Schema, *, compression: Literal["none", "zstd"] = "none"
) -> pq.ParquetWriter:
    """The writer of a file that is read often: no dictionary or statistics, a checksum for every page."""
    return pq.ParquetWriter(
        path,
        schema,
        compression=compression,
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )


def missing_counted(url: str, rows: int, rejects: Counter[str], firsts: dict[str, tuple[str, str]]) -> bool:
    """Count the samples that a shard lacks by the downloader's count beside it; False: there is no count.

    A shard whose last members were overwritten with zeros is a valid, shorter archive; only the
    NAME_stats.json that img2dataset writes beside NAME.tar reveals it.
    """
    folder = url.rpartition("/")[0]
    try:
        with contextlib.closing(ShardFile(f"{folder}/{beside(url)}", attempts=3)) as file:
            promised = json.loads(file.read(2**20))["successes"]
    except Exception:  # noqa: BLE001 most shards have no count; one that cannot be read claims nothing
        return False
    if not isinstance(promised, int):
        return False
    if missing := max(0, promised - rows):
        rejects[MISSING] = missing
        firsts[MISSING] = ("", f"{rows:,} samples, {redacted(beside(url))} says {promised:,}")
    return promised >= rows - rejects[DAMAGE]  # a count of fewer than were read is of another shard


def looked_at(shard: int, url: str, spec: PairsSpec) -> Part:
    """What `write_part` would note of a shard; nothing is written, so the part has no file.

    Raises:
        StorageError: The shard could not be read to its end.
    """
    rejects, firsts = Counter[str](), dict[str, tuple[str, str]]()
    remarks, kept = Counter[str](), 0
    for pair in usable_pairs(url, spec, rejects, firsts):
        kept += 1
        remark(pair, text.encoded(pair.caption), spec, remarks)
    rows = kept + rejects.total()
    damage = firsts[DAMAGE][1].partition(": ")[2] if DAMAGE in firsts else ""
    counted = missing_counted(url, rows, rejects, firsts)
    damage = damage or firsts.get(MISSING, ("", ""))[1]
    return Part(
        shard=shard,
        url=redacted(url),
        file="",
        rows=rows,
        kept=kept,
        rejects=dict(rejects),
        damage=damage,
        counted=counted,
        enlarged=remarks[ENLARGED],
        captions_cut=remarks[CAPTIONS_CUT],
        bytes=0,
        sha256="",
        first_rejects=firsts,
    )


def beside(url: str) -> str:
    """The file name of the downloader's count beside a shard."""
    return url.rpartition("/")[2].removesuffix(".tar") + "_stats.json"


@contextlib.contextmanager
def claimed(home: Home) -> Iterator[None]:
    """While inside, be the only process that prepares into a directory.

    Raises:
        DestinationError: Another prepares there, or it holds files that are not ours or cannot be written to.
    """
    with contextlib.ExitStack() as inside:
        try:
            with writable(home):
                checked_names(home)
                (home.here / LOCK).parent.mkdir(parents=True, exist_ok=True)
                inside.enter_context(claim(home, LOCK))
        except TakenError as error:
            raise DestinationError(
                f"{home.address} is being prepared by {error}; wait until that has ended, or stop it, and "
                "run the same command again"
            ) from None
        yield


@contextlib.contextmanager
def writable(home: Home) -> Iterator[None]:
    """Turn an OSError inside into one that names the directory (`refusal`)."""
    try:
        yield
    except OSError as error:
        raise refusal(home, error.errno, f"{error}; choose another") from None


def refusal(home: Home, number: int | None, why: str) -> Exception:
    """The error for a failed write: an OSError if the disk is full, else the destination's."""
    if number in FULL:
        return OSError(int(number), os.strerror(number), home.address)
    return DestinationError(f"{home.address} cannot be written to: {why}")


def resumed(directory: Home | Path, source: str, keys: Sequence[str] = ()) -> dict[int, Part]:
    """Make the directory ready, and return the parts of an earlier run that can be kept, by shard.

    Args:
        directory: Where the parts are.
        source: Digest of what all parts together are made from.
        keys: Digest of what each part is made from, by shard.  With keys, parts that match theirs stay
            although the source as a whole has changed, and sealed data stays until it is replaced;
            without keys, parts of another source and the manifest are removed.

    Raises:
        DestinationError: If it holds files that are not ours, or cannot be written to.
    """
    home = Home.of(directory)
    with writable(home):
        if not home.stored:
            home.here.mkdir(parents=True, exist_ok=True)
        names, stands = checked_names(home), home.facts(sealed.MANIFEST) if keys else {}
        same, was_same = (facts.get("source") == source for facts in (home.facts(SOURCE), stands))
        good = [part for part in parts_of(stands) if fits(part, keys, same=was_same)]
        stale = []
        for name, part in noted(home):
            if part is not None and fits(part, keys, same=same):
                good.append(part)
            else:
                stale.append(name)
        known = {part.shard: part for part in whole(home, good)}
        if not same:  # stale notes go before this source is noted; the directory counts as ours throughout
            home.drop_files(stale)
            write_json(home, SOURCE, {"source": source})
        if not keys:
            home.drop(sealed.MANIFEST)  # from here on it is unfinished
        others = {part.file for part in parts_of(stands)} - {part.file for part in good}
        swept(home, names, keep={part.file for part in known.values()} | others)
    return {
        number: part.but(source=keys[number]) if keys and not part.source else part
        for number, part in known.items()
    }


def fits(part: Part, keys: Sequence[str], *, same: bool) -> bool:
    """Whether a part is made from what its key says; one without a source is if all together are (`same`)."""
    return [*keys[part.shard : part.shard + 1]] == [part.source] if part.source else same


def swept(home: Home, names: Sequence[str], *, keep: Collection[str]) -> None:
    """Remove parts and drafts of parts, but for those to keep."""
    ours = [name for name in names if fnmatch(name, "part-*.parquet") or fnmatch(name, ".part-*.draft")]
    home.drop_files([name for name in ours if name not in keep])


def tidied(home: Home, files: Collection[str]) -> None:
    """After these files have been sealed, remove all other parts and all notes."""
    swept(home, home.names(), keep=files)
    home.drop(UNFINISHED)


def checked_names(home: Home) -> list[str]:
    """What is in the directory, if it is ours or empty.

    Raises:
        DestinationError: It holds other files.
    """
    names = home.names()
    if names and not is_ours(home, names):
        raise DestinationError(f"{home.address} holds other files; choose an empty or a new directory")
    return names


def is_ours(home: Home, names: Sequence[str]) -> bool:
    """True if an earlier run of this job left it."""
    return UNFINISHED in names or "parts" in home.facts(sealed.MANIFEST)


def notes(home: Home) -> list[str]:
    """The files with the notes, one for each part."""
    return [f"{UNFINISHED}/{name}" for name in home.at(UNFINISHED).names() if fnmatch(name, "part-*.json")]


def noted(home: Home) -> list[tuple[str, Part | None]]:
    """The notes of an earlier run, each with its part, or None if the note was cut short."""
    names = notes(home)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda name: parts_of({"parts": [home.facts(name)]}), names)
        return [(name, parts[0] if parts else None) for name, parts in zip(names, found, strict=True)]


def data_digest(facts: dict[str, Any]) -> str:
    """The digest by which stages identify prepared data: it changes when a row, an image or a column does.

    Older manifests have only the digest of all their content, which includes the places of the raw shards.
    """
    return str(facts.get("content") or facts["digest"])


def parts_of(facts: dict[str, Any]) -> list[Part]:
    """The parts of a manifest."""
    try:
        return [Part(**part) for part in facts.get("parts", [])]
    except (TypeError, ValidationError):
        return []


def whole(home: Home, parts: Sequence[Part]) -> list[Part]:
    """Those of some parts whose file is there and whose bytes are those that were written.

    A store shows an object when all of it has arrived, and its pages are checked when they are read, so the
    sizes in one listing suffice; a file system may have lost or changed bytes after a crash, so every byte
    is read.
    """
    sizes = home.sizes()
    there = [part for part in parts if sizes.get(part.file) == part.bytes]
    if home.stored:
        return there
    if (size := sum(part.bytes for part in there)) > LONG:
        log.info("%s: reading %d finished parts again, %.0f GB", home.address, len(there), size / 1e9)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        same = pool.map(lambda part: sealed.sha256(home.here / part.file) == part.sha256, there)
        return [part for part, kept in zip(there, same, strict=True) if kept]


def write_json(home: Home, name: str, content: dict[str, Any]) -> None:
    """Write a small JSON object, whole or not at all."""
    home.write(name, json.dumps(content, indent=2, ensure_ascii=False))
