"""Prepared data is whole, says what it is, is not made twice, and goes on where it was cut."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dd_core import sealed
from jobs.failures import code_of, line_of
from jobs.inspection import verified
from jobs.prepare import check_shards, stats_of, summary
from tests.conftest import jpg, needs_ray, write_shard
from workflows import census, feed, prepare
from workflows.census import TooManyRejectsError
from workflows.files import Found, MissingShardError, ShardFile
from workflows.pairs import PairsSpec
from workflows.parts import (
    UNFINISHED,
    DestinationError,
    Part,
    claimed,
    data_digest,
    refusal,
    resumed,
    write_part,
)
from workflows.prepare import facts_of, keys_of, prepare_pairs, prepared, reported
from workflows.progress import SampleProgress
from workflows.storage import Home, StorageError

KINDS = ("jpg", "txt")


def tars(directory: Path, count: int, *, bad: int = 0) -> Path:
    directory.mkdir(exist_ok=True)
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


def shard_to_do(number: int, url: str, key: str = "") -> dict[str, np.ndarray]:
    return {"shard": np.array([number]), "url": np.array([url]), "key": np.array([key])}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of the job, without Ray, one after another."""

    def reports(todo: list[dict[str, Any]], spec: PairsSpec, home: Home) -> Iterator[dict[str, Any]]:
        for one in todo:
            for told in reported(shard_to_do(*one.values()), spec=spec, home=home):
                yield {name: value[0] for name, value in told.items()}

    monkeypatch.setattr(prepare, "reports", reports)


def as_older_versions_wrote(out: Path) -> str:
    """Rewrites the manifest; returns its digest."""
    facts = json.loads((out / "manifest.json").read_text())
    files = facts.pop("files")
    for name in ("digest", "content", "enlarged", "captions_cut"):
        del facts[name]
    for part in facts["parts"]:
        for name in ("source", "usable", "enlarged", "captions_cut"):
            del part[name]
    return sealed.seal(out, files, facts)


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


def test_of_a_shard_of_many_row_groups_few_reports_come_that_add_up_to_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i:04d}.{kind}": jpg(8, 8, 1) if kind == "jpg" else b"a" for i in range(900) for kind in KINDS}
    spec, now = spec_of(tmp_path, 1), iter(range(1000))
    tar = write_shard(tmp_path / "00000.tar", files)
    resumed(tmp_path / "out", "s")
    monkeypatch.setattr(prepare, "time", SimpleNamespace(monotonic=lambda: 0.5 * next(now)))
    told = list(reported(shard_to_do(0, str(tar)), spec=spec, home=Home.of(tmp_path / "out")))
    parts = [Part.model_validate_json(str(one["part"][0])) for one in told if one["part"][0]]
    assert [(part.rows, len(part.usable)) for part in parts] == [(900, 15)]
    assert 3 <= len(told) <= 5
    assert sum(int(one["rows"][0]) for one in told) == 900
    positions = [int(one["position"][0]) for one in told]
    assert positions == sorted(positions)
    assert positions[-1] >= positions[0] > 0


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
    named = [[Found(f"{url}{more}", 1, "v")] for more in ("", "3", "&part=2")]
    one, renewed, other = (facts_of(spec, found) for found in named)
    assert one["shards"] == other["shards"] == ["memory://signed/00000.tar"]
    assert one["source"] == renewed["source"] != other["source"]
    assert keys_of(spec, named[0]) == keys_of(spec, named[1]) != keys_of(spec, named[2])
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


def test_of_thousands_of_parts_a_store_is_asked_by_one_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = spec_of(tars(tmp_path, 3), 3), Home.of(f"memory://listed/{tmp_path.name}")
    resumed(out, "s")
    for shard in range(3):
        list(write_part(out, shard, f"{tmp_path}/{shard:05d}.tar", spec))
    out.drop("part-00001.parquet")
    asked = list[str]()
    monkeypatch.setattr(Home, "size", lambda _, name: asked.append(name))
    assert resumed(out, "s").keys() == {0, 2}
    assert asked == []


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
        (told,) = reported(shard_to_do(1, "b.tar"), spec=spec, home=Home.of(out))
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
    assert prepared(out).digest == first.digest  # which stays
    refused = json.loads((out / "refused.json").read_text())
    assert (refused["kept"], refused["rejects"]) == (12, {"image-format": 6})
    allowed = prepare_pairs(spec.but(max_reject_fraction=0.4), progress=False)
    assert (allowed.facts["kept"], allowed.facts["rejected"]) == (12, 6)
    assert sealed.verify(out).digest == allowed.digest
    assert len(list(out.glob("part-*"))) == 3
    with pytest.raises(TooManyRejectsError, match=r"see .*/out/manifest\.json, then mend the shards"):
        prepare_pairs(spec, progress=False)


