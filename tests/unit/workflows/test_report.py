"""The report: it needs nothing but itself, shows what the models made, and takes captions for text."""

import base64
import io
import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dd_core import bundle, images
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.precision import Precision
from dd_core.samplers import SamplingSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from jobs import sample
from jobs.cli import main
from jobs.order import Order
from jobs.recipes import smoke
from tests.conftest import write_shard
from tests.own_data import own_data
from tests.unit.dd_core import test_chain as chains
from tests.unit.workflows.tiny_run import make_run, saved, write_parts
from workflows import pictures, report
from workflows.journal import Journal
from workflows.pairs import HELD_OUT, PairsSpec
from workflows.report import write_report
from workflows.row_groups import DataError, row_group

HOSTILE = '<script>alert("x")</script> & a "red" circle'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    """The page of the run, painted once."""
    return write_report(run).read_text()


class Page(HTMLParser):
    """What a browser would fetch, what is left open, and what is said."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.open: list[str] = []
        self.said = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.wanted += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def test_the_page_asks_for_nothing_outside_itself_and_closes_what_it_opens(text: str) -> None:
    page = Page(text)
    assert page.wanted
    assert all(address.startswith(("data:", "#")) for address in page.wanted)
    assert not re.search(r"@import|url\((?!['\"]?data:)", text)
    assert not page.open


def test_the_page_has_every_chapter_that_the_run_has_something_for(text: str) -> None:
    said = Page(text).said
    for chapter in ("Pictures", "Judged by the oracle", "Denoising, step by step", "Noising", "Training"):
        assert chapter in said
    for fact in ("Autoencoder", "Time", "Specs and digests", "75.0%", "20.0% to 80.0%", "dB PSNR"):
        assert fact in said


def test_data_that_lie_elsewhere_are_shown_too_with_their_own_captions(tmp_path: Path) -> None:
    run, data = make_run(tmp_path / "run"), tmp_path / "mine"
    (run / "data" / "prepared").rename(data)
    shutil.rmtree(run / "cascade")  # painting takes most of the time
    assert "Noising" not in Page(write_report(run).read_text()).said
    (run / "summary.json").write_text(json.dumps({"data": str(data)}))
    said = Page(write_report(run).read_text()).said
    assert "Noising" in said
    assert "dB PSNR" in said
    assert pictures.prepared_captions(report.data_of(run, report.summary_of(run)), 2)


def test_of_prepared_data_no_more_is_read_than_is_shown_and_what_is_read_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = own_data(tmp_path / "data", pairs=300, shards=1, held_out=0.1).here
    (file,) = pictures.last_parts(data, 16)
    whole = pq.read_table(data / file).to_pylist()
    usable, held = ([row for row in whole if row["reject"] == mark] for mark in ("", HELD_OUT))
    read: list[int] = []

    def counted(url: str, group: int, columns: Sequence[str], remedy: str) -> pa.Table:
        read.append(group)
        return row_group(url, group, columns, remedy)

    monkeypatch.setattr("workflows.held_out.row_group", counted)
    found, captions = pictures.prepared_images(data, 16, 6)
    assert read == [4]
    assert captions == [row["caption"] for row in usable[-6:]]
    assert np.array_equal(images.to_bytes(found)[-1].numpy(), images.decoded(usable[-1]["image16"]))
    for count in (2, 16, 100):
        said = [row["caption"] for row in [*usable, *held][-count:]]
        assert pictures.prepared_captions(data, count) == said
    column = pq.ParquetFile(data / file).metadata.row_group(4).column(6)
    assert column.path_in_schema == "image16"
    with (data / file).open("rb+") as damaged:
        damaged.seek(column.data_page_offset + column.total_compressed_size - 20)
        byte = damaged.read(1)[0]
        damaged.seek(-1, 1)
        damaged.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match=r"row group 4.*prepare the data again"):
        pictures.prepared_images(data, 16, 6)


def test_held_out_captions_are_looked_for_in_earlier_files_too(tmp_path: Path) -> None:
    data = own_data(tmp_path / "data", pairs=300, shards=3, held_out=0.03).here
    parts = [pq.read_table(path).to_pylist() for path in sorted(data.glob("part-*"))]
    held = [row["caption"] for rows in parts for row in rows if row["reject"] == HELD_OUT]
    last = sum(row["reject"] == HELD_OUT for row in parts[-1])
    assert last < len(held)  # though the last file has as many pairs to train on
    assert pictures.prepared_captions(data, len(held)) == held


def test_a_last_part_without_a_usable_pair_is_passed_over(tmp_path: Path) -> None:
    run, data = make_run(tmp_path / "run"), tmp_path / "run" / "data"
    shutil.rmtree(run / "cascade")  # painting takes most of the time
    world, empty = data / "raw" / "shapes-00000.tar", write_shard(data / "empty.tar", {})
    dead = write_shard(data / "dead.tar", {"a.txt": b"a caption of a dead link"})
    spec = PairsSpec(shards=("x",), destination="x", sizes=(16, 64), context_length=16)
    with_empty, without_any = tmp_path / "with", tmp_path / "without"
    for prepared, tars in ((with_empty, [world, dead, empty]), (without_any, [empty])):
        prepared.mkdir()
        write_parts(prepared, [str(tar) for tar in tars], spec)
    pairs = data / "prepared"
    assert pictures.prepared_captions(with_empty, 16) == pictures.prepared_captions(pairs, 16)
    for count in (1, 6, 100):
        ours, theirs = (pictures.prepared_images(place, 64, count)[0] for place in (pairs, with_empty))
        assert len(ours) == min(count, 12)
        assert torch.equal(ours, theirs)
    (run / "summary.json").write_text(json.dumps({"data": str(with_empty)}))
    said = Page(write_report(run).read_text()).said
    assert "Noising" in said
    assert "dB PSNR" in said
    (run / "summary.json").write_text(json.dumps({"data": str(without_any)}))
    said = Page(write_report(run).read_text()).said
    assert "Noising" not in said
    assert "dB PSNR" not in said


def test_what_a_clip_said_stands_beside_what_it_says_of_the_true_pictures(tmp_path: Path) -> None:
    kept = tmp_path / "evaluation"
    kept.mkdir()
    for name, shade in {"00000.png": -1.0, "00000-true.png": 1.0}.items():
        (kept / name).write_bytes(images.png(torch.full((1, 3, 4, 4), shade)))
    verdict = {"picture": "00000.png", "caption": HOSTILE, "cosine": 0.25, "nearest": False}
    lost = {"picture": "00001.png", "caption": "a cat", "cosine": 0.0, "nearest": False}
    (kept / "verdicts.jsonl").write_text(
        "".join(
            json.dumps(one | {"true_cosine": 0.5, "true_nearest": True}) + "\n" for one in (verdict, lost)
        )
    )
    found = {"cosine": -0.125, "r_precision": 0.25, "true_cosine": 0.5, "true_r_precision": 0.75}
    clip = found | {"n": 2, "failed": 1, "among": 2, "intervals": {name: [-0.5, 1.25] for name in found}}
    for taught, held_out in ((True, False), (False, True)):
        clip |= {"held_out": held_out, "judge": {"name": "ViT-L-14/openai", "taught": taught}}
        (tmp_path / "summary.json").write_text(json.dumps({"clip": clip}))
        page = Page(write_report(tmp_path).read_text())
        for fact in ("Judged by a CLIP", "-0.125", "25.0%", "0.500", "75.0%", HOSTILE, "no picture came"):
            assert fact in page.said
        assert "Judged by the oracle" not in page.said
        assert ("figures flatter" in page.said) == taught
        assert ("no stage was trained on" in page.said) == held_out
        assert "this is no judgement" in page.said
        assert len([one for one in page.wanted if one.startswith("data:image/png")]) == 2


def test_a_caption_is_text_and_never_markup(run: Path) -> None:
    page = Page(write_report(run, prompts=[HOSTILE]).read_text())
    assert HOSTILE in page.said
    assert "script" not in page.open


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    Journal(tmp_path / "metrics.jsonl").tags({"state": "begun"})
    assert "Not evaluated yet" in write_report(tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(tmp_path / "absent")


def test_what_is_no_run_gets_no_page(run: Path, tmp_path: Path) -> None:
    for other in (tmp_path, run.parent, run / "cascade"):
        done = CliRunner().invoke(main, ["report", str(other)])
        assert (done.exit_code, done.stderr) == (
            2,
            f"ddiff: {other} is no run; name one, such as runs/demo\n",
        )
        assert not (other / "report.html").exists()


@pytest.mark.parametrize("count", [1, 3, 5, 16])
def test_a_sheet_shows_every_picture_whole_and_at_its_own_size_whatever_is_said_below(count: int) -> None:
    shades = [(40 + 10 * place, 255 - 10 * place, 7) for place in range(count)]
    cells = [("a very long caption " * 40, [flat(side, shade) for side in (8, 32)]) for shade in shades]
    pixels = np.asarray(pictures.sheet(cells))
    for shade in shades:
        assert (pixels == shade).all(-1).sum() == 8**2 + 32**2
    assert (pixels[-pictures.CAPTION :] == 0).all(-1).any()  # and words


def flat(side: int, shade: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), shade).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_autoencoder_is_judged_at_the_side_that_it_learned(run: Path, tmp_path: Path) -> None:
    net = AutoencoderNetSpec(width=8, channel_mult=(1, 1), blocks=1, groups=4, mid_attention=False)
    spec = AutoencoderSpec(net=net, image_size=16, crop=16, perceptual="none")
    saved(tmp_path, "autoencoder", spec, {})
    data = run / "data" / "prepared"
    assert pictures.prepared_sizes(data) == [16, 64]
    found = report.rebuilt(tmp_path, data)
    assert [images.decoded(png).shape for pair in found for png in (pair.original, pair.rebuilt)] == [
        (3, 16, 16)
    ] * 12


def test_the_sheets_of_a_run_hold_what_its_page_shows(run: Path) -> None:
    page = Page(write_report(run, prompts=["a red circle", "a blue star"]).read_text())
    pngs = [one.partition(",")[2] for one in page.wanted if one.startswith("data:image/png")]
    shown = [images.decoded(base64.b64decode(one)).transpose(1, 2, 0) for one in pngs]
    sheets = {name: np.asarray(Image.open(run / f"{name}.png").convert("RGB")) for name in report.SHEETS}
    held = {name: sum(holds(sheet, one) for one in shown) for name, sheet in sheets.items()}
    # the last frame of the first prompt is its small picture: both sheets hold both
    assert held == {"prompts": 4 + 1, "denoising": 6 + 1, "noising": 8, "reconstructions": 12}


def holds(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture lies somewhere on a sheet, whole."""
    height, width, _ = picture.shape
    corners = zip(*np.nonzero((sheet == picture[0, 0]).all(-1)), strict=True)
    return any(
        np.array_equal(sheet[top : top + height, left : left + width], picture) for top, left in corners
    )


