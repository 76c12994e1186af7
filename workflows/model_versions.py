"""A cascade as a version of a model in MLflow's registry: how it is written, and where it says that it lies.

A store that is a file takes any source.  A tracking server refuses paths, which would be of its own disk
(MLflow's answer is 400), unless they lie within the run that registers them: there the source is the
artifact directory `cascade` of that run, which holds the manifest, and the tag ADDRESS says where the
cascade itself is.
"""

import logging
from pathlib import Path
from typing import Any

from dd_core.sealed import MANIFEST
from workflows.journal import Entry

log = logging.getLogger(__name__)
ADDRESS = "bundle"
"""The tag of a version that says where the run left the cascade."""
CASCADE = "cascade"


def register(client: Any, run_id: str, entry: Entry, *, by_server: bool) -> None:
    """Make a version of the cascade, known by the digest in its tags; it gets the alias and these tags.

    Args:
        client: MLflow's.
        run_id: Of the run that made it.
        entry: Of kind "model" in a journal.
        by_server: The registry is a server, not a file.
    """
    name, address = entry.name, entry.value["source"]
    tags = {ADDRESS: address} | entry.value["tags"]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = known(client, name, tags["bundle_sha256"])
    if is_new := version is None:
        source = source_of(run_id, address, by_server=by_server)
        version = client.create_model_version(name, source, run_id=run_id, tags=tags)
    else:
        for tag, value in tags.items():
            client.set_model_version_tag(name, version.version, tag, value)
    client.set_registered_model_alias(name, entry.value["alias"], version.version)
    if is_new and version.source.startswith("runs:/"):
        show(client, run_id, Path(address) / MANIFEST)


def known(client: Any, name: str, digest: str) -> Any | None:
    """The version of a model whose cascade has this digest; None: there is none."""
    there = client.search_model_versions(f"name = '{name}'")
    return next((version for version in there if version.tags.get("bundle_sha256") == digest), None)


def source_of(run_id: str, address: str, *, by_server: bool) -> str:
    """What MLflow is told of where a cascade is."""
    if "://" in address:
        return address
    return f"runs:/{run_id}/{CASCADE}" if by_server else f"file://{address}"


def show(client: Any, run_id: str, manifest: Path) -> None:
    """Put the manifest of a cascade where its version points; without it the version is as good."""
    try:
        client.log_artifact(run_id, str(manifest), CASCADE)
    except Exception as error:  # noqa: BLE001 each kind of artifact store has its own
        log.warning("tracking: %s is not in MLflow, but here alone: %.200s", manifest, error)


def address_of(version: Any) -> str:
    """Where the run left the cascade of a version: a path, or an address in a store."""
    return str(version.tags.get(ADDRESS) or version.source).removeprefix("file://")
