"""A digest of the content of ddiff's packages; all of it as one zip, for nodes that have another version."""

import io
import zipfile
from pathlib import Path

from dd_core.sealed import digest_of, sha256

ROOT = Path(__file__).parents[1]
PACKAGES = ("dd_core", "jobs", "serve", "workflows")
KINDS = (".py", ".typed", ".css", ".c")
"""Suffixes of the files that are installed; the rest is for people and builders."""


def files() -> dict[str, Path]:
    """Name within the zip, such as serve/code.py -> file."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*"))]
    return {
        path.relative_to(ROOT).as_posix(): path
        for path in found
        if path.is_file() and path.name.endswith(KINDS) and "__pycache__" not in path.parts
    }


def digest() -> str:
    """Digest of the code that runs in this process, as it lies on disk; the same wherever it is installed."""
    return digest_of({name: sha256(path) for name, path in files().items()})


def packed() -> bytes:
    """As a zip with one directory in it, as Ray wants a working_dir from elsewhere; equal for equal code."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files().items():
            archive.writestr(zipfile.ZipInfo(f"ddiff/{name}"), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return made.getvalue()
