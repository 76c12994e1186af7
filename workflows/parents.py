"""The parents of a stage: where their bundles lie, and their specs and shapes without reading weights."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd_core import bundle, sealed
from dd_core.stage import Trained
from dd_core.vocabulary import ENCODER, MERGES
from workflows.storage import Home
from workflows.train_spec import TrainSpec

log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a type in safetensors -> the type in torch."""


def parent_home(spec: TrainSpec, role: str, run: Home | Path) -> Home:
    """Where a parent's bundle lies: a stage of this run, or elsewhere.

    Raises:
        ValueError: It is in neither place; or it is the stage's own bundle, which would be moved away when
            the stage is trained anew.
    """
    named, home = spec.parents[role], Home.of(run)
    own = home.at(f"{spec.name}/bundle")
    for place in (home.at(f"{named}/bundle"), Home.of(named)):
        if place.has(sealed.MANIFEST):
            if same_place(place, own):
                raise ValueError(
                    f"{spec.name}: its {role} {named!r} is its own bundle, which makes room for the new one; "
                    f"add a stage under another name with start: {spec.name}, or copy the bundle elsewhere"
                )
            return place
    fix = "name a directory such as runs/demo/base/bundle" if "/" in named else f"train {named!r} first"
    raise ValueError(
        f"{spec.name}: its {role} {named!r} is neither a trained stage of {home.address} nor the path of a "
        f"bundle; {fix}"
    )


def refuse_start_of_other_clip(stage: TrainSpec, start: Mapping[str, Any], ours: str) -> None:
    """Refuse a start that has measured the embeddings of another CLIP than the stage is told of.

    What has measured nothing may learn to hear another one.

    Args:
        stage: It starts with the weights of another training.
        start: The manifest of that one.
        ours: Digest of the stage's CLIP; empty if it is not trained yet.

    Raises:
        ValueError: The two differ.
    """
    theirs, named = start.get("parents", {}).get("clip", ""), stage.parents.get("clip", "")
    if not theirs or not named or theirs == ours:
        return
    if stage.stage.looks_at:
        raise ValueError(
            f"{stage.name}: its start {stage.parents['start']!r} has measured the embeddings of clip "
            f"{theirs[:12]}, and {named!r} is another; name the bundle of that clip as its parent clip, or "
            "leave start out"
        )
    log.warning(
        "%s: its start was told what clip %s says, and %r is another, which it has to learn to hear; to go "
        "on with that clip name its bundle as the parent clip of every stage",
        stage.name,
        theirs[:12],
        named,
    )


def same_place(one: Home, other: Home) -> bool:
    """Whether two addresses mean the same directory."""
    if one.stored or other.stored:
        return one.address == other.address
    return one.here.resolve() == other.here.resolve()


def outline(home: Home) -> Trained:
    """A bundle with its weights as meta tensors: of weights in a store a few kB are read, and none are kept.

    Raises:
        sealed.SealError: It is damaged; weights in a store are checked by names, shapes and types only.
    """
    if not home.stored:
        sealed.verify(home.here)
    home.fetch("spec.json", ENCODER, MERGES)
    spec = bundle.checked(bundle.SPEC, home.here / "spec.json")
    source = home.facts(sealed.MANIFEST).get("imported", "")
    return Trained(spec, outlines(home), bundle.vocabulary_in(home.here), source)


def outlines(home: Home) -> dict[str, Tensor]:
    """Name, shape and type of each tensor, from the header of the safetensors file: its length, then JSON."""
    length = int.from_bytes(home.part(WEIGHTS, 0, 8), "little")
    head = home.part(WEIGHTS, 8, 8 + length)
    try:
        return {
            name: torch.empty(about["shape"], dtype=TYPES[about["dtype"]], device="meta")
            for name, about in json.loads(head).items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise sealed.SealError(f"{home.at(WEIGHTS).address} is damaged: {error!r:.200}") from None
