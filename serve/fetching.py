"""The cascade that a config names, on this machine: a directory as it is, or fetched from a store once.

A fetched cascade lies in a directory named after its digest and is never changed; every byte is
verified before the directory gets its name.  A cleaner of temporary directories may still remove files
of it, so it is verified again before it is opened, and fetched anew if it is damaged.  After a fetch,
cascades that nobody has opened for days and that no living process holds are removed.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from dd_core import sealed
from dd_core.addresses import is_address
from dd_core.scratch import scratch_directory

log = logging.getLogger(__name__)
DIGEST = re.compile("[0-9a-f]{64}")
DRAFT, LOCK, USED = ".draft", ".lock", ".used"
"""Suffixes beside a cascade: of the directory being fetched, of the lock of the process that fetches, and of
the lock shared by all that have opened it.  Lock files are empty and stay: those who wait have them open."""
KEPT_S = 7 * 86_400.0
"""How long a cascade that is not opened again stays."""
HELD: dict[Path, int] = {}
"""Cascades that this process has opened -> descriptor of the lock, which is released when it ends."""


def on_this_machine(address: str, digest: str) -> Path:
    """The directory of a cascade; a fetched one stays at least as long as this process.

    Args:
        address: A path, or an address of fsspec such as s3://bucket/runs/demo/cascade.
        digest: Which cascade; may be empty for a directory, which is then taken as it is.

    Raises:
        sealed.SealError: What is there is damaged, unfinished or another cascade.
        ValueError: An address in a store without a digest, or of a kind of store that is not installed.
        OSError: The store does not answer.
    """
    if not is_address(address):
        return Path(address.removeprefix("file://")).resolve()
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"{address} is fetched by its digest; set digest, as `ddiff deploy` does")
    place = scratch_directory("cascades") / digest
    hold(place)
    if not whole(place):
        with alone(place):
            if not whole(place):  # nobody has fetched it meanwhile
                shutil.rmtree(place, ignore_errors=True)
                fetch(address, digest, place)
        remove_unused(place.parent)
    return place


def hold(place: Path) -> None:
    """Mark a cascade as used now, and keep it while this process lives; waits while another removes it."""
    if place not in HELD:
        used = os.open(place.with_suffix(USED), os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(used, fcntl.LOCK_SH)
        if HELD.setdefault(place, used) != used:  # another thread was faster
            os.close(used)
    os.utime(HELD[place])


def remove_unused(directory: Path) -> None:
    """Remove fetched cascades that were last opened KEPT_S ago or earlier and no living process holds."""
    for path in directory.glob(f"*{USED}"):
        if time.time() - path.stat().st_mtime < KEPT_S:
            continue
        with contextlib.suppress(BlockingIOError), path.open("a") as used:
            fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def whole(place: Path) -> bool:
    """Whether a fetched cascade can be opened."""
    if not place.exists():
        return False
    try:
        sealed.verify(place)
    except (sealed.SealError, OSError) as error:
        log.warning("fetching it anew: %s", error)
        return False
    return True


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Be the only process of this machine that fetches a cascade; others wait.  Drafts of dead ones go.

    A lock is released when its process ends, so a draft whose lock is free is nobody's.
    """
    with place.with_suffix(LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for draft in place.parent.glob(f"*{DRAFT}"):
            with contextlib.suppress(BlockingIOError), draft.with_suffix(LOCK).open("w") as other:
                if draft != place.with_suffix(DRAFT):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft, ignore_errors=True)
        yield


def fetch(address: str, digest: str, place: Path) -> None:
    """Every file that the manifest lists, verified, then renamed into place."""
    files, root = store(address)
    draft = place.with_suffix(DRAFT)
    try:
        copy(files, root, address, draft)
        found = sealed.verify(draft).digest
        if found != digest:
            raise sealed.SealError(f"{address} is cascade {found[:12]}, not {digest[:12]} as asked for")
        draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def store(address: str) -> tuple[Any, str]:
    """The file system of an address or a path, and the path in it.

    Raises:
        ValueError: It is of a kind of store that is not installed.
    """
    try:
        files, root = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        fix = "install ddiff[s3] for s3://, ddiff[gcs] for gs://"
        raise ValueError(f"{address} cannot be opened: {error}; {fix}") from None
    return files, root


def copy(files: Any, root: str, address: str, draft: Path) -> None:
    """The files of a sealed directory in a store."""

    def get(name: str, path: Path) -> None:
        files.get_file(f"{root}/{name}", str(path))

    try:
        manifest = files.cat_file(f"{root}/{sealed.MANIFEST}")
    except FileNotFoundError:
        raise sealed.unfinished(address) from None
    sealed.fetch(draft, address, manifest, get)
