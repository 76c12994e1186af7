"""Where the values of a configuration come from, and YAML whose comments say so."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

Place = tuple[str | int, ...]
"""Where a value stands: names of fields, and numbers of members of lists."""


class Origin(NamedTuple):
    """What has set a value, with all that is inside."""

    place: Place
    source: str


def source_of(place: Place, origins: Sequence[Origin]) -> str:
    """What has set this value, or one that it is inside of, last; empty if none of the origins has."""
    return next((one.source for one in reversed(origins) if place[: len(one.place)] == one.place), "")


def unsaid(said: Any, whole: Any, place: Place = ()) -> Iterator[Place]:
    """Where a whole configuration has a value that the fields it was read from do not name."""
    known = dict(steps(said))
    for step, inner in steps(whole):
        if step in known:
            yield from unsaid(known[step], inner, (*place, step))
        else:
            yield (*place, step)


def steps(fields: Any) -> Iterable[tuple[str | int, Any]]:
    """What is directly inside, by name or number."""
    match fields:
        case dict():
            return fields.items()
        case list():
            return enumerate(fields)
        case _:
            return ()


def commented(fields: dict[str, Any], origins: Sequence[Origin]) -> str:
    """The fields as YAML, with comments that name the origins.

    The comment of a value holds for all that is inside, but for what has a comment of its own.
    """
    text: str = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    tree = yaml.compose(text, yaml.SafeLoader) if origins else None
    for index, comment in reversed(list(comments(text, tree, origins))):
        text = text[:index] + comment + text[index:]
    return text


def comments(
    text: str, node: yaml.Node | None, origins: Sequence[Origin], place: Place = ()
) -> Iterator[tuple[int, str]]:
    """What to insert into a text of YAML, and before which character, in order."""
    above = source_of(place, origins)
    for step, key, inner in members(node):
        here = (*place, step)
        if (source := source_of(here, origins)) != above:
            yield comment(text, key, inner, source)
        yield from comments(text, inner, origins, here)


def members(node: yaml.Node | None) -> list[tuple[str | int, yaml.Node | None, yaml.Node]]:
    """What is directly inside of a node: name or number, the node of the name, and that of the value."""
    match node:
        case yaml.MappingNode():
            return [(key.value, key, inner) for key, inner in node.value]
        case yaml.SequenceNode():
            return [(number, None, inner) for number, inner in enumerate(node.value)]
        case _:
            return []


def comment(text: str, key: yaml.Node | None, inner: yaml.Node, source: str) -> tuple[int, str]:
    """What to insert where: after a single value, else after its name, else after the dash of a list."""
    if not isinstance(inner, yaml.CollectionNode) or inner.flow_style:  # `[]`, `{}`
        return inner.end_mark.index, f"  # {source}"
    if key is not None:
        return text.index("\n", key.end_mark.index), f"  # {source}"
    return inner.start_mark.index, f" # {source}\n{' ' * inner.start_mark.column}"
