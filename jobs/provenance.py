"""How a picture was made, as the text inside its PNG says it: written by `ddiff sample`, read by `reproduce`.

    prompt, negative_prompt, label, seed    what was asked for; what was not said is left out
    cascade                                 digest of what painted it
    how                                     JSON: how each hop that ran was sampled, in order
    edit                                    JSON: what was done to given pictures
    pictures                                JSON: sha256 of their files, by option
    precision                               of the networks that paint; a PNG without it is of float32
    made_with                               versions and device; with others the last bits may differ

An endpoint writes the same but edit, pictures (it takes none) and made_with.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from dd_core import sealed
from dd_core.cascade import as_said
from dd_core.precision import dtype_of
from dd_core.samplers import SamplingSpec
from jobs.order import Order

EDITS = ("vary", "between", "fresh_noise", "instead_of", "by", "colourise", "enlarge")
"""Fields of an order that say what is done to given pictures."""
PICTURES = ("image", "other", "mask", "reference")
"""Fields of an order that are pictures."""
NEEDED = ("prompt", "seed", "cascade", "how")


class Told(NamedTuple):
    """What a PNG says of itself."""

    asked: Mapping[str, Any]
    """Fields of an order, the pictures aside."""
    cascade: str
    how: list[SamplingSpec]
    pictures: Mapping[str, str]
    """Field of an order -> sha256 of the file."""
    made_with: str


def facts_of(order: Order, device: torch.device) -> dict[str, str]:
    """All of an order that decides its pictures, but for the seed and how the hops are sampled."""
    usual = Order("")
    half = dtype_of(device, order.precision) == torch.bfloat16
    facts = {"prompt": order.prompt, "made_with": here(device), "precision": "bf16" if half else "fp32"}
    if order.negative:
        facts["negative_prompt"] = order.negative
    if order.label is not None:
        facts["label"] = str(order.label)
    edit = {name: getattr(order, name) for name in EDITS if getattr(order, name) != getattr(usual, name)}
    if order.instead_of is not None:
        edit["by"] = order.by
    given = {name: getattr(order, name) for name in PICTURES if getattr(order, name) is not None}
    if edit:
        facts["edit"] = json.dumps(edit)
    if given:
        facts["pictures"] = json.dumps({name: sealed.sha256(path) for name, path in given.items()})
    return facts


def here(device: torch.device) -> str:
    """Versions and device that paint here."""
    return f"ddiff {version('ddiff')}, torch {version('torch')}, {device.type}"


def text_of(picture: Path) -> dict[str, str]:
    """The text inside a PNG.

    Raises:
        ValueError: It is no PNG.
    """
    try:
        with Image.open(picture, formats=("PNG",)) as opened:
            opened.load()
            return {str(name): value for name, value in opened.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture}: no PNG that can be read ({error})") from None


def told_by(picture: Path) -> Told:
    """What a PNG says of itself.

    Raises:
        ValueError: It is no PNG, or says too little.
    """
    text = text_of(picture)
    if lacking := [name for name in NEEDED if name not in text]:
        raise ValueError(
            f"{picture}: its text does not say its {', '.join(lacking)}; it was not painted by ddiff, or "
            "a program that saved it left its text out"
        )
    try:
        asked: dict[str, Any] = {"prompt": text["prompt"], "seed": int(text["seed"])}
        asked |= json.loads(text.get("edit", "{}"))
        if "negative_prompt" in text:
            asked["negative"] = text["negative_prompt"]
        if "label" in text:
            asked["label"] = int(text["label"])
        how = [as_said(SamplingSpec.model_validate(one)) for one in json.loads(text["how"])]
        pictures = dict(json.loads(text.get("pictures", "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{picture}: its text is damaged: {' '.join(str(error).split())}") from None
    asked["precision"] = text.get("precision", "fp32") or "fp32"  # empty: no hop takes a precision
    if asked["precision"] not in ("bf16", "fp32"):
        raise ValueError(
            f"{picture}: its hops computed in {asked['precision']} precision, and here all do in bf16 or fp32"
        )
    if strange := asked.keys() - {"prompt", "seed", "negative", "label", "precision", *EDITS}:
        raise ValueError(f"{picture}: its text speaks of {min(strange)!r}; another version painted it")
    return Told(asked, text["cascade"], how, pictures, text.get("made_with", "an endpoint"))
