"""Raw tars in, prepared Parquet files and a manifest out: the Ray Data job.

One task a shard reads, verifies, decodes, tokenises and writes (workflows.parts); only reports of its
progress come back to the driver.  The same job run again goes on where it was cut.  The manifest is
written last; a source that is worse than the spec allows gets none, but `refused.json` with the same
facts.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.data
from pydantic import ValidationError

from dd_core import sealed
from workflows import addresses
from workflows.census import REFUSED, Rot, TooManyRejectsError, judge, totals
from workflows.files import Found, MissingShardError, braces, fingerprint, located, one_line
from workflows.pairs import PairsSpec, pairs_schema
from workflows.parts import (
    UNFINISHED,
    DestinationError,
    Part,
    claimed,
    data_digest,
    parts_of,
    refusal,
    resumed,
    tidied,
    write_json,
    write_part,
)
from workflows.progress import SampleProgress
from workflows.storage import Home, StorageError

log = logging.getLogger(__name__)
LAYOUT = 2
"""Changes when the same source and spec would give other files; it did not when tables came to end at so many
bytes, which cuts those of images above 512 px and of large metadata otherwise (`pairs.TABLE_BYTES`)."""
TOKENIZER = "open_clip SimpleTokenizer"
REPORT_EVERY_S = 2.0
"""Pause between the progress reports of a task: each goes through the driver, as a block of Ray Data."""


class Prepared(NamedTuple):
    """A finished destination."""

    home: Home
    files: tuple[str, ...]
    """Addresses of the Parquet files."""
    facts: dict[str, Any]
    """Of the manifest: kept, held_out of them, rejected, rejects, damaged_shards, parts, sizes, ..."""
    digest: str


def prepare_pairs(spec: PairsSpec, *, progress: bool = True) -> Prepared:
    """Prepare every shard of the spec; what an earlier run finished is not done again.

    Ray must have been started, or is started with its defaults.  Data that is sealed there stays until the
    new data is complete and accepted, and is then replaced.

    Raises:
        MissingShardError: If a named shard does not exist; nothing has been written.
        DestinationError: If it holds other files, cannot be written to, or another process prepares there.
        OSError: If there is no room left.
        StorageError: If a store is away; what is finished stays, and no shard is taken for damaged.
        TooManyRejectsError: After refused.json was written, with the facts; what was sealed before stays.
    """
    source, home = located_or_done(spec), Home.of(spec.destination)
    if isinstance(source, Prepared):
        log.warning("the raw shards of %s are not to be found; what was made of them is used", home.address)
        judge(spec, source.facts, sealed.MANIFEST)
        return source
    facts = facts_of(spec, source)
    if done := finished(home, facts["source"]):
        if UNFINISHED in home.names():  # of a run that was cut after sealing, or of another source
            with claimed(home):
                home.drop(REFUSED)
                tidied(home, done.facts["files"])
        judge(spec, done.facts, sealed.MANIFEST)
        return done
    with claimed(home):
        return made(spec, home, source, facts, progress=progress)


def made(
    spec: PairsSpec, home: Home, source: Sequence[Found], facts: dict[str, Any], *, progress: bool
) -> Prepared:
    """Write the parts that are missing and seal them all."""
    keys = keys_of(spec, source)
    parts = resumed(home, facts["source"], keys)
    rot = Rot(spec, source, parts.values())
    if not rot.hopeless:
        with progress_bar(source, parts, progress=progress) as bar:
            for part in written(spec, home, source, parts, bar, keys):
                parts[part.shard] = part
                rot.count(part)
                if rot.hopeless:
                    break
        if not rot.hopeless and len(parts) < len(source):  # Ray may drop the end of a task that it repeats
            parts = resumed(home, facts["source"], keys)
    done = sorted(parts) if rot.hopeless else range(len(source))
    if lacking := [shard for shard in done if shard not in parts]:
        raise DestinationError(f"{home.address} lacks the part of shard {lacking[0]}; prepare again")
    facts |= totals([parts[shard] for shard in done])
    try:
        judge(spec, facts)
    except TooManyRejectsError:
        write_json(home, REFUSED, facts)
        raise
    home.drop(REFUSED)
    home.here.mkdir(parents=True, exist_ok=True)
    files = {part.file: part.sha256 for part in parts.values()}
    sealed.seal(home.here, files, facts | {"content": content_of(facts, home.facts(sealed.MANIFEST))})
    home.send(sealed.MANIFEST)
    tidied(home, files)
    return prepared(home)


def located_or_done(spec: PairsSpec) -> list[Found] | Prepared:
    """The raw shards; if they are gone or away, the finished data that was made from them by the same spec.

    Raises:
        MissingShardError: Neither is there.
        StorageError: The store of the shards does not answer, or not to us, and there is no such data.
    """
    try:
        return located(spec.shards)
    except (MissingShardError, StorageError):
        try:
            done = prepared(spec.destination)
        except DestinationError:
            done = None
        names = [name for pattern in spec.shards for name in braces(pattern)]
        if done is None or done.facts.get("spec") != how(spec) or not are_of(done.facts["shards"], names):
            raise
        return done


def are_of(shards: Sequence[str], names: Sequence[str]) -> bool:
    """Whether each of these shards is meant by one of the names: files, globs and directories."""
    places = {addresses.redacted(Home.of(name).address) for name in names}
    globs = [place for place in places if any(sign in place for sign in "*?[")]

    def meant(url: str) -> bool:
        inside, _, name = url.rpartition("/")
        named = url in places or (inside in places and name.endswith(".tar"))
        return named or any(fnmatch(url, pattern) for pattern in globs)

    return all(map(meant, shards))


def prepared(directory: Home | Path | str) -> Prepared:
    """Open a finished destination; its files are verified page by page when they are read.

    Raises:
        DestinationError: If it is not finished, or a file is missing or has another size.
    """
    home = Home.of(directory)
    body = home.facts(sealed.MANIFEST)
    try:
        digest, parts = body.pop("digest"), [Part(**part) for part in body["parts"]]
    except (KeyError, TypeError, ValidationError):
        raise DestinationError(f"{home.address} holds no finished data; run `ddiff data prepare`") from None
    if sealed.digest_of(body) != digest:
        raise DestinationError(f"{home.address}/{sealed.MANIFEST} is damaged; prepare the data again")
    sizes = home.sizes()
    for part in parts:
        if sizes.get(part.file) != part.bytes:
            where = home.at(part.file).address
            raise DestinationError(f"{where} is missing or has changed; prepare the data again")
    return Prepared(home, tuple(home.at(part.file).address for part in parts), body, digest)


def finished(home: Home, source: str) -> Prepared | None:
    """The finished data that is there, if it is whole and from the same source."""
    try:
        found = prepared(home)
    except DestinationError:
        return None
    return found if found.facts["source"] == source else None


def facts_of(spec: PairsSpec, source: Sequence[Found]) -> dict[str, Any]:
    """Facts known before the work; `source` changes when anything that shapes the files does."""
    schema = pairs_schema(spec.sizes)
    return {
        "source": sealed.digest_of([LAYOUT, how(spec), fingerprint(source)]),
        "shards": [addresses.redacted(found.url) for found in source],
        "spec": how(spec),
        "sizes": list(spec.sizes),
        "context_length": spec.context_length,
        "tokenizer": TOKENIZER,
        "schema": {field.name: str(field.type) for field in schema},
    }


def how(spec: PairsSpec) -> dict[str, Any]:
    """The fields of a spec that shape the files, the raw shards aside."""
    shaping = spec.model_dump(mode="json", exclude={"shards", "destination", "max_reject_fraction"})
    if not spec.held_out:
        del shaping["held_out"]  # as before this field existed: data prepared then keeps its digest
    return shaping


def keys_of(spec: PairsSpec, source: Sequence[Found]) -> list[str]:
    """Digest of what each part is made from: the shard as it is, its number (in every row), and the spec."""
    whole = enumerate(found.identity for found in source)
    return [sealed.digest_of([LAYOUT, how(spec), shard, *found]) for shard, found in whole]


def content_of(facts: dict[str, Any], before: dict[str, Any]) -> str:
    """The digest of the data as stages learn from it, wherever it lies and whatever it was made from.

    The same bytes keep the digest of the manifest before, which an older version may have written.
    """
    now, was = ([[part.sha256 for part in parts_of(it)], it.get("schema")] for it in (facts, before))
    return data_digest(before) if now == was else sealed.digest_of(now)


def written(
    spec: PairsSpec,
    home: Home,
    source: Sequence[Found],
    known: dict[int, Part],
    bar: SampleProgress | None,
    keys: Sequence[str],
) -> Iterator[Part]:
    """Write the parts that are missing, one Ray task each, and hand out each as it is done.

    Raises:
        DestinationError: If a part cannot be written.
        OSError: If there is no room for one.
        StorageError: If a store, of the shards or of the parts, is away or denies access.
    """
    todo = [
        {"shard": shard, "url": found.url, "key": keys[shard]}
        for shard, found in enumerate(source)
        if shard not in known
    ]
    if not todo:
        return
    read = dict.fromkeys(range(len(source)), 0)
    for step in reports(todo, spec, home):
        if step["error"]:
            raise refusal(home, step["errno"], step["error"])
        if step["away"]:
            raise StorageError(step["away"])
        if bar is not None:
            bar.advance(step["rows"], step["position"] - read[step["shard"]])
        read[step["shard"]] = step["position"]
        if step["part"]:
            yield Part.model_validate_json(step["part"])


def reports(todo: list[dict[str, Any]], spec: PairsSpec, home: Home) -> Iterator[dict[str, Any]]:
    """The reports of the tasks, one task for each shard that is to do."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # reports are sent at once, not by blocks of 128 MiB
    with ray.data.DataContext.current(context):
        steps = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            partial(reported, spec=spec, home=home), batch_size=1
        )
    yield from steps.iter_rows()


