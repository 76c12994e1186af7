"""A cascade in a store is shown, verified and painted with as if it lay here, and its damage is named."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from jobs.cli import main
from tests.unit.serve.tiny import tiny_cascade

ADDRESS = "memory://bucket/tiny/cascade"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cascade at ADDRESS, and a temporary directory of the test's own for what is fetched."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiny_cascade(tmp_path / "run")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "run" / "cascade"), ADDRESS, recursive=True)
    yield tmp_path / "run" / "cascade"
    fs.rm("memory://bucket", recursive=True)


def facts(*words: str) -> dict[str, object]:
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_it_is_shown_and_verified_under_its_address(stored: Path, command: str) -> None:
    here, there = facts(command, str(stored)), facts(command, ADDRESS)
    assert there == here | {"path": ADDRESS}


def test_it_paints_the_same_picture(stored: Path, tmp_path: Path) -> None:
    for name, cascade in (("here", str(stored)), ("there", ADDRESS)):
        facts("sample", "a red circle", "--cascade", cascade, "--out", str(tmp_path / name))
    one, other = ([path.read_bytes() for path in (tmp_path / name).iterdir()] for name in ("here", "there"))
    assert one == other
    assert len(one) == 1


def test_what_is_damaged_or_missing_there_is_named(stored: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{ADDRESS}/cascade.json", b"{}")
    for command in ("inspect", "verify"):
        done = CliRunner().invoke(main, [command, ADDRESS])
        assert (done.exit_code, f"{ADDRESS}, fetched" in done.stderr, "cascade.json" in done.stderr) == (
            4,
            True,
            True,
        )
    gone = CliRunner().invoke(main, ["inspect", "memory://bucket/nothing"])
    assert (gone.exit_code, "memory://bucket/nothing has no manifest.json" in gone.stderr) == (4, True)
