"""Shards of the real img2dataset, from a web server with dead links and broken pictures, are prepared."""

import csv
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest

from dd_core import sealed
from dd_core.stage import Budget
from jobs.recipes import smoke
from tests.conftest import RAY_MARKS, file_of, photo
from tests.faults.flaky_store import flaky_store
from workflows.journal import curves
from workflows.pairs import PairsSpec
from workflows.parts import resumed, write_part
from workflows.prepare import prepare_pairs, prepared
from workflows.training import train_stage

pytestmark = RAY_MARKS


class Crawl(NamedTuple):
    """What img2dataset left, and what was true."""

    shards: str
    """A glob."""
    good: int
    """Pairs whose picture came and can be decoded."""
    broken: int
    """Pairs whose picture came and cannot."""
    dead: int
    """Links that gave nothing."""


def img2dataset_shards(
    directory: Path, *, good: int = 24, broken: int = 3, dead: int = 4, side: int = 256
) -> Crawl:
    """Run img2dataset 1.47 over pictures on 127.0.0.1, re-encoding nothing, 16 pairs a shard.

    Args:
        directory: Gets pictures/, urls.csv and shards/.
        good: Pictures; even ones JPEG, odd ones PNG (img2dataset calls both .jpg).
        broken: Files that are served as pictures and are none.
        dead: Addresses that answer 404.
        side: Of the pictures, in pixels.
    """
    pictures, out = directory / "pictures", directory / "shards"
    pictures.mkdir(parents=True)
    rows = []
    for number in range(good + broken + dead):
        name = f"{number:03d}.jpg"
        if number < good:
            pixels = photo(side + 8 * (number % 5), side, seed=number)
            (pictures / name).write_bytes(file_of(pixels, "PNG" if number % 2 else "JPEG"))
        elif number < good + broken:
            (pictures / name).write_bytes(b"\xff\xd8\xff\xe0 not a picture")
        rows.append((name, f"a photo of number {number}, somewhere"))
    rows.sort(key=lambda row: row[1][::-1])  # the bad ones among the good
    with flaky_store(pictures, []) as store:
        with (directory / "urls.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("url", "caption"), *((f"{store.url}/{name}", text) for name, text in rows)]
            )
        options = {
            "url_list": directory / "urls.csv",
            "input_format": "csv",
            "url_col": "url",
            "caption_col": "caption",
            "output_folder": out,
            "output_format": "webdataset",
            "disable_all_reencoding": True,
            "processes_count": 1,
            "thread_count": 4,
            "number_sample_per_shard": 16,
            "retries": 0,
            "timeout": 300,  # of a busy machine
        }
        command = [
            str(Path(sys.executable).parent / "img2dataset"),
            *(f"--{k}={v}" for k, v in options.items()),
        ]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=900,
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
        )
    return Crawl(f"{out}/*.tar", good, broken, dead)


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Crawl:
    return img2dataset_shards(tmp_path_factory.mktemp("crawl"))


@pytest.fixture(scope="module")
def pairs(local_ray: None, crawl: Crawl, tmp_path_factory: pytest.TempPathFactory) -> PairsSpec:
    """How its pairs have been prepared."""
    spec = PairsSpec(
        shards=(crawl.shards,),
        destination=str(tmp_path_factory.mktemp("prepared") / "out"),
        sizes=(32, 64),
        context_length=smoke.CONTEXT,
        max_reject_fraction=0.2,
    )
    prepare_pairs(spec, progress=False)
    return spec


def test_every_pair_that_came_is_kept_or_counted(crawl: Crawl, pairs: PairsSpec, tmp_path: Path) -> None:
    out = Path(pairs.destination)
    found = prepared(out).facts
    assert (found["kept"], found["rejected"]) == (crawl.good, crawl.broken)
    assert set(found["rejects"]) <= {"image-broken", "image-format"}
    assert found["damaged_shards"] == []
    stats = [json.loads((path).read_text()) for path in Path(crawl.shards).parent.glob("*_stats.json")]
    assert sum(shard["successes"] for shard in stats) == found["kept"] + found["rejected"]
    assert sum(shard["failed_to_download"] for shard in stats) == crawl.dead
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    kept = {row["caption"]: json.loads(row["meta"]) for row in rows if not row["reject"]}
    assert set(kept) == {f"a photo of number {number}, somewhere" for number in range(crawl.good)}
    assert all(meta["caption"] == caption and meta["status"] == "success" for caption, meta in kept.items())
    by_json = pairs.but(caption="json:caption", destination=str(tmp_path / "j"))
    assert prepare_pairs(by_json, progress=False).facts["kept"] == crawl.good


def test_a_stage_learns_from_them(crawl: Crawl, pairs: PairsSpec, tmp_path: Path) -> None:
    spec = smoke.clip().but(
        batch_size=crawl.good, budget=Budget(steps=12, checkpoint_every=12, report_every=1)
    )
    made = sealed.verify(train_stage(spec, run=tmp_path / "run", data=Path(pairs.destination)))
    assert made.facts["images"] == 12 * crawl.good
    loss = curves(tmp_path / "run" / "clip" / "metrics.jsonl")["train/loss"]
    assert loss[12] < 0.8 * loss[1]  # two dozen pairs, seen a dozen times, tell each other apart


def test_samples_that_vanished_from_a_shard_are_missed(crawl: Crawl, tmp_path: Path) -> None:
    shard = tmp_path / "00000.tar"
    source = Path(crawl.shards).parent / "00000.tar"
    data = bytearray(source.read_bytes())
    with tarfile.open(source) as tar:
        last = tar.getmembers()[-3].offset
    data[last:] = bytes(len(data) - last)  # zeroed to the end: a valid, shorter archive
    shard.write_bytes(bytes(data))
    stats = source.with_name("00000_stats.json")
    (tmp_path / stats.name).write_bytes(stats.read_bytes())
    promised = json.loads((stats).read_text())["successes"]
    spec = PairsSpec(shards=(str(shard),), destination=str(tmp_path / "out"), sizes=(16,))
    resumed(tmp_path / "out", "")
    *_, (_, _, part) = write_part(tmp_path / "out", 0, str(shard), spec)
    assert part is not None
    assert part.damage == f"{promised - 1} samples, 00000_stats.json says {promised}"
