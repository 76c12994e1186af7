"""One driver at a time for a run: two would take each other's checkpoints, journals and endpoint away."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self

from jobs.environment import job_id
from workflows.claim import TakenError, claim
from workflows.pipeline import opened
from workflows.storage import Home

LOCK = ".driver"
"""In the directory of the run, or in this machine's copy of it; see workflows.claim."""


class AlreadyRunningError(ValueError):
    """Another process works on this run."""


class Driver:
    """This process as the only driver of a run while inside; a new run is claimed once it is `opened`."""

    def __init__(self, home: Home) -> None:
        self.home, self.inside, self.claimed = home, ExitStack(), False

    def __enter__(self) -> Self:
        if self.home.here.is_dir():
            self.claim()
        return self

    def opened(self) -> Home:
        """The directory of the run, made if need be.

        Raises:
            AlreadyRunningError: Another process has been quicker.
        """
        home = opened(self.home)
        if not self.claimed:
            self.claim()
        return home

    def claim(self) -> None:
        """Claim the run.

        Raises:
            AlreadyRunningError: Another process has it; nothing has been touched.
        """
        try:
            self.inside.enter_context(claim(self.home, LOCK, job=job_id()))
        except TakenError as error:
            raise AlreadyRunningError(
                f"{self.home.address} is being made by {error}; wait until that has ended, or stop it, and "
                "run the same command again"
            ) from None
        self.claimed = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside.close()
