"""Labels: a number for each pair, found in the json that came with it."""

import json

from pydantic import Field

from dd_core.labels import UNLABELLED
from dd_core.spec import Spec


class LabelSpec(Spec):
    """Which value of the json is the label, and the order of the classes."""

    path: str = Field(pattern=r"^[^.]+(\.[^.]+)*$")
    """Keys and list indices, joined by dots: `objects.0.shape`."""
    classes: tuple[str, ...] = Field(min_length=2)
    """Values other than strings are named as JSON writes them: `3`, `true`, `null`."""


def label_of(meta: str | None, spec: LabelSpec | None) -> int:
    """The index of a pair's value among the classes, or UNLABELLED."""
    if spec is None:
        return UNLABELLED
    value = json.loads(meta) if meta else None
    for name in spec.path.split("."):
        match value:
            case dict():
                value = value.get(name)
            case list() if name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            case _:
                return UNLABELLED
    said = value if isinstance(value, str) else json.dumps(value)
    return spec.classes.index(said) if said in spec.classes else UNLABELLED
