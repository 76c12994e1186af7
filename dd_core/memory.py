"""Memory of a process: freed in one step, needed again in the next."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's mallopt(3)."""
LARGEST = 2**31 - 1
"""Bytes at the end of the heap that it keeps: the most that a C int can say."""
MAPPED = 2**30
"""Bytes from which on a tensor is mapped on its own, and given back when it is freed."""


def keep_freed() -> None:
    """From now on glibc keeps what this process frees, up to LARGEST bytes, and hands it out again.

    Otherwise it gives large tensors back to the system, which clears every page of the next ones: 29,000 page
    faults and a sixth of a training step on two cores (README's log).  The process grows to its peak, which a
    training reaches at every step, and stays there; a server had better not.  Elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
