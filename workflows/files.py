"""Where shards lie: addresses expanded and checked, and reads that survive a failing store.

Any store that fsspec knows (local, http, s3, gs).  A name that matches nothing is refused before
work starts; a file that shrinks or changes while it is read is detected, and one that a store fails to
deliver does not count as damaged.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import braceexpand
import fsspec

from workflows.addresses import lasting, redacted
from workflows.storage import StorageError, unopened

T = TypeVar("T")
log = logging.getLogger(__name__)
VERSION_FIELDS = (
    "ETag",
    "etag",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "updated",
    "Content-MD5",
)
GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors of the file, not of the store: no retry helps."""
ATTEMPTS, PAUSE_S = 6, 0.1
"""Attempts at a failing store, and the first pause between them; each pause is twice the one before."""
INSISTED, LONGEST_S = 28, 30.0
"""Attempts where much would be lost, and the longest pause: for ten minutes in all."""


class MissingShardError(ValueError):
    """A name among the shards matches no file, or cannot be looked up."""


class DamagedError(ValueError):
    """A file breaks off, is gone, or is not what it should be, from some byte on."""

    def __init__(self, message: str, *, member: str = "") -> None:
        super().__init__(message)
        self.member = member
        """Member of an archive whose content is damaged; empty if the damage is between members."""


class Found(NamedTuple):
    """A file of a store, as it is now."""

    url: str
    size: int | None
    """Bytes; None where the store does not tell."""
    version: str
    """Changes when the file does, as far as the store tells (ETag, time, size)."""

    @property
    def identity(self) -> tuple[str, int | None, str]:
        """Tells whether it is the same file as before, whatever signature it is read with."""
        return lasting(self.url), self.size, self.version


def located(shards: Sequence[str]) -> list[Found]:
    """Every shard that the names mean, in their order, each once, as it is now.

    Args:
        shards: Addresses; `{00000..00099}` and `{a,b}` are expanded, `*`, `?` and `[...]` matched
            against the store, a directory stands for its `*.tar`.

    Raises:
        MissingShardError: If a name matches nothing or a named file does not exist.
        StorageError: The store does not answer, or not to us.
    """
    names = [name for pattern in shards for name in braces(pattern)]
    if not all(names) or not names:
        raise MissingShardError(
            "no shards are named, or one by nothing; name at least one, such as 'data/{00000..00099}.tar'"
        )
    with ThreadPoolExecutor(16) as pool:
        groups = list(pool.map(matched, names))
    missing = [name for name, group in zip(names, groups, strict=True) if not group]
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise MissingShardError(
            f"{redacted(missing[0])} does not exist, or no tar is there{more}; name your tars (pairs.shards, "
            "--shards)"
        )
    return list({found.url: found for group in groups for found in group}.values())


def braces(pattern: str) -> list[str]:
    """Brace ranges and lists written out."""
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError:
        raise MissingShardError(f"{redacted(pattern)} has an unclosed brace") from None


def matched(name: str) -> list[Found]:
    """The files that one name, directory or glob means; empty if there are none."""
    fs, path = opened(name)
    try:
        if any(sign in path for sign in "*?["):
            return files_of(fs, path)
        found, kind = told_of(fs, path)
        return files_of(fs, f"{path.rstrip('/')}/*.tar") if kind == "directory" else [found]
    except FileNotFoundError as error:
        if is_web(fs) and not is_gone(error.__cause__):
            raise StorageError(not_looked_up(name, error.__cause__ or error)) from error
        return []
    except Exception as error:  # each store has its own kinds (aiohttp's, botocore's)
        raise StorageError(not_looked_up(name, error)) from error


def is_gone(cause: BaseException | None) -> bool:
    """Whether a web server said that there is no such file: fsspec says so for whatever it answers."""
    return cause is None or isinstance(cause, GONE) or getattr(cause, "status", None) in (404, 410)


def not_looked_up(name: str, error: BaseException) -> str:
    """The message for a store that does not answer, or not to us."""
    return (
        f"{redacted(name)} cannot be looked up: {one_line(error)}; check the address and, for s3://,"
        " AWS_ENDPOINT_URL and the credentials"
    )


def files_of(fs: Any, pattern: str) -> list[Found]:
    """The files that a glob matches, in order, each looked up by its own request, several at once.

    One listing would do, but its fields are not those that `found_in` gets: every file would seem changed.
    """
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(partial(told_of, fs), sorted(fs.glob(pattern)))
        return [file for file, kind in found if kind != "directory"]


def opened(url: str) -> tuple[Any, str]:
    """The store of an address, without its cache of listings, and the path in it."""
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise unopened(redacted(url), error) from None
    except ValueError as error:
        why = f"{redacted(url)} cannot be opened: {one_line(error)}"
        raise MissingShardError(f"{why}; see that it is the address of a store, or a path") from None
    return fs, str(path)


