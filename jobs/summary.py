"""What a run, or one of its stages, came to: for scripts and for people."""

from typing import Any, NamedTuple


class Summary(NamedTuple):
    """What a run came to."""

    facts: dict[str, Any]
    """As in summary.json."""
    text: str
    """For people."""
