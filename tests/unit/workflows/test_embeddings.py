"""The embeddings of a frozen CLIP are those of the images, row by row, made once."""

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from numpy.typing import NDArray

from dd_core import bundle, images, sealed
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec, Trained
from dd_core.stages import build_stage
from dd_core.stages.base import BaseSpec
from dd_core.stages.clip import ClipSpec, clip_of
from dd_core.stages.draft import DraftSpec
from dd_core.training import TrainState
from tests.conftest import needs_ray
from tests.prepared import png, write_prepared
from tests.unit.workflows.tiny_run import saved
from workflows import embeddings, feed, training
from workflows.embeddings import Embeddings, at_once, embed, home_of, require, write_sidecar
from workflows.feed import Order, Wanted
from workflows.parts import UNFINISHED, DestinationError
from workflows.reading import paired
from workflows.row_groups import DataError, groups_of
from workflows.storage import Home
from workflows.train_spec import SamplesSpec, TrainSpec
from workflows.worker import Job, Position, Recorder

SIZE, WIDTH, FILES, ROWS, REJECTED = 16, 16, 3, 40, 3
MANY = 100_000
"""Images that the job is told of, so that several processes work at once."""
SCHEMA = pa.field("embedding", pa.list_(pa.float32(), WIDTH), nullable=False)
NET = ClipNetSpec(
    embedding_width=WIDTH,
    image_size=32,
    patch_size=16,
    image_width=32,
    image_layers=1,
    context_length=8,
    text_width=32,
    text_layers=1,
    head_width=16,
)


class Made(NamedTuple):
    """Prepared data, a CLIP, and what it says of the data."""

    data: Path
    clip: Path
    what: Embeddings


def embeddings_of(run: Path, data: Path, clip: Path) -> Embeddings:
    files, digest = tuple(feed.prepared_files(data)), sealed.verify(clip).digest
    home = home_of(Home.of(run), "clip", Home.of(run).at("clip/bundle"), digest, SIZE)
    return Embeddings(home, files, "d" * 64, MANY, Home.of(clip), digest, SIZE)


