"""Where a run lives: a directory that every machine sees, or an address in a store (s3://, gs://, ...).

In a store nothing is shared but the store.  Each machine keeps a scratch directory of its own for
each run; a file is made there and sent when it is whole, and a machine that needs one fetches it
and checks it.  A sealed directory is sent with its manifest last, and fetched only if it has one.
The store is authoritative: what an earlier run left in a scratch directory is never relied upon.

    s3://bucket/runs/smoke/clip/bundle      Home("s3://bucket/runs/smoke", "clip/bundle")
    <tmp>/ddiff-<user>/<hash>/clip/bundle   its `here` on a machine
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from dd_core import sealed
from dd_core.addresses import is_address
from dd_core.scratch import scratch_directory

log = logging.getLogger(__name__)
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol of an address -> the extra of ddiff that has to be installed for it."""
FETCHES = 2
"""How often a sealed directory is fetched before it counts as damaged in the store."""


class StorageError(ValueError):
    """The store cannot be reached, or denies access."""


class AddressError(StorageError):
    """The address itself is wrong, so waiting does not help."""


class Home(NamedTuple):
    """A directory of a run, wherever it is."""

    root: str
    """Of the run: an absolute path, or an address of fsspec."""
    inner: str = ""
    """The directory within it."""

    @classmethod
    def of(cls, place: "Home | Path | str") -> "Home":
        """From a path or an address; a Home stays as it is."""
        if isinstance(place, Home):
            return place
        if isinstance(place, str) and is_address(place):
            return cls(place.rstrip("/"))
        return cls(str(Path(str(place).removeprefix("file://")).absolute()))

    def at(self, name: str) -> "Home":
        """A directory, or a file, within this one."""
        return Home(self.root, f"{self.inner}/{name}".strip("/"))

    @property
    def stored(self) -> bool:
        """Whether it is in a store, and each machine has a copy of what it needs."""
        return is_address(self.root)

    @property
    def address(self) -> str:
        """For people, other programs and other machines."""
        return f"{self.root}/{self.inner}".rstrip("/")

    @property
    def here(self) -> Path:
        """The directory itself, or its copy on this machine."""
        return (scratch(self.root) if self.stored else Path(self.root)) / self.inner

    # what is there

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        if not self.stored:
            path = self.here / name
            return path.stat().st_size if path.is_file() else None
        with said(self.address):
            try:
                info = store(self.root).info(self.at(name).address)
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly within; of a store, by one listing."""
        if not self.stored:
            there = self.here.iterdir() if self.here.is_dir() else ()
            return {path.name: path.stat().st_size for path in there if path.is_file()}
        with said(self.address):
            try:
                found = store(self.root).ls(self.address, detail=True, refresh=True)
            except FileNotFoundError:
                return {}
            files = [info for info in found if info["type"] == "file"]
            return {str(info["name"]).rpartition("/")[2]: int(info["size"]) for info in files}

    def names(self) -> list[str]:
        """Files and directories directly within, sorted."""
        if not self.stored:
            return sorted(path.name for path in self.here.iterdir()) if self.here.is_dir() else []
        with said(self.address):
            try:
                found = store(self.root).ls(self.address, detail=False, refresh=True)
            except FileNotFoundError:
                return []
            inside = {str(path).rstrip("/") for path in found} - {opened(self.address)[1].rstrip("/")}
            return sorted({path.rpartition("/")[2] for path in inside} - {""})

    def text(self, name: str) -> str:
        """A small file; empty if it is not there.  Bytes that are damaged stand for no character."""
        if not self.stored:
            path = self.here / name
            return path.read_text(errors="replace") if path.is_file() else ""
        with said(self.address):
            try:
                return str(store(self.root).cat_file(self.at(name).address).decode(errors="replace"))
            except FileNotFoundError:
                return ""

    def part(self, name: str, start: int, end: int) -> bytes:
        """Some bytes of a file, without fetching the rest."""
        if not self.stored:
            with (self.here / name).open("rb") as file:
                file.seek(start)
                return file.read(end - start)
        with said(self.address):
            return bytes(store(self.root).cat_file(self.at(name).address, start=start, end=end))

    def facts(self, name: str) -> dict[str, Any]:
        """A small JSON object; empty if it is not there or was cut."""
        return parsed(self.text(name))

    # changing it

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            draft.write_text(text)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)  # on a full disk, where the next try would leave another one
        self.send(name)

    def create(self, name: str, text: str) -> bool:
        """Write a small file of a store; False if it exists.  Of two at once one does, if the store can."""
        with said(self.address):
            try:
                store(self.root).pipe_file(self.at(name).address, text.encode(), mode="create")
            except OSError:  # FileExistsError, or what a store's client has for it
                if not self.has(name):
                    raise
                return False
        return True

    def drop(self, name: str) -> None:
        """Remove a file, or a directory with all in it; its manifest goes first."""
        path = self.here / name
        if path.is_dir():
            (path / sealed.MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        if self.stored:
            with said(self.address):
                fs, address = store(self.root), self.at(name).address
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    fs.rm_file(f"{address}/{sealed.MANIFEST}")
                with contextlib.suppress(FileNotFoundError):
                    fs.rm(address, recursive=True)

    def drop_files(self, names: Sequence[str]) -> None:
        """Remove plain files; a store is asked for all of them at once."""
        for name in names:
            (self.here / name).unlink(missing_ok=True)
        if self.stored and names:
            with said(self.address), contextlib.suppress(FileNotFoundError):
                store(self.root).rm([self.at(name).address for name in names])

    # between this machine and the store; nothing to do where all machines share the directory

    def send(self, *names: str, missing_ok: bool = False) -> None:
        """Files and directories to the store; the manifest of a sealed one comes last.

        Raises:
            StorageError: The store is away, or what is to be sent is not here and not `missing_ok`.
        """
        if not self.stored:
            return
        with said(self.address):
            fs = store(self.root)
            for name in names:
                path, address = self.here / name, self.at(name).address
                if path.is_dir():
                    send_directory(fs, path, address)
                elif path.exists():
                    fs.put_file(str(path), address)
                elif not missing_ok:
                    raise StorageError(f"{path} is gone; it was to be sent to {address}")

    def fetch(self, *names: str) -> None:
        """Files from the store; one that the store lacks is removed here too."""
        if not self.stored:
            return
        with said(self.address):
            for name in names:
                path = self.here / name
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
                try:
                    store(self.root).get_file(self.at(name).address, str(draft))
                    os.replace(draft, path)
                except FileNotFoundError:
                    path.unlink(missing_ok=True)
                finally:
                    draft.unlink(missing_ok=True)

    def rejoin(self, name: str) -> None:
        """Fetch a file that only grows, unless the one here begins with it: nobody else has written since."""
        if self.stored:
            there, path = self.text(name), self.here / name
            if not there or not path.exists() or not path.read_text(errors="replace").startswith(there):
                self.fetch(name)

    def unseal(self) -> None:
        """Remove the manifest from the store: what is there counts as unfinished from now on."""
        if self.stored:
            with said(self.address), contextlib.suppress(FileNotFoundError):
                store(self.root).rm_file(self.at(sealed.MANIFEST).address)

    def fetched(self) -> Path:
        """This sealed directory, on this machine; a copy is verified, and fetched up to FETCHES times.

        One that all machines see is returned as it is: the caller verifies it.

        Raises:
            sealed.SealError: It has no manifest, or no copy is whole.
        """
        if not self.stored:
            return self.here
        manifest = self.text(sealed.MANIFEST)
        if not manifest:
            raise sealed.unfinished(self.address)
        with one_at_a_time(self):
            for _ in range(FETCHES):
                if is_copy(self.here, manifest):
                    return self.here
                self.fetch_directory(manifest)
            try:
                sealed.verify(self.here)
            except sealed.SealError as error:
                raise sealed.SealError(f"{self.address}, fetched {FETCHES} times: {error}") from None
        return self.here

    def fetch_directory(self, manifest: str) -> None:
        """Every file that the manifest lists, then the manifest; what was here before goes."""
        draft = self.here.with_name(f".{self.here.name}.fetched")
        shutil.rmtree(draft, ignore_errors=True)

        def get(name: str, path: Path) -> None:
            store(self.root).get_file(self.at(name).address, str(path))

        with said(self.address):
            sealed.fetch(draft, self.address, manifest.encode(), get)
        shutil.rmtree(self.here, ignore_errors=True)
        draft.rename(self.here)


def parsed(text: str) -> dict[str, Any]:
    """A JSON object; empty if it was cut or is something else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@functools.cache
