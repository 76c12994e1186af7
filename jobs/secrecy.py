"""Keeps secrets of this environment out of what others may read: a cluster's dashboard, manifests."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jobs.config import ConfigError
from jobs.environment import secrets_here
from workflows.addresses import has_password

LONG = 8
"""Letters: a shorter value may stand by chance inside another word."""


def refuse_secrets(texts: Iterable[tuple[str, str]]) -> None:
    """Refuse secrets in any of these texts: (where it stands, text).

    Raises:
        ConfigError: The value of a secret of this environment is in it, or a password in an address.
    """
    secrets = secrets_here()
    for place, text in texts:
        for name, value in secrets.items():
            if holds(text, value):
                raise ConfigError(f"the value of {name} is in {place}; take it out: the nodes have it")
        if has_password(text):
            raise ConfigError(
                f"{place} holds a password, or an address that gives its reader rights; give the nodes user "
                "and password as variables of their own"
            )


def holds(text: str, value: str) -> bool:
    """Whether a value stands in a text; a short one as a word of its own."""
    if len(value) >= LONG:
        return value in text
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def texts(value: Any, *path: str) -> Iterator[tuple[str, str]]:
    """Every name and value of a spec: (where it stands, text)."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in inside:
        yield ".".join(path) or "the configuration", str(name)
        yield from texts(inner, *path, str(name))
    if not isinstance(value, dict | list):
        yield ".".join(path), str(value)