def telling(clip: Path) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    tower = clip_of(bundle.load(clip).trained)

    def says(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = tower.embed_image(images.to_unit(torch.tensor(pixels))).numpy()
        return found

    return says


def column(path: Path) -> list[list[float]]:
    found: list[list[float]] = pq.read_table(path)["embedding"].to_pylist()
    return found


def digests(home: Home) -> dict[str, str]:
    return {path.name: sealed.sha256(path) for path in sorted(home.here.glob("part-*.parquet"))}


@pytest.fixture
def inputs(tmp_path: Path) -> Made:
    data = write_prepared(tmp_path / "prepared", files=FILES, rows=ROWS, size=SIZE, rejected=REJECTED)
    clip = saved(tmp_path / "run", "clip", ClipSpec(net=NET), {})
    return Made(data, clip, embeddings_of(tmp_path / "run", data, clip))


@pytest.fixture
def written(inputs: Made) -> Made:
    """All sidecars, without Ray and without a manifest."""
    for number in range(FILES):
        write_sidecar(inputs.what, number, WIDTH, telling(inputs.clip))
    return inputs


@needs_ray
@pytest.mark.usefixtures("local_ray")
def test_every_row_has_the_embedding_of_its_image_and_rejected_ones_none(
    inputs: Made, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    embed(inputs.what)
    told, home = telling(inputs.clip), inputs.what.home
    for file in range(FILES):
        prepared = pq.ParquetFile(inputs.data / f"part-{file:05d}.parquet")
        beside = pq.ParquetFile(home.here / f"part-{file:05d}.parquet", page_checksum_verification=True)
        assert groups_of(beside) == groups_of(prepared) == [16, 16, 8]
        assert beside.schema_arrow == pa.schema([SCHEMA])
        rows = beside.read()["embedding"].to_pylist()
        assert rows[:REJECTED] == [[0.0] * WIDTH] * REJECTED
        for place in range(REJECTED, ROWS):
            alone = told(feed.decoded([png(SIZE, file * ROWS + place)], SIZE))
            np.testing.assert_allclose(rows[place], alone[0], atol=2e-6)
    facts = sealed.verify(home.here).facts  # every file, and nothing else
    assert (facts["rows"], facts["embedded"], facts["width"]) == (120, 111, WIDTH)
    assert (facts["data"], facts["clip"]) == ("d" * 64, inputs.what.clip_digest)
    assert "embeddings: 111 images in " in caplog.text
    assert "images/s: " in caplog.text
    others_one_at_a_time = digests(home)
    shutil.rmtree(home.here)
    for number in range(FILES):
        write_sidecar(inputs.what, number, WIDTH, telling(inputs.clip))
    assert digests(home) == others_one_at_a_time  # whoever does the work, the same bytes


def test_few_images_are_embedded_in_this_process_to_the_same_bytes(
    inputs: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    embed(inputs.what._replace(images=embeddings.PROCESS_IMAGES - 1))  # no Ray is there to ask
    mine = digests(inputs.what.home)
    shutil.rmtree(inputs.what.home.here)
    for number in range(FILES):
        write_sidecar(inputs.what, number, WIDTH, telling(inputs.clip))
    assert digests(inputs.what.home) == mine


@needs_ray
@pytest.mark.usefixtures("local_ray")
def test_a_cut_job_goes_on_a_finished_one_rests_and_a_lost_or_changed_file_alone_is_made_anew(
    inputs: Made,
) -> None:
    home = inputs.what.home
    with pytest.raises(DataError, match=r"clip/embeddings/16 holds no finished embeddings"):
        require(inputs.what)
    write_sidecar(inputs.what, 1, WIDTH, telling(inputs.clip))  # a job that was killed after one file
    home.write(f"{UNFINISHED}/source.json", json.dumps({"source": inputs.what.source}))
    (home.here / ".part-00000-x.draft").write_bytes(b"half")
    kept = (home.here / "part-00001.parquet").stat().st_mtime_ns
    embed(inputs.what)
    require(inputs.what)
    paths = [home.here / f"part-{number:05d}.parquet" for number in range(FILES)]
    times = [path.stat().st_mtime_ns for path in paths]
    assert times[1] == kept
    assert sorted(path.name for path in home.here.iterdir()) == [
        "manifest.json",
        *(path.name for path in paths),
    ]
    embed(inputs.what)
    assert [path.stat().st_mtime_ns for path in paths] == times
    whole = digests(home)
    paths[0].unlink()
    data = bytearray(paths[2].read_bytes())
    data[300] ^= 1
    paths[2].write_bytes(data)
    embed(inputs.what)
    assert digests(home) == whole
    assert [path.stat().st_mtime_ns == before for path, before in zip(paths, times, strict=True)] == [
        False,
        True,
        False,
    ]


@needs_ray
@pytest.mark.usefixtures("local_ray")
def test_a_job_that_is_told_to_stop_ends_after_a_file_and_goes_on_with_the_rest(inputs: Made) -> None:
    embed(inputs.what, told_to_stop=lambda: True)
    there = {path.name: path.read_bytes() for path in inputs.what.home.here.glob("part-*.parquet")}
    assert there
    assert not inputs.what.home.has("manifest.json")
    embed(inputs.what)
    assert inputs.what.home.has("manifest.json")
    assert all((inputs.what.home.here / name).read_bytes() == data for name, data in there.items())
    assert len(list(inputs.what.home.here.glob("part-*.parquet"))) == FILES


@needs_ray
@pytest.mark.usefixtures("local_ray")
def test_those_by_another_clip_of_other_data_or_of_another_size_are_not_taken(
    inputs: Made, tmp_path: Path
) -> None:
    embed(inputs.what)
    before = digests(inputs.what.home)
    other = saved(tmp_path / "other", "clip", ClipSpec(net=NET.but(image_layers=2)), {})
    by_other = embeddings_of(tmp_path / "run", inputs.data, other)
    assert by_other.home == inputs.what.home
    with pytest.raises(DataError, match="no finished embeddings of this data by this CLIP"):
        require(by_other)
    embed(by_other)
    require(by_other)
    assert not set(digests(by_other.home).values()) & set(before.values())
    with pytest.raises(DataError, match="no finished embeddings of this data by this CLIP"):
        require(by_other._replace(data="e" * 64))
    with pytest.raises(DataError, match="no finished embeddings of this data by this CLIP"):
        require(by_other._replace(image_size=2 * SIZE))


@needs_ray
@pytest.mark.usefixtures("local_ray")
def test_bad_inputs_are_refused_with_the_file_named(inputs: Made, tmp_path: Path) -> None:
    path = inputs.data / "part-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    with pytest.raises(DataError, match=r"part-00001.parquet, row group 0: .*; delete it.*prepare the data"):
        embed(inputs.what)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"has no column 'image64'.*prepare the pairs with this size"):
        write_sidecar(inputs.what._replace(image_size=64), 0, WIDTH, telling(inputs.clip))
    draft = saved(tmp_path / "odd", "draft", DraftSpec(width=8, embedding_width=WIDTH), {"clip": inputs.clip})
    odd = inputs.what._replace(clip=Home.of(draft), home=Home.of(tmp_path / "odd"))
    with pytest.raises(ValueError, match="is a DraftSpec, the parent 'clip' must be a CLIP"):
        embed(odd)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DestinationError, match="holds other files"):
        embed(inputs.what._replace(home=Home.of(tmp_path / "mine")))


def test_a_clip_that_is_no_stage_of_the_run_has_a_place_of_its_own(tmp_path: Path) -> None:
    run, digest = Home.of(tmp_path), hashlib.sha256().hexdigest()
    inside = home_of(run, "towers", run.at("towers/bundle"), digest, 64)
    outside = home_of(run, "/elsewhere/clip/bundle", Home.of("/elsewhere/clip/bundle"), digest, 64)
    assert inside == run.at("towers/embeddings/64")
    assert outside == run.at(f".embeddings/{digest[:16]}/64")


def test_a_batch_has_the_embeddings_of_its_rows_in_any_order(written: Made) -> None:
    wanted = Wanted(SIZE, None, written.what.home.address, WIDTH)
    order = Order(feed.survey(written.what.files, wanted), 3, wanted)
    batch = paired(next(feed.read(order.picks(np.arange(100)), wanted)), wanted)
    assert batch.embedding is not None
    known = {file: column(written.what.home.here / f"part-{file:05d}.parquet") for file in range(FILES)}
    for tokens, image, embedding in zip(batch.tokens, batch.image, batch.embedding, strict=True):
        file, place = divmod(int(tokens[1]) - 1, ROWS)
        assert embedding.tolist() == known[file][place]
        assert np.array_equal(image.numpy(), feed.decoded([png(SIZE, file * ROWS + place)], SIZE)[0])
    blind = wanted._replace(image_size=0)
    same = paired(next(feed.read(order.picks(np.arange(100)), blind)), blind)
    assert same.embedding is not None
    assert torch.equal(same.embedding, batch.embedding)
    assert torch.equal(same.tokens, batch.tokens)
    assert same.image.shape == (100, 3, 0, 0)


def test_a_stage_reads_its_images_and_the_embeddings_of_those_that_it_is_told_of(
    written: Made, tmp_path: Path
) -> None:
    home, run = written.what.home, tmp_path / "run"
    home.write(f"{UNFINISHED}/source.json", json.dumps({"source": written.what.source}))
    embed(written.what)  # all files are there: it seals them
    draft = DraftSpec(
        embedding_width=WIDTH, width=8, image_size=2 * SIZE, embedded_at=SIZE, measured_images=2
    )
    spec = TrainSpec(
        name="draft",
        stage=draft,
        parents={"clip": "clip"},
        optimizer=OptimizerSpec(learning_rate=1e-3),
        budget=Budget(steps=2, checkpoint_every=1),
        batch_size=2,
    )
    found = training.inputs(spec, run=run, data=written.data)
    told = training.embeddings_of(spec, found, run=run)
    assert told is not None
    assert (told.source, told.home) == (written.what.source, home)
    assert training.wanted_of(spec, found, run=run) == Wanted(2 * SIZE, None, home.address, WIDTH)
    own = spec.but(stage=draft.but(embedded_at=None))
    beside = training.embeddings_of(own, found, run=run)
    assert beside is not None
    assert (beside.image_size, beside.home) == (2 * SIZE, Home.of(run).at(f"clip/embeddings/{2 * SIZE}"))
    with pytest.raises(DataError, match="holds no finished embeddings"):
        training.wanted_of(own, found, run=run)


def test_a_grid_is_painted_from_the_embeddings_that_the_training_reads(written: Made, tmp_path: Path) -> None:
    clip, home = bundle.load(written.clip).trained, written.what.home
    draft = DraftSpec(embedding_width=WIDTH, width=8, image_size=SIZE, measured_images=2)
    parents = {"clip": clip, "draft": Trained(draft, build_stage(draft, {"clip": clip}).model.state_dict())}
    net = DiTSpec(
        image_size=SIZE, stem=2, conv_width=8, conv_blocks=1, width=16, layers=1, head_width=8, text_width=32
    )
    spec = TrainSpec(
        name="base",
        stage=BaseSpec(net=net.but(embedding_width=WIDTH), image_size=SIZE, from_draft=True),
        parents={"clip": "clip", "draft": "draft"},
        optimizer=OptimizerSpec(learning_rate=1e-3),
        budget=Budget(steps=2, checkpoint_every=1),
        batch_size=2,
        samples=SamplesSpec(pictures=2, how=SamplingSpec(num_steps=1, guidance_scale=1.0)),
    )
    wanted = Wanted(SIZE, None, home.address, WIDTH)
    pieces = feed.survey(written.what.files, wanted)
    job = Job(spec, Home.of(tmp_path / "base"), pieces, wanted, parents={}, facts={}, drainable=False)
    state = TrainState(build_stage(spec.stage, parents), spec.optimizer)
    recorder = Recorder(job, Position(0, 1), state, parents, seconds_before=0.0)
    recorder.draw(1)
    for number in range(FILES):  # as if of larger pictures
        write_sidecar(written.what, number, WIDTH, lambda pixels: -telling(written.clip)(pixels))
    recorder.draw(2)
    one, other = (job.home.here / f"samples/step-0000000{step}.png" for step in (1, 2))
    assert one.read_bytes() != other.read_bytes()


def read_all(files: tuple[str, ...], wanted: Wanted) -> None:
    order = Order(feed.survey(files, wanted), 0, wanted)
    list(feed.read(order.picks(np.arange(order.rows)), wanted))


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 - 200] ^= 1
    path.write_bytes(data)


