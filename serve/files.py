"""Images that are answered by URL, kept for an hour where every replica of the ingress reaches them.

The name of a file says when it expires; the rest of it are 128 random bits.  So whoever has a URL sees the
image, nobody can guess one or prolong it, and any replica, also one that is started later, can tell.
"""

import contextlib
import re
import secrets
import time
from pathlib import Path

from dd_core.addresses import is_address
from serve.fetching import store

LIFE_S = 3600
NAME = re.compile(r"([0-9]{10,12})-[0-9a-f]{32}\.(png|jpeg|webp)")
SWEPT_EVERY_S = 60.0
"""How often expired files are looked for, at most."""


class Files:
    """Where they are kept.  Its methods wait for the store, so they are called outside of event loops.

    Args:
        place: A directory or the address of a store, such as s3://bucket/runs/demo/files; made when needed.
    """

    def __init__(self, place: str) -> None:
        self.place, self.swept = place, 0.0

    def prepare(self) -> None:
        """Make the place, and remove what has expired there; not much later than the last file it is gone.

        Raises:
            OSError, ValueError: It cannot be used.
        """
        if not is_address(self.place):
            Path(self.place).mkdir(parents=True, exist_ok=True)
        if time.time() - self.swept < SWEPT_EVERY_S:
            return
        self.swept = time.time()
        files, root = store(self.place)
        with contextlib.suppress(FileNotFoundError):  # stores have no empty directories
            for path in files.ls(root, detail=False):
                if expired(path.rpartition("/")[2]):
                    with contextlib.suppress(FileNotFoundError):  # another replica was faster
                        files.rm_file(path)

    def keep(self, file: bytes, kind: str) -> str:
        """The name of a file that is kept from now on; kind: png, jpeg or webp.

        Raises:
            OSError: The store does not take it.
        """
        name = f"{int(time.time()) + LIFE_S}-{secrets.token_hex(16)}.{kind}"
        files, root = store(self.place)
        files.pipe_file(f"{root}/{name}", file)
        return name

    def read(self, name: str) -> bytes | None:
        """The file of this name; None if there is none, or not any more.

        Raises:
            OSError: The store does not answer.
        """
        if not NAME.fullmatch(name) or expired(name):
            return None
        files, root = store(self.place)
        try:
            found: bytes = files.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        return found


def expired(name: str) -> bool:
    """Whether it is the name of a file whose time is over."""
    named = NAME.fullmatch(name)
    return named is not None and int(named[1]) <= time.time()


def life_left(name: str) -> int:
    """Seconds until a file expires."""
    return max(0, int(name.partition("-")[0]) - int(time.time()))
