"""The checkpoints of a stage, local or in a store: which one to continue from, and which to remove."""

import logging
from collections.abc import Iterator

from dd_core import checkpoint, sealed
from workflows.storage import Home

log = logging.getLogger(__name__)
STEPPED_BACK = "stepped_back"
"""File in a stage's directory: damaged checkpoints passed over at this start, for the driver to log."""


def newest(stage: Home) -> str:
    """Path within the stage of the newest checkpoint that verifies; empty if none was ever finished.

    Raises:
        sealed.SealError: Some were finished, and all of them are damaged.
    """
    place, damaged = stage.at("checkpoints"), list[str]()
    for name in finished_checkpoints(stage):
        try:
            found = place.at(name).fetched()
            if not place.stored:  # else it was verified when it was fetched
                sealed.verify(found)
        except sealed.SealError as error:
            damaged.append(f"stepping back: {error}")
            log.warning("%s", damaged[-1])
            stage.write(STEPPED_BACK, "\n".join(damaged))
        else:
            return f"checkpoints/{name}"
    if damaged:
        raise sealed.SealError(
            f"none of the {len(damaged)} checkpoints in {place.address} is whole; put a good copy there, or "
            "remove that directory to begin at step 0"
        )
    return ""


def finished_checkpoints(stage: Home) -> Iterator[str]:
    """Names of those that have been sealed, the newest first."""
    place = stage.at("checkpoints")
    return (name for name in checkpoint.steps_of(place.names()) if place.at(name).has(sealed.MANIFEST))


def prune(stage: Home, *, step: int, kept: int, every: int = 0) -> None:
    """Remove the checkpoints of a stage that are `outlived` by the one just written and sealed at `step`.

    The manifest of each goes first, so that an interrupted removal leaves nothing that looks finished.
    """
    place = stage.at("checkpoints")

    def finished(name: str) -> bool:
        return place.at(name).has(sealed.MANIFEST)

    for name in checkpoint.outlived(place.names(), finished, step=step, kept=kept, every=every):
        place.drop(name)
