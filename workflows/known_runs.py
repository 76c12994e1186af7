"""Which MLflow run each journal of a run is sent to, and in which store that is, as the directory has it."""

import uuid
from collections.abc import Callable

from workflows.journal import SENT
from workflows.own_store import store_of
from workflows.storage import Home

OWN = "own"
"""The store in the directory of a run, wherever that is."""
RUN = "metrics.run"


class KnownRuns:
    """What <run>/metrics.run and <run>/<stage>/metrics.run say.

    Args:
        run: Directory of the pipeline.
        store: Which one new runs are in.
    """

    def __init__(self, run: Home, store: str) -> None:
        self.run, self.store = run, store

    def of(self, stage: str) -> tuple[str, str]:
        """The id of the run of a stage and the store that has it; empty if none was begun.

        Starts of before stores were noted: where the directory has one of its own, ids and marks were its.
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
        """Have all journals whose runs are gone sent again from their beginning; whether there were any."""
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
        """Different for every run directory ever made, and for a stage's every spec, data and parents."""
        if not (own := self.run.text("mark")):
            self.run.write("mark", own := uuid.uuid4().hex)
        fingerprint = self.run.text(f"{stage}/fingerprint") if stage else ""
        return "-".join(part for part in (own, stage, fingerprint[:16]) if part)