def test_a_picture_of_the_page_is_that_of_its_seed_alone_and_says_where_it_is_from(
    run: Path, tmp_path: Path
) -> None:
    cascade = bundle.load_cascade(run / "cascade", precision="auto")
    first, second = pictures.painted(cascade, ["a red circle", "ein roter Kreis \N{SNOWMAN}"], seed=4)
    assert pictures.painted(cascade, [second.prompt], seed=5) == [second]
    (asked,) = sample.paint(Order(second.prompt, seed=5, images=1), run / "cascade", tmp_path)
    assert (images.decoded(second.pngs[-1]) == images.decoded(asked.path.read_bytes())).all()
    for one, seed in ((first, "4"), (second, "5")):
        for png in one.pngs:
            said = Image.open(io.BytesIO(png)).text  # type: ignore[attr-defined]
            assert said == {"prompt": one.prompt, "seed": seed, "cascade": cascade.digest}


def test_a_cascade_that_paints_by_class_alone_is_shown_class_by_class(tmp_path: Path) -> None:
    told = chains.CLASSES.but(net=chains.plain(labels=3), told_dropout=0.0)  # it paints nothing without one
    bundle.save(tmp_path / "base" / "bundle", told, chains.trained(told).weights, parents={}, facts={})
    hops = (HopSpec(stage="base", how=SamplingSpec(num_steps=2, guidance_scale=1.0)),)
    spec = CascadeSpec(name="classes", hops=hops, context_length=12, image_size=16)
    bundle.save_cascade(tmp_path / "cascade", spec, {"base": tmp_path / "base" / "bundle"}, card="")
    said = Page(write_report(tmp_path, prompts=["a", "b", "c"]).read_text()).said
    for words in ("class 1: a", "class 2: b", "class 0: c"):
        assert words in said
    cascade = bundle.load_cascade(tmp_path / "cascade")
    one, other = (pictures.painted(cascade, ["a"], seed=seed, classes=3)[0] for seed in (1, 2))
    assert [Image.open(io.BytesIO(two.pngs[0])).text["label"] for two in (one, other)] == ["1", "2"]  # type: ignore[attr-defined]


