"""One process at a time in a directory: on this machine by a lock, among machines by a lease in the store.

<here>/<name>           locked by the process that it names; the lock ends with it, however it dies
<store>/<name>.lease    of a directory in a store: who works there, since when, renewed while it does

No two clocks are compared: a process that finds a lease watches whether it changes.  If it does not for
DEAD_S, its holder is gone; if this machine's lock file names it, at once, since that lock is free.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from workflows.periodic import Periodically
from workflows.storage import Home, StorageError, parsed

log = logging.getLogger(__name__)
LOOK_S, RENEW_S, DEAD_S = 1.0, 5.0, 60.0
"""Pause between looks at a lease that is wanted, between renewals, and how long one lasts without renewal."""


class TakenError(ValueError):
    """Another process works there; the message says which, and since when."""


@contextlib.contextmanager
def claim(home: Home, name: str, *, job: str = "") -> Iterator[None]:
    """While inside, this process is the only one that works in a directory.

    A process whose lease was taken over, since the store heard nothing of it for DEAD_S, is sent SIGTERM.

    Args:
        home: The directory; it, or its copy on this machine, must exist.
        name: Of the file that is locked.
        job: Job of a cluster that this process runs in; told to processes that are refused.

    Raises:
        TakenError: Another process works there; nothing has been touched.
        StorageError: The store is away.
        OSError: The file cannot be written.
    """
    inside = f" in job {job}" if job else ""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    who = f"process {os.getpid()} on {socket.gethostname()}{inside}, since {since}"
    lease = Lease(home, f"{name}.lease", who)
    with locked(home.here / name, f"{lease.who}\n{lease.token}") as before:
        if not home.stored:
            yield
            return
        lease.take(before)
        try:
            with Periodically(lease.renew, every_s=RENEW_S, at_end=False):
                yield
        finally:
            lease.release()


@contextlib.contextmanager
def locked(path: Path, text: str) -> Iterator[str]:
    """A file with this text that is locked while inside; yields what stood in it before.

    It is a POSIX lock: it belongs to the process, not to the open file, which a child may have inherited.
    """
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise TakenError(file.readline().strip() or "another process") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not start this twice", path, error.strerror)
            before = ""
        else:
            file.seek(0)
            before = file.read()
        file.truncate(0)
        file.write(text)
        file.flush()
        yield before


def holder(*texts: str) -> str:
    """The process that holds a lease, by texts that were read of it: one read while it is written is cut."""
    named = (parsed(text).get("who") for text in texts)
    return str(next(filter(None, named), "another process"))


class Lease:
    """A small file in a store that says who works there; changed while that process lives."""

    def __init__(self, home: Home, name: str, who: str) -> None:
        self.home, self.name, self.who, self.token = home, name, who, uuid.uuid4().hex
        self.renewed, self.lost = 0, False

    def text(self) -> str:
        return json.dumps({"who": self.who, "token": self.token, "renewed": self.renewed})

    def take(self, before: str) -> None:
        """Create the lease, once no other process works there.

        Args:
            before: Former text of this machine's lock file: the holder of a lease whose token it has is gone.

        Raises:
            TakenError: Another process works there.
        """
        while (theirs := self.seen()) is not None or not self.home.create(self.name, self.text()):
            if theirs is None:  # another process created it first
                continue
            if parsed(theirs).get("token", "?") not in before:
                self.watch(theirs)
            if theirs == self.seen():
                log.warning("%s: taking over from %s", self.home.address, holder(theirs))
                self.home.drop(self.name)

    def seen(self) -> str | None:
        """Text of the lease, even if it was cut short; None if there is no lease."""
        text = self.home.text(self.name)
        return text if text or self.home.has(self.name) else None

    def watch(self, theirs: str) -> None:
        """Wait until another's lease is released, or was not renewed for DEAD_S: its holder is gone.

        Raises:
            TakenError: It was renewed.
        """
        until, told = time.monotonic() + DEAD_S, False
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            now = self.seen()
            if now is None:
                return
            if now != theirs:
                raise TakenError(holder(now, theirs))
            if not told and time.monotonic() > until - DEAD_S + 2 * RENEW_S:
                log.warning(
                    "%s: no sign of %s; going on in %g s if there is none",
                    self.home.address,
                    holder(theirs),
                    DEAD_S - 2 * RENEW_S,
                )
                told = True

    def renew(self) -> None:
        """Renew the lease; a removed one is not recreated; if another process has it, this process stops."""
        now = self.home.facts(self.name)
        if self.lost or not now:
            return
        if now.get("token") == self.token:
            self.renewed += 1
            self.home.write(self.name, self.text())
            return
        self.lost = True
        log.error("%s was taken over by %s; this process stops", self.home.address, now.get("who"))
        os.kill(os.getpid(), signal.SIGTERM)

    def release(self) -> None:
        """Remove the lease, if it is ours."""
        try:
            if self.home.facts(self.name).get("token") == self.token:
                self.home.drop(self.name)
        except StorageError as error:
            log.warning("%s; whoever works there next waits %g s", error, DEAD_S)
