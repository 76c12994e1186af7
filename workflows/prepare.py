"""Raw tars in, prepared Parquet files and a manifest out: the Ray Data job.

One task a shard reads, verifies, decodes, tokenises and writes (workflows.parts); what comes back to
the driver is how far it is.  The same job run again goes on where it was cut.  The manifest is
written last; a source that is worse than the spec allows gets none, but `refused.json` with the same
facts.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.data
from pydantic import ValidationError

from dd_core import sealed
from workflows import addresses
from workflows.files import Found, fingerprint, located, one_line
from workflows.pairs import PairsSpec, TooManyRejectsError, check_census, pairs_schema
from workflows.parts import UNFINISHED, DestinationError, Part, resumed, write_json, write_part
from workflows.progress import SampleProgress
from workflows.storage import Home, StorageError

LAYOUT = 1
"""Changes when the same source and spec would give other files."""
TOKENIZER = "open_clip SimpleTokenizer"
REFUSED = "refused.json"


class Prepared(NamedTuple):
    """A finished destination."""

    home: Home
    files: tuple[str, ...]
    """Addresses of the Parquet files."""
    facts: dict[str, Any]
    """Of the manifest: kept, rejected, rejects, damaged_shards, parts, sizes, context_length, ..."""
    digest: str

    @property
    def directory(self) -> Path:
        """Of a destination that is no store."""
        return self.home.here


def prepare_pairs(spec: PairsSpec, *, progress: bool = True) -> Prepared:
    """Prepare every shard of the spec; what an earlier run finished is not done again.

    Ray must have been started, or is started with its defaults.

    Raises:
        MissingShardError: If a named shard does not exist; nothing has been written.
        DestinationError: If the destination holds other files or cannot be written to.
        StorageError: If a store is away; what is finished stays, and no shard is taken for damaged.
        TooManyRejectsError: After refused.json was written, with the facts and no manifest.
    """
    source, home = located(spec.shards), Home.of(spec.destination)
    facts = facts_of(spec, source)
    if done := finished(home, facts["source"]):
        home.drop(UNFINISHED)  # a run that was cut after its last line
        judge(spec, done.facts)
        return done
    parts = resumed(home, facts["source"])
    with shown(source, parts, progress=progress) as bar:
        for part in written(spec, home, source, parts, bar):
            parts[part.shard] = part
    facts |= totals([parts[shard] for shard in range(len(source))])
    try:
        judge(spec, facts)
    except TooManyRejectsError:
        write_json(home, REFUSED, facts)
        raise
    home.drop(REFUSED)
    home.here.mkdir(parents=True, exist_ok=True)
    sealed.seal(home.here, {part.file: part.sha256 for part in parts.values()}, facts)
    home.send(sealed.MANIFEST)
    home.drop(UNFINISHED)
    return prepared(home)


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
    for part in parts:
        if home.size(part.file) != part.bytes:
            where = home.at(part.file).address
            raise DestinationError(f"{where} is missing or has changed; prepare the data again")
    return Prepared(home, tuple(home.at(part.file).address for part in parts), body, digest)


def finished(home: Home, source: str) -> Prepared | None:
    """What stands there, if it is whole and from the same source."""
    try:
        found = prepared(home)
    except DestinationError:
        return None
    return found if found.facts["source"] == source else None


def facts_of(spec: PairsSpec, source: Sequence[Found]) -> dict[str, Any]:
    """What is known before the work: `source` changes when anything that shapes the files does."""
    how = spec.model_dump(mode="json", exclude={"shards", "destination", "max_reject_fraction"})
    shaping = json.dumps([LAYOUT, how, fingerprint(source)], sort_keys=True)
    schema = pairs_schema(spec.sizes)
    return {
        "source": hashlib.sha256(shaping.encode()).hexdigest(),
        "shards": [addresses.shown(found.url) for found in source],
        "spec": how,
        "sizes": list(spec.sizes),
        "context_length": spec.context_length,
        "tokenizer": TOKENIZER,
        "schema": {field.name: str(field.type) for field in schema},
    }


def totals(parts: Sequence[Part]) -> dict[str, Any]:
    """The census over all parts."""
    rejects: Counter[str] = Counter()
    for part in parts:
        rejects.update(part.rejects)
    return {
        "kept": sum(part.kept for part in parts),
        "rejected": rejects.total(),
        "rejects": dict(rejects.most_common()),
        "damaged_shards": [{"shard": part.url, "reason": part.damage} for part in parts if part.damage],
        "parts": [part.model_dump(mode="json") for part in parts],
    }


def judge(spec: PairsSpec, facts: dict[str, Any]) -> None:
    """Raises TooManyRejectsError if the census is worse than the spec allows."""
    unreadable = sum(bool(part["damage"]) and not part["kept"] for part in facts["parts"])
    counts = Counter({"": facts["kept"]} | facts["rejects"])
    way_out = f"see {spec.destination}/{REFUSED}, then mend the shards or raise max_reject_fraction"
    check_census(spec, counts, unreadable=unreadable, shards=len(facts["parts"]), way_out=way_out)


def written(
    spec: PairsSpec,
    home: Home,
    source: Sequence[Found],
    known: dict[int, Part],
    bar: SampleProgress | None,
) -> Iterator[Part]:
    """Write the parts that are missing, one Ray task each, and hand out each as it is done.

    Raises:
        DestinationError: If a part cannot be written (no space, no right).
        StorageError: If a store, of the shards or of the parts, is away or does not let us.
    """
    todo = [{"shard": shard, "url": found.url} for shard, found in enumerate(source) if shard not in known]
    if not todo:
        return
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every report comes at once, not when there are 128 MiB of them
    with ray.data.DataContext.current(context):
        reports = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            partial(reported, spec=spec, home=home), batch_size=1
        )
    read = dict.fromkeys(range(len(source)), 0)
    for step in reports.iter_rows():
        if step["error"]:
            raise DestinationError(f"{home.address} cannot be written to: {step['error']}")
        if step["away"]:
            raise StorageError(step["away"])
        if bar is not None:
            bar.advance(step["rows"], step["position"] - read[step["shard"]])
        read[step["shard"]] = step["position"]
        if step["part"]:
            yield Part.model_validate_json(step["part"])


def reported(batch: dict[str, np.ndarray], *, spec: PairsSpec, home: Home) -> Iterator[dict[str, np.ndarray]]:
    """What a task runs: a report for every row group of its shard, and one with the part at the end."""
    shard, url = int(batch["shard"][0]), str(batch["url"][0])
    try:
        for rows, position, part in write_part(home, shard, url, spec):
            yield report(shard, rows, position, part=part.model_dump_json() if part else "")
    except OSError as failure:
        yield report(shard, 0, 0, error=one_line(failure))
    except StorageError as failure:
        yield report(shard, 0, 0, away=one_line(failure))


def report(
    shard: int, rows: int, position: int, *, part: str = "", error: str = "", away: str = ""
) -> dict[str, np.ndarray]:
    """One row for the driver."""
    values: dict[str, int | str] = {"shard": shard, "rows": rows, "position": position}
    values |= {"part": part, "error": error, "away": away}
    return {name: np.array([value]) for name, value in values.items()}


@contextlib.contextmanager
def shown(
    source: Sequence[Found], known: dict[int, Part], *, progress: bool
) -> Iterator[SampleProgress | None]:
    """The bar of a run, ahead by what is known; None if nobody is to see it."""
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
