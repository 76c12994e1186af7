"""`ddiff bits`: bits per dim of pictures under a trained chain, term by term, with intervals over them."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from dd_core import bundle, images, metrics, sealed
from dd_core.cascade import CascadeSpec, CascadeState
from dd_core.devices import nearest
from dd_core.likelihood import Bits
from dd_core.noise import Variance
from dd_core.precision import round_products
from dd_core.stage import PairBatch
from dd_core.stages import load_hop
from dd_core.stages.chain_bits import bits_of, refuse_bits, refuse_variance, table_of
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from workflows.held_out import Yardstick, pairs_to_measure_by
from workflows.labels import LabelSpec
from workflows.parts import data_digest
from workflows.storage import Home

log = logging.getLogger(__name__)
BATCH = 8


class Found(NamedTuple):
    """A trained chain."""

    hop: ChainHop
    facts: Mapping[str, Any]
    """In the manifest of its bundle."""
    name: str


class Asked(NamedTuple):
    """What is to be measured."""

    images: int = 64
    num_steps: int | None = None
    """Timesteps of the chain that are summed over; None: all of them."""
    variance: Variance | None = None
    """None: learned if the chain has learned it, else fixed_large."""
    stage: str | None = None
    """Of a cascade; None: the only stage that has a bound."""
    seed: int = 0


def measured(path: Path, data: str, asked: Asked) -> dict[str, Any]:
    """Bits per dim of the last held-out pictures of prepared data; of the last of all if none are held out.

    Args:
        path: A bundle, a cascade, or the directory of a run that has a cascade.
        data: Prepared pairs: a directory or an address.
        asked: What to measure.

    Returns:
        Of the total and of each term, the mean over pictures and the half-width of its 95 % interval; and
        the mean of every timestep, 0 first.

    Raises:
        ValueError: There is no chain, the bound is not defined for it, or the data lack its conditioning.
        DataError: The data are missing, damaged, or have no usable row.
        sealed.SealError: The bundle or the cascade is damaged.
    """
    round_products(nearest(), "fp32")
    found = chain_in(path, asked.stage)
    spec = found.hop.spec
    variance = asked.variance or ("learned" if spec.learns_variance else "fixed_large")
    refuse_variance(spec, variance)
    table, label = table_of(spec, asked.num_steps), label_of(found)
    yardstick = pairs_to_measure_by(data, spec.image_size, asked.images, label)
    parts: list[Bits] = []
    for first, pairs, captions in batches(yardstick):
        seeds = [(asked.seed + first + place) % 2**32 for place in range(len(captions))]
        state = CascadeState(seeds, pairs.tokens, label=pairs.label, captions=captions)
        parts.append(bits_of(found.hop, images.to_unit(pairs.image), state, table, variance=variance))
        log.info("%d of %d pictures", first + len(captions), len(yardstick.captions))
    bits = Bits(*(torch.cat(column) for column in zip(*parts, strict=True)))
    terms = {
        "total": bits.total,
        "prior": bits.prior,
        "steps": bits.steps[:, 1:].sum(1),
        "decoder": bits.steps[:, 0],
    }
    return {
        "stage": found.name,
        "images": len(bits.total),
        "timesteps": len(table),
        "variance": variance,
        "trained_on_these": not yardstick.held_out and learned_from(found, data),
        **{f"{name}_bits": mean_of(value) for name, value in terms.items()},
        "bits_by_timestep": bits.steps.mean(0).tolist(),
    }


def mean_of(values: Float[Tensor, " n"]) -> dict[str, float | None]:
    """Mean, and the half-width of its 95 % interval by the normal distribution: None for a single value."""
    if len(values) == 1:
        return {"mean": float(values), "plus_minus": None}
    mean, _, high = metrics.mean_of(values)
    return {"mean": mean, "plus_minus": high - mean}


def table(facts: Mapping[str, Any], data: str) -> str:
    """The same for people."""
    shown = {"total": "bits per dim", "prior": "prior", "steps": "timesteps from 1", "decoder": "decoder, 0"}
    lines = [
        f"{facts['stage']}: {facts['images']} pictures of {data}, {facts['timesteps']} timesteps, "
        f"variance {facts['variance']}"
    ]
    for name, words in shown.items():
        term = facts[f"{name}_bits"]
        around = "" if term["plus_minus"] is None else f" ± {term['plus_minus']:.4f}"
        lines.append(f"  {words:<17} {term['mean']:.4f}{around}")
    if facts["trained_on_these"]:
        lines.append("  it was trained on these very pictures; prepare others, or hold some out (--held-out)")
    return "\n".join(lines)


def chain_in(path: Path, stage: str | None) -> Found:
    """The chain in a bundle, a cascade or a run.

    Raises:
        ValueError: There is none, or more than one; the bound is not defined for it; a parent is not beside
            it.
        sealed.SealError: Something is damaged.
    """
    if not (path / "cascade.json").exists() and (path / "cascade" / "cascade.json").exists():
        path = path / "cascade"
    if (path / "cascade.json").exists():
        sealed.verify(path)
        name = chosen(path, stage)
        facts = bundle.manifest(path / name / sealed.MANIFEST).facts
        hop = bundle.open_hop(path, name, nearest())
    else:
        if stage is not None:
            raise ValueError(f"--stage is of a cascade, and {path} is none; leave it out")
        opened = bundle.load(path)
        refuse_bits(opened.trained.spec)
        parents = {role: beside(path, digest).trained for role, digest in used(opened).items()}
        hop, facts, name = load_hop(opened.trained, parents, device=nearest()), opened.facts, str(path)
    assert isinstance(hop, ChainHop)
    return Found(hop, facts, name)


def chosen(cascade: Path, stage: str | None) -> str:
    """Which stage of a verified cascade is meant."""
    spec = bundle.checked(TypeAdapter(CascadeSpec), cascade / "cascade.json")
    names = list(dict.fromkeys(hop.stage for hop in spec.hops))
    if stage is not None and stage not in names:
        raise ValueError(f"{cascade} has no hop {stage!r}; there are {', '.join(names)}")
    reasons: dict[str, ValueError] = {}
    for name in [stage] if stage else names:
        try:
            refuse_bits(bundle.checked(bundle.SPEC, cascade / name / "spec.json"))
        except ValueError as error:
            reasons[name] = error
    whole = [name for name in ([stage] if stage else names) if name not in reasons]
    if not whole:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in reasons.items()))
    if len(whole) > 1:
        raise ValueError(f"{cascade} has more than one chain: {', '.join(whole)}; name one with --stage")
    return whole[0]


def used(opened: bundle.Bundle) -> dict[str, str]:
    """Role -> digest, of the parents that a chain needs."""
    assert isinstance(opened.trained.spec, ChainSpec)
    return {role: opened.parents[role] for role in opened.trained.spec.needs}


def beside(path: Path, digest: str) -> bundle.Bundle:
    """The bundle with this digest next to another, in a cascade or a run.

    Raises:
        ValueError: It is not there.
    """
    cascade, run = path.absolute().parent, path.absolute().parents[1]
    for manifest in (*cascade.glob(f"*/{sealed.MANIFEST}"), *run.glob(f"*/bundle/{sealed.MANIFEST}")):
        if bundle.manifest(manifest).digest == digest:
            return bundle.load(manifest.parent, digest=digest)
    raise ValueError(
        f"{path} stands on bundle {digest[:12]}, which is not beside it; name it within its cascade"
    )


def label_of(found: Found) -> LabelSpec | None:
    """Where labels are in the data, by the bundle of a class-conditional chain; None for other chains.

    Raises:
        ValueError: The bundle does not say.
    """
    if not found.hop.spec.labels:
        return None
    label = (found.facts.get("spec") or {}).get("label")
    if label is None:
        raise ValueError(
            f"{found.name} is told classes, and its bundle does not say where they are in the data; take one "
            "that was trained here"
        )
    return LabelSpec.model_validate(label)


def learned_from(found: Found, data: str) -> bool:
    """Whether the chain was trained on these data."""
    return found.facts.get("data") == data_digest(Home.of(data).facts(sealed.MANIFEST))


def batches(yardstick: Yardstick) -> Iterator[tuple[int, PairBatch, list[str]]]:
    """The pairs in batches: the position of the first, the pairs, their captions."""
    pairs, captions, _ = yardstick
    for first in range(0, len(captions), BATCH):
        some = slice(first, first + BATCH)
        labels = None if pairs.label is None else pairs.label[some]
        yield first, PairBatch(pairs.image[some], pairs.tokens[some], labels), captions[some]