def reported(batch: dict[str, np.ndarray], *, spec: PairsSpec, home: Home) -> Iterator[dict[str, np.ndarray]]:
    """What a task runs: now and then a report of the rows since the last, at the end one with the part."""
    shard, url, key = int(batch["shard"][0]), str(batch["url"][0]), str(batch["key"][0])
    told, since = time.monotonic(), 0
    try:
        for rows, position, part in write_part(home, shard, url, spec, key):
            since += rows
            if part is None and time.monotonic() - told < REPORT_EVERY_S:
                continue
            yield report(shard, since, position, part=part.model_dump_json() if part else "")
            told, since = time.monotonic(), 0
    except OSError as failure:
        yield report(shard, 0, 0, error=one_line(failure), errno=failure.errno or 0)
    except StorageError as failure:
        yield report(shard, 0, 0, away=one_line(failure))


def report(shard: int, rows: int, position: int, **said: str | int) -> dict[str, np.ndarray]:
    """One row for the driver."""
    blank: dict[str, int | str] = {"part": "", "error": "", "errno": 0, "away": ""}
    values = blank | {"shard": shard, "rows": rows, "position": position} | said
    return {name: np.array([value]) for name, value in values.items()}


@contextlib.contextmanager
def progress_bar(
    source: Sequence[Found], known: dict[int, Part], *, progress: bool
) -> Iterator[SampleProgress | None]:
    """The progress bar of a run, which starts at the parts that are known; None without `progress`."""
    if not progress:
        yield None
        return
    sizes = [found.size or 0 for found in source]
    total = sum(sizes) if all(sizes) else 0
    samples = sum(part.rows for part in known.values())
    with SampleProgress(
        "prepare", total, samples=samples, position=sum(sizes[shard] for shard in known)
    ) as bar:
        yield bar
