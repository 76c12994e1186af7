"""Labels: a number for each pair, found in the json that came with it."""

import json

from pydantic import Field

from dd_core.labels import UNLABELLED
from dd_core.spec import Spec


class LabelSpec(Spec):
    """Which value of the json is the label, and the order of the classes."""

    path: str = Field(pattern=r"^[^.]+(\.[^.]+)*$")
    """Names and list positions with dots: `objects.0.shape`."""
    classes: tuple[str, ...] = Field(min_length=2)


def label_of(meta: str | None, spec: LabelSpec) -> int:
    """The place of a pair's value among the classes, or UNLABELLED."""
    value = json.loads(meta) if meta else None
    for name in spec.path.split("."):
        match value:
            case dict():
                value = value.get(name)
            case list() if name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            case _:
                return UNLABELLED
    return spec.classes.index(str(value)) if str(value) in spec.classes else UNLABELLED