def is_web(fs: Any) -> bool:
    """True for http, where a path is a page and nothing is a directory."""
    return bool({"http", "https"} & set([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol))


def found_in(fs: Any, path: str) -> Found:
    """What the store says of a file now."""
    return told_of(fs, path)[0]


def told_of(fs: Any, path: str) -> tuple[Found, str]:
    """What the store says of a path now, and of which kind it is: a file, a directory or something else."""
    info = fs.info(path)
    facts = {name: str(info[name]) for name in VERSION_FIELDS if info.get(name) is not None}
    facts["size"] = str(info.get("size"))
    version = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    local = "file" in fs.protocol or fs.protocol == "file"
    found = Found(path if local else fs.unstrip_protocol(path), info.get("size"), version)
    return found, str(info.get("type"))


def fingerprint(files: Iterable[Found]) -> str:
    """sha256 over addresses, sizes and versions: equal if the source has not changed."""
    return hashlib.sha256(json.dumps([file.identity for file in files]).encode()).hexdigest()


def one_line(error: BaseException | str) -> str:
    """An error or a text in one line, without the secrets of addresses, control characters escaped."""
    text = " ".join(redacted(str(error)).split()) or type(error).__name__
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)[:300]


def insistently(
    ask: Callable[[], T], what: str, *, final: Callable[[Exception], bool], attempts: int = ATTEMPTS
) -> T:
    """What `ask` gets from a store; it is called again while it is the store that fails.

    Args:
        ask: The request.
        what: What has failed, for messages: `<address> cannot be read`.
        final: Whether an error is the store's answer, so that no retry helps: it is raised.
        attempts: At most.

    Raises:
        StorageError: The store failed at every attempt.
    """
    for attempt in range(attempts):
        try:
            return ask()
        except Exception as error:
            if final(error):
                raise
            failure = error
        if attempt == ATTEMPTS:
            log.warning("%s: %s; it is tried again", what, one_line(failure))
        time.sleep(min(PAUSE_S * 2**attempt, LONGEST_S))
    raise StorageError(f"{what}: {one_line(failure)}; run the same command again when it can")


class ShardFile:
    """Sequential reads that survive a failing store: re-opened at the byte where it failed."""

    def __init__(self, url: str, *, attempts: int = ATTEMPTS) -> None:
        self.url, self.attempts = url, attempts
        self.file: Any = None
        self.position = 0
        self.reopened = 0
        self.about: Found | None = None

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes, fewer only at the end of the file.

        Raises:
            DamagedError: If the file is gone or was replaced.
            StorageError: If the store fails at every attempt or denies access; the file may be good.
        """
        data = b""
        for attempt in range(self.attempts):
            try:
                return self.attempt(count, data)
            except Partial as partial:
                data, failure = partial.data, partial.failure
            if isinstance(failure, GONE):
                raise DamagedError(self.unread(failure))
            if isinstance(failure, PermissionError):
                break
            self.close()
            self.reopened += 1
            time.sleep(PAUSE_S * 2**attempt)
        raise StorageError(f"{self.unread(failure)}; when the store gives it, run the same command again")

    def unread(self, failure: Exception) -> str:
        """What could not be read, and why."""
        return f"{redacted(self.url)} cannot be read at byte {self.position:,}: {one_line(failure)}"

    def attempt(self, count: int, data: bytes) -> bytes:
        """One try to complete `data` to `count` bytes."""
        try:
            if self.file is None:
                self.open()
            while len(data) < count and (more := self.file.read(count - len(data))):
                data = data + more if data else more
                self.position += len(more)
            size = self.about.size if self.about else None
            if len(data) < count and size is not None and self.position < size:
                raise ConnectionError(f"the stream ended before its {size:,} bytes")
        except DamagedError:
            raise
        except Exception as error:  # each store has its own kinds (aiohttp's, botocore's)
            raise Partial(data, error) from error
        return data

    def open(self) -> None:
        """Open the file; after a failure the same file, at the same byte."""
        fs, path = opened(self.url)
        about = found_in(fs, path)
        if self.about is not None and about.version != self.about.version:
            raise DamagedError(f"{redacted(self.url)} was replaced while it was read")
        self.about = about
        streamed = is_web(fs) and not fs.info(path).get("partial")  # the server does not offer byte ranges
        self.file = fs.open(path, "rb", block_size=0) if streamed else fs.open(path, "rb")
        if self.position:
            forward(self.file, self.position)

    def unchanged(self) -> None:
        """Raises DamagedError if the file is not the one that was opened."""
        self.close()
        self.read(0)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self.file is not None:
            self.file.close()
        self.file = None


class Partial(Exception):  # noqa: N818 a signal between read and attempt
    """An attempt failed, after `data` had arrived."""

    def __init__(self, data: bytes, failure: Exception) -> None:
        super().__init__(str(failure))
        self.data, self.failure = data, failure


def forward(file: Any, position: int) -> None:
    """Seek, or read up to the position where a stream (http without ranges) cannot."""
    try:
        file.seek(position)
    except (ValueError, OSError, NotImplementedError):
        while position > 0 and (passed := len(file.read(min(position, 2**20)))):
            position -= passed
