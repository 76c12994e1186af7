"""What came of a source: how many of its samples are usable, and whether that is enough.

Every sample that was read counts, usable or rejected; of a shard that broke off nobody knows what it has
held, unless its downloader's count lies beside it.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from dd_core import sealed
from workflows.files import Found
from workflows.pairs import MISSING, PairsSpec
from workflows.parts import Part

log = logging.getLogger(__name__)
REFUSED = "refused.json"
"""Names the rejects of a source that was refused."""
MANY = 5_000
"""Samples that are looked at before a source is refused early."""
EXAMPLES = 3
"""For how many reasons a refusal names the first sample; prepared data and `ddiff data check` name all."""


class TooManyRejectsError(RuntimeError):
    """The source is worse than the spec allows."""


class Census(NamedTuple):
    """How many samples of a source are usable, held out and rejected."""

    counts: Counter[str]
    """Usable pairs, those held out among them, under ""; the others by their reason."""
    shards: int = 1
    broken: int = 0
    """Shards that broke off, where nothing tells how many of their samples are lost."""
    held_out: int = 0
    firsts: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    """Reason -> shard, key and why of the first sample rejected for it."""

    def reasons(self) -> str:
        """The reasons, each with its count."""
        some = (f"{count:,} {reason}" for reason, count in self.counts.most_common() if reason and count)
        return ", ".join(some) or "none"

    def examples(self) -> str:
        """The first samples of the commonest reasons, to continue a sentence; empty if none is noted."""
        known = [reason for reason, _ in self.counts.most_common() if reason in self.firsts][:EXAMPLES]
        return "".join(f"first {place_of(self.firsts[reason])}; " for reason in known)


def place_of(first: Mapping[str, str]) -> str:
    """A sample that was rejected: shard, key and why."""
    key = f", sample {first['key']!r}" if first["key"] else ""
    return f"{first['shard']}{key}: {first['why']}"


def check_census(spec: PairsSpec, found: Census, *, way_out: str = "") -> None:
    """Refuse a source that is worse than the spec allows, or gives nothing to train on.

    Args:
        spec: Allows `max_reject_fraction`.
        found: What came of it.
        way_out: What to do about it.

    Raises:
        TooManyRejectsError: It is, or does; the first sample of the commonest reasons is named.
    """
    counts, shards, broken = found.counts, found.shards, found.broken
    total, bad = counts.total(), counts.total() - counts[""]
    if bad > spec.max_reject_fraction * total or broken > spec.max_reject_fraction * shards:
        raise TooManyRejectsError(
            f"{bad:,} of {total:,} samples rejected ({found.reasons()}), {broken:,} of {shards:,} "
            f"shards broken; {spec.max_reject_fraction:.0%} are allowed; {found.examples()}"
            f"{way_out or 'mend the shards or raise max_reject_fraction'}"
        )
    if counts[""] <= found.held_out:
        held = f", {found.held_out:,} held out" if found.held_out else ""
        raise TooManyRejectsError(
            f"no pair to train on in {shards:,} shards: of {total:,} samples {bad:,} rejected "
            f"({found.reasons()}){held}; {found.examples()}"
            f"name other shards{' or lower held_out' if found.held_out else ''}"
        )


def totals(parts: Sequence[Part]) -> dict[str, Any]:
    """The census over all parts."""
    rejects, firsts = Counter[str](), dict[str, dict[str, str]]()
    for part in parts:
        rejects.update(part.rejects)
        for reason, (key, why) in part.first_rejects.items():
            firsts.setdefault(reason, {"shard": part.url, "key": key, "why": why})
    return {
        "kept": sum(part.kept for part in parts),
        "held_out": sum(sum(part.held_out) for part in parts),
        "rejected": rejects.total(),
        "rejects": dict(rejects.most_common()),
        "first_rejects": firsts,
        "enlarged": sum(part.enlarged for part in parts),
        "captions_cut": sum(part.captions_cut for part in parts),
        "damaged_shards": [{"shard": part.url, "reason": part.damage} for part in parts if part.damage],
        "parts": [part.model_dump(mode="json") for part in parts],
    }


class Rot:
    """Tells, from the shards that are done, whether a source will be refused whatever the others hold.

    Args:
        spec: Allows `max_reject_fraction`.
        source: All shards.
        done: Parts of some of them.
    """

    def __init__(self, spec: PairsSpec, source: Sequence[Found], done: Iterable[Part]) -> None:
        self.allowed, self.sizes = spec.max_reject_fraction, [found.size or 0 for found in source]
        self.samples = self.rejected = 0
        self.bad_bytes = 0.0
        for part in done:
            self.count(part)

    def count(self, part: Part) -> None:
        """One more is done."""
        rejected = sum(part.rejects.values())
        self.samples, self.rejected = self.samples + part.kept + rejected, self.rejected + rejected
        self.bad_bytes += self.sizes[part.shard] * rejected / max(1, part.kept + rejected)

    @property
    def hopeless(self) -> bool:
        """Whether twice the allowed share is bad even if the rest is good; False if sizes are unknown."""
        many = self.samples >= MANY and self.rejected > self.allowed * self.samples
        return many and all(self.sizes) and self.bad_bytes > 2 * self.allowed * sum(self.sizes)


def judge(spec: PairsSpec, facts: dict[str, Any], named_in: str = REFUSED) -> None:
    """Raises TooManyRejectsError if the census is worse than the spec allows; logs losses it cannot count.

    Args:
        spec: What is allowed.
        facts: What was found.
        named_in: File of the destination that names the rejects.
    """
    broken = broken_of(facts)
    if broken:
        log.warning(
            "%d of %d shards broke off, and nothing tells how many samples are lost; the first is %s: %s",
            *(len(broken), len(facts["parts"]), broken[0]["url"], broken[0]["damage"]),
        )
    done, every = len(facts["parts"]), len(facts.get("shards", facts["parts"]))
    after = f"found after {done:,} of {every:,} shards; " if done < every else ""
    way_out = f"{after}see {spec.destination}/{named_in}, then mend the shards or raise max_reject_fraction"
    found = census_of(facts)
    if named_in == sealed.MANIFEST:  # accepted once, maybe before broken shards with usable samples counted
        found = found._replace(broken=sum(not part["kept"] for part in broken))
    check_census(spec, found, way_out=way_out)


def broken_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of shards that broke off, where nothing tells how many samples are lost."""
    return [part for part in facts["parts"] if part["damage"] and not told_of(part)]


def told_of(part: dict[str, Any]) -> bool:
    """Whether the downloader has told how many samples a shard had; older parts say it by what is missing."""
    return bool(part.get("counted") or MISSING in part["rejects"])


def census_of(facts: dict[str, Any]) -> Census:
    """The totals of parts as a census of their source."""
    return Census(
        Counter({"": facts["kept"]} | facts["rejects"]),
        shards=len(facts["parts"]),
        broken=len(broken_of(facts)),
        held_out=facts.get("held_out", 0),
        firsts=facts.get("first_rejects", {}),
    )
