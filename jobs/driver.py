"""One driver at a time for a run: two would take each other's checkpoints, journals and endpoint away."""

import fcntl
import logging
import os
import socket
from types import TracebackType
from typing import IO, Self

from workflows.pipeline import opened
from workflows.storage import Home

log = logging.getLogger(__name__)
LOCK = ".driver"
"""In the directory of the run, or in this machine's copy of it: locked by its driver, whom it names."""


class AlreadyRunningError(ValueError):
    """Somebody is at work on this run."""


class Driver:
    """This process as the only driver of a run while inside; a run that is not there yet is nobody's.

    The lock is one of POSIX: it belongs to a process, not to a file that a child may have inherited, and
    the kernel opens it when the process is gone, however that came about.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.lock: IO[str] | None = None

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
        if self.lock is None:
            self.claim()
        return home

    def claim(self) -> None:
        """Take the lock.

        Raises:
            AlreadyRunningError: Another process has it; nothing has been touched.
        """
        path = self.home.here / LOCK
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read() or "another process"
            file.close()
            raise AlreadyRunningError(
                f"{self.home.address} is being made by {who}; wait until that has ended, or stop it, and run "
                "the same command again"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not start this run twice", path, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self.lock = file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lock is not None:
            self.lock.close()
