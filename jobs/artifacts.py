"""What deployments keep in a store: cascades and code, each under its digest and never changed."""

import uuid
from urllib.parse import urlsplit

from dd_core import bundle, sealed
from dd_core.addresses import is_address
from serve import code
from serve.fetching import on_this_machine
from workflows.registry import Version
from workflows.storage import opened

RAY_FETCHES = ("s3", "gs", "file")
"""Schemes of addresses that Ray (2.60) unpacks code from, where fsspec spells them the same."""


def address_in(storage: str, name: str) -> str:
    """The address of what a storage keeps under this name; a plain path if the storage is a directory."""
    files, root = opened(storage)
    return str(files.unstrip_protocol(f"{root}/{name}")).removeprefix("file://")


def code_address(storage: str) -> str:
    """Where Ray fetches this code; empty if it cannot: then the nodes must have it, which they check."""
    place = address_in(storage, f"code/{code.digest()}.zip")
    place = place if "://" in place else f"file://{place}"
    return place if urlsplit(place).scheme in RAY_FETCHES else ""


def keep_code(storage: str) -> None:
    """Put this code where Ray fetches it; what is there already is never changed."""
    files, root = opened(storage)
    place = f"{root}/code/{code.digest()}.zip"
    if not files.exists(place):
        if not is_address(storage):
            files.makedirs(f"{root}/code", exist_ok=True)
            files.pipe_file(draft := f"{place}.{uuid.uuid4().hex}", code.packed())
            files.mv(draft, place)
        else:
            files.pipe_file(place, code.packed())


def keep_cascade(version: Version, storage: str) -> None:
    """Copy a cascade to its place under its digest, if it is not there yet; it stays for ever.

    Raises:
        SealError: The cascade at the version's address has been replaced since; only its digest is known.
    """
    files, root = opened(storage)
    place = f"{root}/cascades/{version.digest}"
    if not files.exists(f"{place}/{sealed.MANIFEST}"):
        source = on_this_machine(version.address, version.digest)
        _, found = bundle.read_cascade(source)
        if found != version.digest:
            raise sealed.SealError(
                f"{version.address} holds cascade {found[:12]} by now, not {version.digest[:12]} as version "
                f"{version.number} of {version.name} was; deploy a newer version"
            )
        names = [*sealed.digests(source), sealed.MANIFEST]  # the manifest last: no copy counts without
        for name in names:
            if not is_address(storage):
                files.makedirs(f"{place}/{name}".rpartition("/")[0], exist_ok=True)
            files.put_file(str(source / name), f"{place}/{name}")