@pytest.mark.usefixtures("in_this_process")
def test_a_rotten_source_is_refused_long_before_its_end_and_a_rotten_shard_among_good_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "MANY", 12)
    spec, out = spec_of(tars(tmp_path, 40, bad=6), 40), tmp_path / "out"
    for _ in range(2):  # the next start finds it so without another shard
        with pytest.raises(
            TooManyRejectsError, match=r"30 of 30 samples .*; found after 5 of 40 shards; see "
        ):
            prepare_pairs(spec, progress=False)
        assert len(list((out / UNFINISHED).glob("part-*.json"))) == 5
    refused = json.loads((out / census.REFUSED).read_text())
    assert (len(refused["parts"]), len(refused["shards"])) == (5, 40)
    rotten = tmp_path / "00000.tar"
    bad = rotten.read_bytes()
    tars(tmp_path, 40)
    rotten.write_bytes(bad)
    assert prepare_pairs(spec, progress=False).facts["rejected"] == 6


@pytest.mark.usefixtures("in_this_process")
def test_data_that_lack_a_shard_are_never_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them, spec = prepare.written, spec_of(tars(tmp_path, 3), 3)
    notes, lost = tmp_path / "out" / UNFINISHED, [True, False]

    def written(*given: Any) -> Iterator[Part]:
        *told, last = all_of_them(*given)
        if lost.pop(0):
            (notes / last.file.replace(".parquet", ".json")).unlink()
        yield from told

    monkeypatch.setattr(prepare, "written", written)
    with pytest.raises(DestinationError, match="lacks the part of shard 2; prepare again"):
        prepare_pairs(spec, progress=False)
    assert not (tmp_path / "out" / sealed.MANIFEST).exists()
    done = prepare_pairs(spec, progress=False)  # only the report is lost, as by a task that Ray repeats
    monkeypatch.setattr(prepare, "written", all_of_them)
    other = spec.but(destination=str(tmp_path / "other"))
    assert data_digest(done.facts) == data_digest(prepare_pairs(other, progress=False).facts)


@pytest.mark.usefixtures("in_this_process")
def test_what_is_sealed_stays_until_what_is_new_is_good_and_shards_that_stayed_are_not_prepared_again(
    tmp_path: Path,
) -> None:
    out, spec = tmp_path / "out", spec_of(tars(tmp_path, 2), 3)
    first = prepare_pairs(spec_of(tmp_path, 2), progress=False)
    times = [Path(file).stat().st_mtime_ns for file in first.files]
    tars(tmp_path / "new", 3, bad=5)
    shutil.copy(tmp_path / "new" / "00002.tar", tmp_path)
    with pytest.raises(TooManyRejectsError):
        prepare_pairs(spec, progress=False)
    assert prepared(out) == first
    assert {census.REFUSED, UNFINISHED} < {path.name for path in out.iterdir()}
    assert verified(out)["digest"] == first.digest
    assert tuple(feed.prepared_files(out)) == first.files  # and not the part that is there for the next time
    assert prepare_pairs(spec_of(tmp_path, 2), progress=False) == first
    assert sealed.verify(out).digest == first.digest  # nothing of what was refused is left
    tars(tmp_path / "new", 3)
    shutil.copy(tmp_path / "new" / "00002.tar", tmp_path)
    grown = prepare_pairs(spec, progress=False)
    assert [Path(file).stat().st_mtime_ns for file in grown.files[:2]] == times
    assert sealed.verify(out).digest == grown.digest
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00001.tar")
    changed = prepare_pairs(spec, progress=False)
    assert [old == new for old, new in zip(grown.files, changed.files, strict=True)] == [True, False, True]
    assert sealed.verify(out).digest == changed.digest
    assert pq.read_table(changed.files[1])["caption"][0].as_py() == "picture 0 of shard 0"


@pytest.mark.parametrize("done", range(12))
@pytest.mark.usefixtures("in_this_process")
def test_a_preparation_that_is_killed_anywhere_leaves_what_was_sealed_or_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    out, spec = tmp_path / "out", spec_of(tars(tmp_path, 2), 2)
    first = prepare_pairs(spec, progress=False)
    write_shard(tmp_path / "00001.tar", {"0.jpg": jpg(20, 20, 99), "0.txt": b"new"})
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
        prepare_pairs(spec, progress=False)
    stands = prepared(out)
    assert stands.facts["kept"] in (first.facts["kept"], 7)
    assert all(sealed.sha256(Path(file)) == stands.facts["files"][Path(file).name] for file in stands.files)
    assert prepare_pairs(spec, progress=False).facts["kept"] == 7
    assert len(sealed.verify(out).facts["parts"]) == 2  # and no file besides