def test_grids_over_steps_are_headed_by_what_they_show(tmp_path: Path) -> None:
    stages = {"autoencoder": smoke.autoencoder(), "base": smoke.base(), "older": None}
    for name, spec in stages.items():
        Journal(tmp_path / name / "metrics.jsonl").log({"train/loss": 1.0}, 1)
        (tmp_path / name / "samples").mkdir()
        (tmp_path / name / "samples" / "step-00000004.png").write_bytes(flat(4, (1, 2, 3)))
        kept = {"spec": spec.model_dump(mode="json") if spec else {"stage": {"kind": "of old"}}}
        (tmp_path / name / "made_of.json").write_text(json.dumps(kept))
    said = Page(write_report(tmp_path).read_text()).said
    assert "autoencoder while it learned: pictures of the data and, beside each, what comes back" in said
    assert "base while it learned: pictures of the data and, beside each, what it paints of the emb" in said
    assert "older while it learned: sample grids" in said


def test_the_trajectory_ends_in_the_picture_itself(run: Path) -> None:
    cascade = bundle.load_cascade(run / "cascade")
    (one,) = pictures.painted(cascade, ["a red circle"], seed=7)
    frames = pictures.trajectory(cascade, "a red circle", seed=7)
    assert len(one.pngs) == 2
    assert [frame.sigma for frame in frames] == sorted((frame.sigma for frame in frames), reverse=True)
    assert (images.decoded(frames[-1].estimate) == images.decoded(one.pngs[0])).all()


