"""The handler of SIGTERM, kept while Ray starts and stops."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from jobs.failures import StoppedError


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block.

    Ray's start replaces the handler by one that ends the process on the spot, its shutdown by none: what was
    begun would be left as it is, such as a running endpoint.

    Raises:
        StoppedError: SIGTERM has come inside, and Ray's handler would have ended the process.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:
        raise StoppedError("stopped by SIGTERM beside Ray; run the same command again to continue") from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