@pytest.mark.usefixtures("in_this_process")
def test_prepared_data_outlives_the_shards_that_it_was_made_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tars(tmp_path, 2), 2)
    for asked in (spec, spec.but(shards=(f"{tmp_path}/*.tar",)), spec.but(shards=(str(tmp_path / "raw"),))):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "raw").mkdir(exist_ok=True)
        tars(tmp_path, 2), tars(tmp_path / "raw", 2)
        done = prepare_pairs(asked, progress=False)
        for tar in (*tmp_path.glob("*.tar"), *tmp_path.glob("raw/*.tar")):
            tar.unlink()
        caplog.clear()
        assert prepare_pairs(asked, progress=False) == done
        assert "the raw shards of" in caplog.text
        for other in (asked.but(sizes=(8,)), asked.but(shards=(f"{tmp_path}/other.tar",))):
            with pytest.raises(MissingShardError):
                prepare_pairs(other, progress=False)


@pytest.mark.usefixtures("in_this_process")
def test_finished_data_serve_where_the_store_of_their_shards_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tars(tmp_path, 1), 1)
    done = prepare_pairs(spec, progress=False)

    def away(_: object) -> None:
        raise StorageError("no answer")

    monkeypatch.setattr(prepare, "located", away)
    assert prepare_pairs(spec, progress=False) == done
    with pytest.raises(StorageError, match="no answer"):
        prepare_pairs(spec.but(sizes=(8,)), progress=False)


def hold(out: Path, there: Connection) -> None:
    with claimed(Home.of(out)):
        there.send(os.getpid())
        there.recv()
    os._exit(0)


def test_two_do_not_prepare_into_one_directory_at_once(tmp_path: Path) -> None:
    spec, (here, there) = spec_of(tars(tmp_path, 1), 1), multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "out", there))
    other.start()
    try:
        with pytest.raises(DestinationError, match=rf"out is being prepared by process {here.recv()} on "):
            prepare_pairs(spec, progress=False)
    finally:
        here.send("")
        other.join()
    with claimed(Home.of(spec.destination)):
        pass


@pytest.mark.usefixtures("in_this_process")
def test_what_data_is_to_a_stage_depends_on_no_place_and_no_time_of_the_shards(
    tmp_path: Path,
) -> None:
    first, other = tmp_path / "a", tmp_path / "b"
    first.mkdir(), other.mkdir()
    here = prepare_pairs(spec_of(tars(first, 2), 2), progress=False)
    there = prepare_pairs(spec_of(tars(other, 2), 2), progress=False)
    assert here.digest != there.digest
    assert data_digest(here.facts) == data_digest(there.facts)
    old = as_older_versions_wrote(first / "out")
    assert data_digest(json.loads((first / "out" / "manifest.json").read_text())) == old
    os.utime(first / "00000.tar", (1, 1))
    assert data_digest(prepare_pairs(spec_of(first, 2), progress=False).facts) == old
    tars(first, 2, bad=1)
    changed = prepare_pairs(spec_of(first, 2).but(max_reject_fraction=0.5), progress=False)
    assert data_digest(changed.facts) not in (old, data_digest(there.facts))


@pytest.mark.usefixtures("in_this_process")
def test_samples_that_a_downloader_counted_and_a_shard_has_not_are_rejects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tars(tmp_path, 1), 1)
    (tmp_path / "00000_stats.json").write_text('{"successes": 100}')
    with pytest.raises(TooManyRejectsError, match=r"94 of 100 samples rejected \(94 missing\)"):
        prepare_pairs(spec, progress=False)
    with pytest.raises(TooManyRejectsError, match=r"94 of 100 samples rejected \(94 missing\)"):
        check_shards(spec.shards, max_rejected=0.05, min_side=8)
    done = prepare_pairs(spec.but(max_reject_fraction=0.94), progress=False)
    assert (done.facts["kept"], done.facts["rejected"], done.facts["rejects"]) == (6, 94, {"missing": 94})
    assert "broke off" not in caplog.text
    (tmp_path / "00000_stats.json").unlink()
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:4000])
    with pytest.raises(TooManyRejectsError, match="1 of 1 shards broken; 50% are allowed"):
        prepare_pairs(spec.but(max_reject_fraction=0.5), progress=False)  # a tenth of it may be left
    prepare_pairs(spec.but(max_reject_fraction=1), progress=False)
    assert "1 of 1 shards broke off, and nothing tells how many samples are lost" in caplog.text


@pytest.mark.usefixtures("in_this_process")
def test_data_that_were_accepted_with_a_broken_shard_stay_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of(tars(tmp_path, 3), 3)
    broken = tmp_path / "00001.tar"
    broken.write_bytes(broken.read_bytes()[:-10_000])
    strict = spec.but(max_reject_fraction=0.1)
    with pytest.raises(TooManyRejectsError, match="1 of 3 shards broken; 10% are allowed"):
        prepare_pairs(strict, progress=False)
    done = prepare_pairs(spec.but(max_reject_fraction=0.4), progress=False)
    caplog.clear()
    assert prepare_pairs(strict, progress=False) == done
    assert "1 of 3 shards broke off, and nothing tells how many samples are lost" in caplog.text


