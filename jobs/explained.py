"""YAML of a spec for somebody new to it: what each field is, taken from the docstrings of the specs.

A comment stands above its field where that comes first; in a later stage the same field means the same.
"""

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from dd_core.spec import Spec
from jobs.origins import members

WIDTH = 110
LIMITS = {
    "ge": "at least {}",
    "gt": "above {}",
    "le": "at most {}",
    "lt": "below {}",
    "multiple_of": "a multiple of {}",
}
"""Attribute of a constraint (annotated_types) -> how it is said."""


def explained(text: str, spec: Spec) -> str:
    """The same YAML with comments that explain fields and sections.

    Args:
        text: The spec as YAML, perhaps with comments already.
        spec: What it is the text of.
    """
    lines, said = text.splitlines(), set[tuple[str, str]]()
    above: dict[int, str] = {}
    for number, name, words in remarks(yaml.compose(text, yaml.SafeLoader), spec):
        if (name, words) not in said:
            said.add((name, words))
            above[number] = f"{above[number]} {words}" if number in above else words
    for number in sorted(above, reverse=True):
        lead = f"{lines[number][: -len(lines[number].lstrip())]}# "
        lines[number:number] = textwrap.wrap(
            above[number],
            WIDTH,
            initial_indent=lead,
            subsequent_indent=lead,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines) + "\n"


def remarks(node: yaml.Node | None, value: Any) -> Iterator[tuple[int, str, str]]:
    """(line, name of the field or class, what it is) of everything inside, in order."""
    for step, key, inner in members(node):
        held = member(value, step)
        line = (key or inner).start_mark.line
        if isinstance(value, Spec) and (words := said_of(type(value), str(step))):
            yield line, str(step), words
        if isinstance(held, Spec) and (words := first_paragraph(type(held).__doc__)):
            yield line, type(held).__name__, words
        yield from remarks(inner, held)


def member(value: Any, step: str | int) -> Any:
    """What is one step down in a spec, a mapping or a sequence."""
    return getattr(value, str(step)) if isinstance(value, Spec) else value[step]


def said_of(kind: type[Spec], name: str) -> str:
    """What a field is, with its limits; empty if nothing says it."""
    limits = ", ".join(limits_of(kind.model_fields[name]))
    return " ".join(filter(None, (docs_of(kind).get(name, ""), f"[{limits}]" if limits else "")))


def limits_of(field: FieldInfo) -> Iterator[str]:
    """The limits of its values; of a choice its members, unless there is only one."""
    for one in (field.annotation, *get_args(field.annotation)):
        if get_origin(one) is Literal and len(get_args(one)) > 1:
            yield " | ".join(map(str, get_args(one)))
    for constraint in field.metadata:
        for name, text in LIMITS.items():
            if (limit := getattr(constraint, name, None)) is not None:
                yield text.format(limit)


def docs_of(kind: type) -> Mapping[str, str]:
    """Field -> its docstring, its own and those of the classes that it extends."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if issubclass(one, Spec):
            found |= docstrings(sys.modules[one.__module__]).get(one.__name__, {})
    return found


@functools.cache
def docstrings(module: ModuleType) -> Mapping[str, Mapping[str, str]]:
    """Class -> field -> the string below the field, which Python itself does not keep."""
    found: dict[str, dict[str, str]] = {}
    for one in ast.parse(inspect.getsource(module)).body:
        if isinstance(one, ast.ClassDef):
            below = zip(one.body, one.body[1:], strict=False)
            found[one.name] = {
                field.target.id: for_yaml(text.value.value)
                for field, text in below
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                if isinstance(text.value.value, str)
            }
    return found


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring in one line."""
    return for_yaml((text or "").partition("\n\n")[0])


def for_yaml(text: str) -> str:
    """A docstring in one line, which names values as YAML does."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))