def store(root: str) -> Any:
    """The file system of an address, as `opened` finds it."""
    return opened(root)[0]


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address and the path in it; it remembers no listings, since others write too.

    Raises:
        AddressError: There is none for such addresses.
    """
    try:
        fs, path = fsspec.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise unopened(address, error) from None
    return fs, str(path)


def unopened(address: str, error: Exception) -> AddressError:
    """What is said of an address for which there is no file system here."""
    extra = EXTRAS.get(address.partition("://")[0])
    fix = f"install ddiff[{extra}]" if extra else "see that it is the address of a store"
    return AddressError(f"{address} cannot be opened: {error}; {fix}")


@contextlib.contextmanager
def said(address: str) -> Iterator[None]:
    """Turn what each store raises into one line that names the address."""
    try:
        yield
    except (StorageError, sealed.SealError):
        raise
    except Exception as error:  # each store has its own kinds (botocore's, aiohttp's)
        text = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(
            f"{address}: {text:.300}; check the address and, for s3://, AWS_ENDPOINT_URL and the credentials"
        ) from error


def scratch(root: str) -> Path:
    """This machine's own directory for a run in a store; only its owner may look into it."""
    try:
        mine = scratch_directory()
    except PermissionError as error:
        raise AddressError(str(error)) from None
    return mine / hashlib.sha256(root.encode()).hexdigest()[:16]


def send_directory(fs: Any, path: Path, address: str) -> None:
    """Every file of a directory, the manifest last; while it is under way there is none."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if path / sealed.MANIFEST in files:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{address}/{sealed.MANIFEST}")
        files.remove(path / sealed.MANIFEST)
        files.append(path / sealed.MANIFEST)
    for file in files:
        fs.put_file(str(file), f"{address}/{file.relative_to(path).as_posix()}")


def is_copy(directory: Path, manifest: str) -> bool:
    """Whether a directory here is whole and the one of this manifest."""
    try:
        return sealed.verify(directory).digest == json.loads(manifest).get("digest")
    except (sealed.SealError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def one_at_a_time(home: Home) -> Iterator[None]:
    """A lock among the processes of this machine: workers of one node share its scratch directory."""
    lock = scratch(home.root) / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