@pytest.mark.usefixtures("in_this_process")
def test_enlarged_images_and_cut_captions_are_counted_and_said(tmp_path: Path) -> None:
    spec = spec_of(tars(tmp_path, 1), 1)
    assert not {"enlarged", "captions_cut"} & summary(prepare_pairs(spec, progress=False)).keys()
    said = summary(prepare_pairs(spec.but(sizes=(8, 32), context_length=6), progress=False))
    assert (said["kept"], said["enlarged"], said["captions_cut"]) == (6, 6, 6)


@pytest.mark.usefixtures("in_this_process")
def test_a_stage_begins_without_reading_a_row_of_what_a_manifest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = prepare_pairs(spec_of(tars(tmp_path, 3, bad=2), 3).but(max_reject_fraction=0.5), progress=False)
    as_older_versions_wrote(tmp_path / "out")
    counted = feed.survey(done.files, feed.Wanted(16))
    done = prepare_pairs(
        spec_of(tmp_path, 3).but(max_reject_fraction=0.5, destination=str(tmp_path / "new")), progress=False
    )
    monkeypatch.delattr(pq.ParquetFile, "read_row_group")
    noted = feed.survey(done.files, feed.Wanted(16))
    assert noted.rows.tolist() == counted.rows.tolist() == [4, 4, 4]


FULL = """
import resource, sys
import numpy as np
from workflows.pairs import PairsSpec
from workflows.parts import resumed
from workflows.prepare import reported
from workflows.storage import Home
directory = sys.argv[1]
sys.dont_write_bytecode = True  # it would be cut
spec = PairsSpec(shards=("a.tar",), destination=f"{directory}/out", sizes=(16,), min_side=8)
resumed(spec.destination, "s")
shard = {"shard": np.array([0]), "url": np.array([f"{directory}/00000.tar"]), "key": np.array([""])}
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
*_, told = reported(shard, spec=spec, home=Home.of(spec.destination))
print(int(told["errno"][0]), str(told["error"][0]), sep="\\n")
"""


def test_no_room_for_a_part_is_no_fault_of_the_configuration(tmp_path: Path) -> None:
    tars(tmp_path, 1)
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    number, error = done.stdout.splitlines()
    refused = refusal(Home.of(tmp_path / "out"), int(number), error)
    assert code_of(refused) == 70
    assert line_of(refused).startswith(f"no space left on {tmp_path}/out for a file so large (`ulimit -f`); ")
    assert list((tmp_path / "out").glob("*part*")) == []
    full = refusal(Home.of(tmp_path), 28, "no space")
    assert (code_of(full), line_of(full).partition(";")[0]) == (70, f"no space left on {tmp_path}")
    assert code_of(refusal(Home.of(tmp_path), 13, "no right")) == 2


@pytest.mark.usefixtures("in_this_process")
def test_data_in_a_store_are_counted_as_those_in_a_directory(tmp_path: Path) -> None:
    spec = spec_of(tars(tmp_path, 2, bad=1), 2).but(max_reject_fraction=0.5)
    prepare_pairs(spec, progress=False)
    here = stats_of(spec.destination)
    stored = f"memory://counted/{tmp_path.name}"
    prepare_pairs(spec.but(destination=stored), progress=False)
    assert stats_of(stored) == here
    assert (here["kept"], here["distinct_captions"], here["files"]) == (10, 10, 2)
    assert here["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["s3://b/t/0.tar", "s3://b/t/1.tar"], True),
        (["s3://b/t/0.tar"], False),
        (["s3://b/t"], True),
        (["s3://b/t/"], True),
        (["s3://b"], False),
        (["s3://b/t/?.tar"], True),
        (["s3://b/t/[0]*.tar"], False),
        (["s3://b/t/0.tar", "s3://b/*/1.tar"], True),
    ],
)
def test_finished_data_are_of_a_source_that_names_all_their_shards(names: list[str], meant: bool) -> None:
    assert prepare.are_of(["s3://b/t/0.tar", "s3://b/t/1.tar"], names) is meant


def test_a_source_of_many_named_shards_is_compared_name_by_name_only_where_there_are_globs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[str]()
    monkeypatch.setattr(prepare, "fnmatch", lambda url, pattern: bool(asked.append(pattern)))
    names = [f"s3://b/{number:05d}.tar" for number in range(200)]
    assert prepare.are_of(names, names)
    assert not asked
    assert not prepare.are_of([*names, "s3://c/x.tar"], [*names, "s3://d/*.tar"])
    assert asked == ["s3://d/*.tar"]
