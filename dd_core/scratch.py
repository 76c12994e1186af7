"""Directories of this user's own on this machine, for what can be made or fetched again."""

import os
import stat
import tempfile
from pathlib import Path


def scratch_directory(*inner: str) -> Path:
    """The directory of this user, or one within it, made if it is missing; only its owner has access.

    It may hold programs that we run: nobody else may be able to write there, or to redirect us by a link.

    Raises:
        PermissionError: Somebody else owns it or has access, or it is a link.
        OSError: The disk is full.
    """
    place = Path(tempfile.gettempdir()) / f"ddiff-{os.getuid()}"
    for name in ("", *inner):  # mkdir gives its mode to the last directory only
        place /= name
        place.mkdir(mode=0o700, exist_ok=True)
        about = place.lstat()
        if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode):
            raise PermissionError(f"{place} is not ours; set TMPDIR to a directory of your own")
        if about.st_mode & 0o077:
            raise PermissionError(f"others may look into {place}; chmod 700 it, or remove it")
    return place
