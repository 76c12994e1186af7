"""What an import writes: a bundle of one network, or a cascade of several."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from dd_core import bundle
from dd_core.cascade import CascadeSpec
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.spec import Spec
from dd_core.stages import published as published_stages
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.vocabulary import ByteVocabulary

IMAGE_SIDE = 256
"""What published autoencoders were trained at, in pixels."""
Facts = dict[str, Any]


class Part(NamedTuple):
    """A stage of a cascade that is imported."""

    source: str
    spec: Spec
    weights: Mapping[str, Tensor]
    parents: Mapping[str, str]
    """Role -> a stage before it."""
    vocabulary: ByteVocabulary | None = None
    facts: Mapping[str, Any] = MappingProxyType({})


def inner(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network by their names in the model of a stage, which holds the network."""
    return {f"{published_stages.PREFIX}{name}": weight for name, weight in weights.items()}


def assembled(out: Path, cascade: CascadeSpec, parts: Iterable[tuple[str, Part]], *, card: str) -> Facts:
    """Write a cascade of imported stages; parents come first among the parts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        stages: dict[str, Path] = {}
        digests: dict[str, str] = {}
        for name, part in parts:
            stages[name] = Path(beside) / name
            digests[name] = bundle.save(
                stages[name],
                part.spec,
                part.weights,
                parents={role: digests[parent] for role, parent in part.parents.items()},
                facts={"imported": part.source, **part.facts},
                vocabulary=part.vocabulary,
            )
        digest = bundle.save_cascade(out, cascade, stages, card=card)
    hops = [hop.stage for hop in cascade.hops]
    return {"cascade": str(out), "hops": hops, "stages": list(stages), "digest": digest}


def stage_of(net: AutoencoderNetSpec | None) -> AutoencoderSpec:
    """An autoencoder as a stage of ours."""
    assert net is not None
    return AutoencoderSpec(net=net, image_size=IMAGE_SIDE, crop=IMAGE_SIDE, perceptual="none")


def written(directory: Path, spec: Spec, weights: Mapping[str, Tensor], source: str, **facts: Any) -> Facts:
    """Save a bundle and say what was saved."""
    if directory.exists():
        raise ValueError(f"{directory} exists; name another --out")
    count = sum(weight.numel() for weight in weights.values())
    digest = bundle.save(directory, spec, weights, parents={}, facts={"imported": source, **facts})
    return {"path": str(directory), "kind": spec.model_dump()["kind"], "weights": count, "digest": digest}
