"""Prepared data is whole, says what it is, is not made twice, and goes on where it was cut."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dd_core import sealed
from tests.conftest import jpg, needs_ray, write_shard
from workflows.files import Found, MissingShardError, ShardFile
from workflows.pairs import PairsSpec, TooManyRejectsError
from workflows.parts import UNFINISHED, DestinationError, Part, resumed, write_part
from workflows.prepare import facts_of, prepare_pairs, prepared, reported
from workflows.progress import SampleProgress
from workflows.storage import Home, StorageError


def tars(directory: Path, count: int, *, bad: int = 0) -> Path:
    for shard in range(count):
        files = {}
        for i in range(6):
            files[f"{i}.jpg"] = jpg(20, 20, 10 * shard + i) if i >= bad else b"junk"
            files[f"{i}.txt"] = f"picture {i} of shard {shard}".encode()
        write_shard(directory / f"{shard:05d}.tar", files)
    return directory


def spec_of(directory: Path, shards: int) -> PairsSpec:
    return PairsSpec(
        shards=(f"{directory}/{{00000..{shards - 1:05d}}}.tar",),
        destination=str(directory / "out"),
        sizes=(8, 16),
        context_length=8,
        min_side=8,
    )


def parts_of(directory: Path, shard: int, spec: PairsSpec) -> list[Part]:
    steps = write_part(directory, shard, f"{directory.parent}/{shard:05d}.tar", spec)
    return [part for _, _, part in steps if part]


def test_a_part_is_there_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    spec, out = spec_of(tars(tmp_path, 1), 1), tmp_path / "out"
    assert resumed(out, "s") == {}
    steps = write_part(out, 0, str(tmp_path / "00000.tar"), spec)
    rows, position, part = next(steps)
    assert (rows, position > 0, part, list(out.glob("part-*"))) == (6, True, None, [])
    steps.close()
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    (part,) = parts_of(out, 0, spec)
    assert (part.rows, part.kept, part.rejects, part.damage) == (6, 6, {}, "")
    assert part.sha256 == sealed.sha256(out / "part-00000.parquet")


def test_the_signature_of_a_shard_is_neither_in_its_part_nor_in_the_manifest(tmp_path: Path) -> None:
    spec = spec_of(tars(tmp_path, 1), 1)
    data = (tmp_path / "00000.tar").read_bytes()
    url = "memory://signed/00000.tar?sig=hunter2"
    with fsspec.open(url, "wb") as file:
        file.write(data[: len(data) // 2])  # and damaged, so that its damage is told as well
    resumed(tmp_path / "out", "s")
    *_, (_, _, part) = write_part(tmp_path / "out", 0, url, spec)
    assert part is not None
    assert (part.url, bool(part.damage)) == ("memory://signed/00000.tar", True)
    one, other = (facts_of(spec, [Found(f"{url}{more}", 1, "v")]) for more in ("", "3"))
    assert one["shards"] == other["shards"] == ["memory://signed/00000.tar"]
    assert one["source"] != other["source"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"hunter2" not in written + str(part).encode()


def test_what_an_earlier_run_finished_stays_and_what_it_spoilt_goes(tmp_path: Path) -> None:
    spec, out = spec_of(tars(tmp_path, 4), 4), tmp_path / "out"
    resumed(out, "s")
    made = [part for shard in range(4) for part in parts_of(out, shard, spec)]
    flipped = bytearray((out / "part-00001.parquet").read_bytes())
    flipped[100] ^= 1
    (out / "part-00001.parquet").write_bytes(bytes(flipped))
    (out / UNFINISHED / "part-00002.json").write_text("{")
    (out / ".part-00003-abc.draft").write_bytes(b"half")
    assert resumed(out, "s") == {0: made[0], 3: made[3]}
    assert sorted(path.name for path in out.glob("*part*")) == ["part-00000.parquet", "part-00003.parquet"]
    assert resumed(out, "another source") == {}
    assert list(out.glob("*part*")) == []


@pytest.mark.parametrize("failure", [ConnectionError, PermissionError])
def test_a_shard_that_a_store_did_not_give_is_read_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[OSError]
) -> None:
    spec, out = spec_of(tars(tmp_path, 2), 2), tmp_path / "out"
    resumed(out, "s")
    made = parts_of(out, 0, spec)

    def away(file: ShardFile) -> None:
        raise failure("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "open", away)
        patch.setattr("workflows.files.time.sleep", lambda _: None)
        with pytest.raises(
            StorageError, match=r"00001\.tar cannot be read at byte 0: the store is away; when"
        ):
            parts_of(out, 1, spec)
        (told,) = reported({"shard": np.array([1]), "url": np.array(["b.tar"])}, spec=spec, home=Home.of(out))
        assert str(told["away"][0]).startswith("b.tar cannot be read at byte 0")
    assert resumed(out, "s") == {0: made[0]}
    (part,) = parts_of(out, 1, spec)
    assert (part.kept, part.damage) == (6, "")
    (tmp_path / "00001.tar").unlink()  # that is another matter
    (gone,) = parts_of(out, 1, spec)
    assert (gone.kept, gone.rejects) == (0, {"shard": 1})
    assert "cannot be read at byte 0" in gone.damage


@pytest.mark.parametrize("done", range(8))
@pytest.mark.parametrize("sealed_before", [True, False])
def test_a_kill_while_a_directory_is_made_ready_for_another_source_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, *, sealed_before: bool
) -> None:
    spec, out = spec_of(tars(tmp_path, 2), 2), tmp_path / "out"
    resumed(out, "old")
    made = [part for shard in range(2) for part in parts_of(out, shard, spec)]
    if sealed_before:
        facts = {"parts": [part.model_dump(mode="json") for part in made]}
        sealed.seal(out, {part.file: part.sha256 for part in made}, facts)
        Home.of(out).drop(UNFINISHED)
    left = iter([True] * done)

    def until_killed(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any) -> None:
            if not next(left, False):
                raise KeyboardInterrupt
            change(*args)

        return changed

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Home, "drop", until_killed(Home.drop))
        patch.setattr(Home, "write", until_killed(Home.write))
        resumed(out, "new")
    assert resumed(out, "new") == {}
    assert sorted(path.name for path in out.iterdir()) == [UNFINISHED]
    assert [path.name for path in (out / UNFINISHED).iterdir()] == ["source.json"]


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DestinationError, match="holds other files; choose an empty or a new directory"):
        resumed(tmp_path, "s")
    with pytest.raises(DestinationError, match="cannot be written to"):
        resumed(tmp_path / "thesis.txt" / "out", "s")
    with pytest.raises(DestinationError, match="holds no finished data"):
        prepared(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_missing_shard_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MissingShardError, match=r"00002\.tar does not exist"):
        prepare_pairs(spec_of(tars(tmp_path, 2), 3), progress=False)
    assert not (tmp_path / "out").exists()


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with SampleProgress(
        "prepare", 1000, samples=5, position=100, console=Console(file=text, width=40)
    ) as bar:
        bar.advance(20, 900)
    assert text.getvalue().startswith("prepare: 25 samples, ")
    assert text.getvalue().endswith("/s, 100%\n")
    terminal = io.StringIO()
    with SampleProgress("prepare", 0, console=Console(file=terminal, force_terminal=True, width=120)) as bar:
        bar.advance(7, 10)
    assert "7 samples" in terminal.getvalue()


@needs_ray
def test_the_job_makes_each_part_once_and_seals_them(local_ray: None, tmp_path: Path) -> None:
    spec, out = spec_of(tars(tmp_path, 3), 3), tmp_path / "out"
    first = prepare_pairs(spec, progress=False)
    manifest = json.loads((out / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("kept", "rejected", "rejects", "damaged_shards")} == {
        "kept": 18,
        "rejected": 0,
        "rejects": {},
        "damaged_shards": [],
    }
    assert sealed.verify(out).digest == first.digest
    assert [pq.read_table(file)["caption"][5].as_py() for file in first.files] == [
        f"picture 5 of shard {shard}" for shard in range(3)
    ]
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare_pairs(spec, progress=False) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written

    (out / "part-00001.parquet").unlink()  # someone's accident: made again, to the bit
    assert prepare_pairs(spec, progress=False).digest == first.digest

    tars(tmp_path, 3, bad=2)  # the shards change: all is made again, and refused
    with pytest.raises(TooManyRejectsError, match=r"6 of 18 samples rejected \(6 image-format\)"):
        prepare_pairs(spec, progress=False)
    assert not (out / "manifest.json").exists()
    refused = json.loads((out / "refused.json").read_text())
    assert (refused["kept"], refused["rejects"]) == (12, {"image-format": 6})
    allowed = prepare_pairs(spec.but(max_reject_fraction=0.4), progress=False)
    assert (allowed.facts["kept"], allowed.facts["rejected"]) == (12, 6)
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *(f"part-0000{i}.parquet" for i in range(3)),
    ]
    with pytest.raises(TooManyRejectsError):
        prepare_pairs(spec, progress=False)
