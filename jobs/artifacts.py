"""What deployments need of a store: cascades and code, each under its digest and never changed."""

import uuid
from urllib.parse import urlsplit

from dd_core import sealed
from serve import code, replicas
from serve.fetching import in_a_store, on_this_machine
from workflows.registry import Version
from workflows.storage import opened

RAY_FETCHES = ("s3", "gs", "file")
"""Kinds of address that Ray (2.60) unpacks code from and that are so written by fsspec."""


def address_in(storage: str, name: str) -> str:
    """The address of something that is kept there; a path where it is a directory."""
    files, root = opened(storage)
    return str(files.unstrip_protocol(f"{root}/{name}")).removeprefix("file://")


def code_address(storage: str) -> str:
    """Where Ray fetches this code; empty where it cannot: then the nodes must have it, and are asked."""
    place = address_in(storage, f"code/{code.digest()}.zip")
    place = place if "://" in place else f"file://{place}"
    return place if urlsplit(place).scheme in RAY_FETCHES else ""


def keep_code(storage: str) -> None:
    """This code, where Ray fetches it; what is there is never changed."""
    files, root = opened(storage)
    place = f"{root}/code/{code.digest()}.zip"
    if not files.exists(place):
        if not in_a_store(storage):
            files.makedirs(f"{root}/code", exist_ok=True)
            files.pipe_file(draft := f"{place}.{uuid.uuid4().hex}", code.packed())
            files.mv(draft, place)
        else:
            files.pipe_file(place, code.packed())


def keep_cascade(version: Version, storage: str) -> None:
    """A cascade under its digest, where it stays for ever; copied there if it is not there yet.

    Raises:
        SealError: What its run left has been replaced since, so that only its digest is known.
    """
    files, root = opened(storage)
    place = f"{root}/cascades/{version.digest}"
    if not files.exists(f"{place}/{sealed.MANIFEST}"):
        source = on_this_machine(version.address, version.digest)
        _, found = replicas.opened(source)
        if found != version.digest:
            raise sealed.SealError(
                f"{version.address} holds cascade {found[:12]} by now, not {version.digest[:12]} as version "
                f"{version.number} of {version.name} was; deploy a newer version"
            )
        names = [*sealed.digests(source), sealed.MANIFEST]  # the manifest last: without it there is nothing
        for name in names:
            if not in_a_store(storage):
                files.makedirs(f"{place}/{name}".rpartition("/")[0], exist_ok=True)
            files.put_file(str(source / name), f"{place}/{name}")
