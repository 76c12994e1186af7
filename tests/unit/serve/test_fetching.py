"""A cascade from a store: whole and the one that was asked for, or not at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from dd_core import sealed
from serve.fetching import on_this_machine
from tests.unit.serve.tiny import tiny_cascade

STORE = fsspec.filesystem("memory")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """The address of a cascade and its digest."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    digest = tiny_cascade(tmp_path)
    STORE.put(str(tmp_path / "cascade"), "/cascade", recursive=True)
    yield "memory://cascade", digest
    STORE.rm("/", recursive=True)


def test_it_is_fetched_once_and_opened_from_there(stored: tuple[str, str]) -> None:
    address, digest = stored
    path = on_this_machine(address, digest)
    assert sealed.verify(path).digest == digest
    for place in (path.parent, path.parent.parent):  # runs of stores lie in the outer one
        assert place.stat().st_mode & 0o777 == 0o700
    STORE.rm("/cascade", recursive=True)
    assert on_this_machine(address, digest) == path


@pytest.mark.fault
@pytest.mark.parametrize("lost", ["base/weights.safetensors", sealed.MANIFEST])
def test_a_fetched_cascade_that_has_lost_a_file_is_fetched_anew(stored: tuple[str, str], lost: str) -> None:
    path = on_this_machine(*stored)
    (path / lost).unlink()
    assert on_this_machine(*stored) == path
    assert sealed.verify(path).digest == stored[1]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.fault
def test_a_flipped_bit_a_missing_file_and_another_cascade_are_refused(stored: tuple[str, str]) -> None:
    address, digest = stored
    with pytest.raises(sealed.SealError, match=f"is cascade {digest[:12]}, not {'f' * 12} as asked for"):
        on_this_machine(address, "f" * 64)
    with pytest.raises(ValueError, match="is fetched by its digest"):
        on_this_machine(address, "../../x")
    whole = STORE.cat_file("/cascade/base/weights.safetensors")
    STORE.pipe_file("/cascade/base/weights.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(sealed.SealError, match=r"base/weights\.safetensors: sha256 is"):
        on_this_machine(address, digest)
    STORE.rm_file("/cascade/base/weights.safetensors")
    with pytest.raises(sealed.SealError, match=r"base/weights\.safetensors is missing"):
        on_this_machine(address, digest)


@pytest.mark.fault
def test_a_manifest_that_names_files_elsewhere_writes_none(stored: tuple[str, str], tmp_path: Path) -> None:
    address, digest = stored
    body = json.loads(STORE.cat_file("/cascade/manifest.json"))
    body["files"] |= {"../../../out": "0" * 64}
    STORE.pipe_file("/cascade/manifest.json", json.dumps(body).encode())
    with pytest.raises(sealed.SealError, match=r"names '\.\./\.\./\.\./out', outside the cascade"):
        on_this_machine(address, digest)
    STORE.rm_file("/cascade/manifest.json")
    with pytest.raises(sealed.SealError, match="it was never finished"):
        on_this_machine(address, digest)
    assert not list((tmp_path / "tmp").rglob("*.safetensors"))
