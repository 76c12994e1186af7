"""Which MLflow run each journal is sent to, and which store holds that run, as noted in the run directory."""

import uuid
from collections.abc import Callable

from workflows.journal import SENT
from workflows.own_store import store_of
from workflows.storage import Home

OWN = "own"
"""The store inside the run directory, wherever that directory is."""
RUN = "metrics.run"


class KnownRuns:
    """What <run>/metrics.run and <run>/<stage>/metrics.run say.

    Args:
        run: Directory of the pipeline.
        store: The one that new runs are made in.
    """

    def __init__(self, run: Home, store: str) -> None:
        self.run, self.store = run, store

    def of(self, stage: str) -> tuple[str, str]:
        """The id of the run of a stage and the store that has it; empty if none was begun.

        Older versions noted no store: their ids and marks belong to the directory's own store if it has one.
        """
        known = self.run.here / stage / RUN
        try:
            run_id, _, store = known.read_text().partition(" ")
        except FileNotFoundError:
            return "", ""
        if run_id and not store:
            known.write_text(f"{run_id} {(store := OWN if store_of(self.run).exists() else self.store)}")
        return run_id, store

    def note(self, stage: str, run_id: str) -> None:
        """The run of a stage has begun."""
        (self.run.here / stage / RUN).write_text(f"{run_id} {self.store}")

    def forget(self, gone: Callable[[str], bool]) -> bool:
        """Have journals whose runs are gone sent again from their beginning; True if there were any."""
        found = False
        for stage in ("", *self.run.names()):
            home = self.run.at(stage)
            run_id, _, store = home.text(RUN).partition(" ")
            if run_id and store == self.store and gone(run_id):
                found = True
                for mark in SENT:
                    home.drop(mark)
        return found

    def mark(self, stage: str) -> str:
        """A tag unique to a run directory, and in it to a stage with its spec, data and parents."""
        if not (own := self.run.text("mark")):
            self.run.write("mark", own := uuid.uuid4().hex)
        fingerprint = self.run.text(f"{stage}/fingerprint") if stage else ""
        return "-".join(part for part in (own, stage, fingerprint[:16]) if part)
