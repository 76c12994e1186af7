"""`ddiff data`: make, prepare, check and count training data."""

import bisect
import hashlib
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.ray_session import ray_cluster
from workflows import cpus
from workflows.census import census_of, check_census, place_of, totals
from workflows.decode import one_thread
from workflows.files import Found, located
from workflows.pairs import (
    CAPTIONS_CUT,
    ENLARGED,
    HELD_OUT,
    PairsSpec,
)
from workflows.parts import Part, looked_at
from workflows.prepare import Prepared, located_or_done, prepare_pairs, prepared
from workflows.row_groups import PREPARE, DataError, first_line, parquet_of, patiently
from workflows.shape_shards import ShapesSpec, write_shards

COUNTED = ("kept", "rejected", "rejects", "first_rejects", "damaged_shards")
"""Facts of a source that both a check and a preparation report."""
FILES_AT_ONCE = 16
"""Prepared files whose captions are in memory."""
PROCESS_BYTES = 64 * 2**20
"""Of shards that are decoded while a process starts."""


def write_shapes(out: Path, *, pairs: int, seed: int, image_format: Literal["png", "jpg"]) -> dict[str, Any]:
    """Tars of the embedded world."""
    paths = write_shards(ShapesSpec(pairs=pairs, seed=seed, image_format=image_format), out)
    return {
        "pairs": pairs,
        "shards": len(paths),
        "bytes": sum(Path(path).stat().st_size for path in paths),
        "out": out,
    }


def sides(text: str) -> tuple[int, ...]:
    """`64,256` -> (64, 256)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--sizes {text}: write sides in pixels with commas, such as 64,256") from None


def prepare_shards(spec: PairsSpec, *, verbose: bool) -> dict[str, Any]:
    """The Ray Data job, and what came out of it."""
    located_or_done(spec)  # a wrong address is reported before Ray is started
    with ray_cluster(verbose=verbose):
        return summary(prepare_pairs(spec))


def summary(done: Prepared) -> dict[str, Any]:
    """What came out of a preparation; with counts of pairs held out, enlarged or cut in caption, if not 0."""
    said = {"first_rejects": {}} | {name: done.facts[name] for name in COUNTED if name in done.facts}
    said |= {name: done.facts[name] for name in ("held_out", ENLARGED, CAPTIONS_CUT) if done.facts.get(name)}
    return {"out": done.home.address, "digest": done.digest} | said


def check_shards(
    shards: Sequence[str], *, max_rejected: float, caption: str = "txt", min_side: int = 32
) -> dict[str, Any]:
    """`checked`, with everything else as it is by default.

    Raises:
        ValueError: `caption` is neither txt nor json:key.
        The errors of `checked`.
    """
    return checked(
        PairsSpec(
            shards=tuple(shards),
            destination="nowhere",
            max_reject_fraction=max_rejected,
            caption=caption,
            min_side=min_side,
        )
    )


def checked(spec: PairsSpec) -> dict[str, Any]:
    """Read and decode every sample without writing anything, and judge them as a preparation would.

    Raises:
        MissingShardError: A name leads nowhere.
        TooManyRejectsError: More samples are rejected, or more shards broken, than allowed; or all.
    """
    facts = totals(looked_at_all(located(spec.shards), spec))
    check_census(spec, census_of(facts), way_out="mend the shards or raise --max-rejected")
    found = {"shards": len(facts["parts"])} | {name: facts[name] for name in COUNTED}
    return found | {name: facts[name] for name in (ENLARGED, CAPTIONS_CUT) if facts[name]}


def looked_at_all(shards: Sequence[Found], spec: PairsSpec) -> list[Part]:
    """What a preparation would note of each shard; of large ones by a process for each CPU."""
    size = sum(PROCESS_BYTES if shard.size is None else shard.size for shard in shards)
    processes = min(len(shards), cpus.available(), size // PROCESS_BYTES)
    urls = [shard.url for shard in shards]
    if processes < 2:
        return [looked_at(number, url, spec) for number, url in enumerate(urls)]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(processes, context, initializer=one_thread) as pool:
        return list(pool.map(looked_at, range(len(urls)), urls, itertools.repeat(spec)))


def told(facts: dict[str, Any]) -> str:
    """For people: what was counted, then where each reason came first and which shards are damaged."""
    places = {"first_rejects", "damaged_shards"}
    lines = [f"{name}: {value}" for name, value in facts.items() if name not in places]
    lines += [f"first {place_of(first)}" for first in facts["first_rejects"].values()]
    return "\n".join(lines + [f"damaged {one['shard']}: {one['reason']}" for one in facts["damaged_shards"]])


def stats_of(directory: str) -> dict[str, Any]:
    """Counts of prepared data, in a directory or at an address in a store.

    Raises:
        DestinationError: There is no finished data.
        DataError: A file is damaged.
        StorageError: The store is away.
    """
    done = prepared(directory)
    words, lengths, digests = Counter[str](), Counter[int](), [np.empty(0, np.uint64)]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        groups = (done.files[at : at + FILES_AT_ONCE] for at in range(0, len(done.files), FILES_AT_ONCE))
        for captions in itertools.chain.from_iterable(pool.map(captions_of, group) for group in groups):
            words.update(itertools.chain.from_iterable(caption.lower().split() for caption in captions))
            lengths.update(map(len, captions))
            digests.append(np.array([digest_of(caption) for caption in captions], np.uint64))
    return {
        "kept": done.facts["kept"],
        "held_out": done.facts.get("held_out", 0),
        "rejected": done.facts["rejected"],
        "rejects": done.facts["rejects"],
        "damaged_shards": len(done.facts["damaged_shards"]),
        "files": len(done.files),
        "bytes": sum(part["bytes"] for part in done.facts["parts"]),
        "sizes": done.facts["sizes"],
        "distinct_captions": len(np.unique(np.concatenate(digests))),
        "caption_characters_median": middle(lengths),
        "distinct_words": len(words),
        "commonest_words": dict(words.most_common(10)),
        "digest": done.digest,
    }


def digest_of(caption: str) -> int:
    """64 bits that tell captions apart, in less memory than the captions of many millions of pairs."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest())


def middle(counts: Counter[int]) -> int:
    """The median of numbers that are counted, the larger one of two; 0 of none."""
    numbers = sorted(counts)
    reached = list(itertools.accumulate(counts[number] for number in numbers))
    return numbers[bisect.bisect_right(reached, counts.total() // 2)] if numbers else 0


def captions_of(url: str) -> list[str]:
    """Captions of every usable pair of a prepared file, those held out among them.

    Raises:
        DataError: The file is gone or damaged.
        StorageError: The store is away.
    """

    def look() -> pa.Table:
        with parquet_of(url) as parquet:
            return parquet.read(["caption", "reject"])

    try:
        table = patiently(look, url)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{url}: {first_line(error)}; {PREPARE}") from None
    usable = pc.is_in(table["reject"], pa.array(["", HELD_OUT]))
    found: list[str] = table.filter(usable)["caption"].to_pylist()
    return found