def test_noising_begins_with_the_image_and_ends_in_noise_of_variance_one(run: Path) -> None:
    original, _ = pictures.prepared_images(run / "data" / "prepared", 64, 1)
    (_, first), *_, (sigma, last) = pictures.noising(original)
    assert (images.decoded(first) == images.to_bytes(original)[0].numpy()).all()
    assert sigma >= 20
    assert np.abs(np.corrcoef(images.decoded(first).ravel(), images.decoded(last).ravel())[0, 1]) < 0.2


def test_psnr_is_that_of_a_known_error() -> None:
    assert pictures.psnr(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.2)) == pytest.approx(20.0)


def test_pictures_in_the_page_can_be_read(text: str) -> None:
    page = Page(text)
    pngs = [address for address in page.wanted if address.startswith("data:image/png")]
    sizes = {Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).size for one in pngs}
    assert {(16, 16), (64, 64)} <= sizes


def test_the_pictures_are_painted_on_the_gpu_where_there_is_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = bundle.load_cascade

    def loaded(path: Path, *, device: torch.device, precision: Precision) -> bundle.Cascade:
        asked.append(device.type)
        return load(path)

    monkeypatch.setattr(bundle, "load_cascade", loaded)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        write_report(run, prompts=["a red circle"])
    assert asked == ["cuda", "cpu"]
