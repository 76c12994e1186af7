"""The report: it needs nothing but itself, shows what the models made, and takes captions for text."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dd_core import bundle, images, sealed
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.upsampler import UpsamplerSpec
from workflows import pictures
from workflows.pairs import PairsSpec, prepared_tables
from workflows.report import write_report
from workflows.shape_shards import ShapesSpec, write_shards
from workflows.tracking import Journal

HOSTILE = '<script>alert("x")</script> & a "red" circle'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with data, a cascade of random weights, an autoencoder and a journal."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    prepared(directory)
    clip = ClipNetSpec(
        embedding_width=16,
        image_size=32,
        patch_size=16,
        image_width=32,
        image_layers=1,
        context_length=16,
        text_width=32,
        text_layers=1,
        head_width=16,
    )
    net = DiTSpec(
        image_size=16, conv_width=16, conv_blocks=1, width=32, layers=1, head_width=16, text_width=32
    )
    small = UNetSpec(
        width=8,
        channel_mult=(1, 1),
        blocks_per_level=1,
        attention_at=(),
        attention_in_middle=False,
        groups=4,
        image_channels=3,
    )
    autoencoder = AutoencoderNetSpec(
        width=8, channel_mult=(1, 1), blocks=1, groups=4, stem=4, mid_attention=False
    )
    trained = {"clip": saved(directory, "clip", ClipSpec(net=clip), {})}
    saved(directory, "base", BaseSpec(net=net, image_size=16), trained)
    saved(directory, "upsampler", UpsamplerSpec(net=small, image_size=64, crop=16), {})
    saved(
        directory,
        "autoencoder",
        AutoencoderSpec(net=autoencoder, image_size=64, crop=16, perceptual="none"),
        {},
    )
    hops = tuple(HopSpec(stage=stage, how=SamplingSpec(num_steps=3)) for stage in ("base", "upsampler"))
    bundle.save_cascade(
        directory / "cascade",
        CascadeSpec(name="tiny", hops=hops, context_length=16, image_size=64),
        {stage: directory / stage / "bundle" for stage in ("clip", "base", "upsampler")},
        card="tiny",
    )
    journal = Journal(directory / "base" / "metrics.jsonl")
    for step in (1, 2, 3):
        journal.log({"train/loss": 1 / step, "train/lr": 1e-3}, step)
    journal.file.close()
    scores = {"all": 0.5, "one_object": 0.75, "n": 8, "colour": 0.9, "intervals": {"all": [0.2, 0.8]}}
    summary = {"oracle": scores, "seconds": {"base": 3.0, "total": 5.0}}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def prepared(directory: Path) -> None:
    """Twelve pairs of the embedded world, as `ddiff data prepare` leaves them."""
    (tar,) = write_shards(ShapesSpec(pairs=12, image_size=64), directory / "data" / "raw")
    data = directory / "data" / "prepared"
    data.mkdir(parents=True)
    spec = PairsSpec(shards=(str(tar),), destination=str(data), sizes=(16, 64), context_length=16)
    (table,) = prepared_tables(str(tar), 0, spec)
    pq.write_table(table, data / "part-00000.parquet")
    sealed.seal(data, sealed.digests(data), {})


def saved(directory: Path, name: str, spec: StageSpec, parents: dict[str, Path]) -> Path:
    """A stage with its first, random weights, as a bundle."""
    torch.manual_seed(0)
    known = {role: bundle.load(path) for role, path in parents.items()}
    stage = build_stage(spec, {role: Trained(*found.trained) for role, found in known.items()})
    digests = {role: found.digest for role, found in known.items()}
    path = directory / name / "bundle"
    path.parent.mkdir(parents=True)
    bundle.save(path, spec, stage.model.state_dict(), parents=digests, facts={"step": 0})
    return path


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


def test_the_page_asks_for_nothing_outside_itself_and_closes_what_it_opens(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert page.wanted
    assert all(address.startswith(("data:", "#")) for address in page.wanted)
    assert not re.search(r"@import|url\((?!['\"]?data:)", text)
    assert not page.open


def test_the_page_has_every_chapter_that_the_run_has_something_for(run: Path) -> None:
    said = Page(write_report(run).read_text()).said
    for chapter in ("Pictures", "Judged by the oracle", "Denoising, step by step", "Noising", "Training"):
        assert chapter in said
    for fact in ("Autoencoder", "Time", "Specs and digests", "75.0%", "20.0% to 80.0%", "dB PSNR"):
        assert fact in said


def test_a_caption_is_text_and_never_markup(run: Path) -> None:
    page = Page(write_report(run, prompts=[HOSTILE]).read_text())
    assert HOSTILE in page.said
    assert "script" not in page.open


def test_a_run_without_anything_says_so(tmp_path: Path) -> None:
    assert "Not evaluated yet" in write_report(tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(tmp_path / "absent")


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


def test_pictures_in_the_page_can_be_read(run: Path) -> None:
    page = Page(write_report(run).read_text())
    pngs = [address for address in page.wanted if address.startswith("data:image/png")]
    sizes = {Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2]))).size for one in pngs}
    assert {(16, 16), (64, 64)} <= sizes