def emptied(path: Path) -> None:
    table = pq.read_table(path)
    nothing = pa.array([[0.0] * WIDTH] * len(table), SCHEMA.type)
    pq.write_table(pa.table([nothing], schema=table.schema), path, row_group_size=16)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, r"part-00001.parquet: .*No such file.*run the same command again"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), r"part-00001.parquet: .*made anew"),
        (lambda path: pq.write_table(pq.read_table(path), path), "part-00001.parquet has other rows"),
        (lambda path: pq.write_table(pa.table({"x": [1]}), path), "part-00001.parquet: .*embedding"),
        (damaged, r"part-00001.parquet, row group \d: .*delete it.*made anew"),
        (emptied, "part-00001.parquet lacks embeddings of usable rows"),
    ],
)
def test_a_bad_sidecar_is_refused_with_its_name(
    written: Made, harm: Callable[[Path], Any], message: str
) -> None:
    path = written.what.home.here / "part-00001.parquet"
    harm(path)
    wanted = Wanted(0, None, written.what.home.address, WIDTH)
    with pytest.raises(DataError, match=message) as refused:
        read_all(written.what.files, wanted)
    assert str(path) in str(refused.value)


def test_embeddings_of_another_width_are_refused(written: Made) -> None:
    wanted = Wanted(SIZE, None, written.what.home.address, 2 * WIDTH)
    with pytest.raises(DataError, match=r"the stage reads embeddings of 32 numbers"):
        feed.survey(written.what.files, wanted)


@pytest.mark.parametrize(("count", "tasks"), [(1, 1), (1000, 1), (1001, 2), (10**6, 4)])
def test_few_images_are_not_worth_many_processes(
    written: Made, monkeypatch: pytest.MonkeyPatch, count: int, tasks: int
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "memory": 1e12})
    assert at_once(written.what._replace(images=count), gpus=0) == tasks


def test_row_groups_are_decoded_while_one_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_prepared(tmp_path / "prepared", files=1, rows=40, rejected=3)
    (url,) = feed.prepared_files(data)
    real, read = embeddings.row_group, threading.Semaphore(0)

    def noted(*args: Any) -> Any:
        read.release()
        return real(*args)

    monkeypatch.setattr(embeddings, "row_group", noted)
    groups = embeddings.images_of(url, SIZE)
    images = [next(groups)]
    for _ in range(3):  # all of the file's, though only the first was asked for
        assert read.acquire(timeout=30)
    images += groups
    assert [len(usable) for _, usable in images] == [16, 16, 8]
    assert [int(usable.sum()) for _, usable in images] == [len(pixels) for pixels, _ in images] == [13, 16, 8]
