"""`ddiff sample` on given pictures: varied, mixed, turned to another caption, or refused with what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dd_core import bundle, images
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from jobs.cli import main
from tests.unit.dd_core.test_stages import BASE
from tests.unit.dd_core.test_stages import parents as parents_of_base
from tests.unit.dd_core.test_variations import PICTURE, encoder
from tests.unit.serve.tiny import tiny_cascade


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade (prior, base, upsampler) and three pictures of its size."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_cascade(directory)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for name, one in zip("ab", pixels, strict=True):
        Image.fromarray(one).save(directory / f"{name}.png")
    Image.new("L", (64, 64), 255).save(directory / "mask.png")
    return directory


def ddiff(place: Path, out: Path, *words: str) -> Result:
    found = [str(place / word) if word.endswith(".png") else word for word in words]
    rest = ["--cascade", str(place / "cascade"), "--out", str(out)]
    return CliRunner().invoke(main, ["sample", *found, *rest])


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_a_picture_is_varied_from_its_own_code_without_a_prompt(place: Path, tmp_path: Path) -> None:
    done = ddiff(place, tmp_path, "", "--image", "a.png", "--vary", "0.7", "-n", "2")
    assert done.exit_code == 0, done.output
    one, other = sorted(tmp_path.iterdir())
    assert pixels(one) != pixels(other)
    with Image.open(one) as picture:
        how = json.loads(picture.info["how"])
    assert [spec["sampler"] for spec in how] == ["ddim", "dpmpp_2m"]  # the prior had no part in it
    assert how[0]["eta"] == 0.7


def test_between_two_pictures_each_end_is_that_picture_alone(place: Path, tmp_path: Path) -> None:
    made: dict[str, bytes] = {}
    pair = ("--image", "a.png", "--image", "b.png", "--between")
    for name, words in {
        "a": ("--image", "a.png", "--vary", "0"),
        "b": ("--image", "b.png", "--vary", "0"),
        "start": (*pair, "0"),
        "middle": (*pair, "0.5"),
        "end": (*pair, "1"),
    }.items():
        done = ddiff(place, tmp_path / name, "a red circle", *words)
        assert done.exit_code == 0, done.output
        made[name] = pixels(tmp_path / name / "00000000.png")
    near = np.abs(np.frombuffer(made["a"], np.uint8).astype(int) - np.frombuffer(made["start"], np.uint8))
    assert near.mean() < 1  # the circle is walked in floats
    far = np.abs(np.frombuffer(made["b"], np.uint8).astype(int) - np.frombuffer(made["end"], np.uint8))
    assert far.mean() < 1
    assert made["middle"] not in (made["a"], made["b"])
    assert made["a"] != made["b"]


def test_between_two_pictures_the_noise_may_be_that_of_the_seed(place: Path, tmp_path: Path) -> None:
    """At an end the picture then has that picture's embedding, and not its noise."""
    pair = ("--image", "a.png", "--image", "b.png", "--fresh-noise", "--between")
    made: dict[tuple[str, str], bytes] = {}
    for share in ("0", "0.5"):
        for seed in ("0", "1"):
            out = tmp_path / f"{share}-{seed}"
            done = ddiff(place, out, "a red circle", *pair, share, "--seed", seed)
            assert done.exit_code == 0, done.output
            (file,) = out.iterdir()
            made[share, seed] = pixels(file)
    assert len(set(made.values())) == 4
    done = ddiff(place, tmp_path / "own", "a red circle", "--image", "a.png", "--vary", "0")
    assert pixels(tmp_path / "own" / "00000000.png") != made["0", "0"]
    swapped = ("--image", "b.png", "--image", "a.png", "--fresh-noise", "--between", "1")
    assert ddiff(place, tmp_path / "swapped", "a red circle", *swapped).exit_code == 0
    assert pixels(tmp_path / "swapped" / "00000000.png") == made["0", "0"]


def test_a_picture_is_turned_from_one_caption_to_another(place: Path, tmp_path: Path) -> None:
    words = ("a blue star", "--image", "a.png", "--instead-of", "a red circle", "--by")
    made = []
    for by in ("0.25", "0.5"):
        done = ddiff(place, tmp_path / by, *words, by)
        assert done.exit_code == 0, done.output
        made.append(pixels(tmp_path / by / "00000000.png"))
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("x", "--vary", "0.5"), "--vary needs the picture; give it with --image"),
        (("x", "--image", "a.png", "--between", "0.5"), "give --image twice"),
        (("x", "--image", "a.png", "--image", "b.png"), "add --between 0.5"),
        (("x", "--image", "a.png", "--vary", "1", "--fresh-noise"), "--fresh-noise is for --between"),
        (("x", "--image", "a.png", "--vary", "1", "--instead-of", "y"), "are different things"),
        (
            ("x", "--image", "a.png", "--vary", "1", "--mask", "mask.png"),
            "--mask is for edits; leave one out",
        ),
        (("x", "--image", "a.png", "--vary", "1", "--strength", "0.5"), "--strength is for edits"),
        (("", "--image", "a.png", "--instead-of", "y"), "the prompt is empty"),
        (("x", "--image", "a.png", "--instead-of", "x"), "both captions say the same"),
        (("x", "--image", "mask.png", "--vary", "1"), "its mode is L; convert it to RGB"),
        (("x", "--image", "a.png", "--vary", "1.5"), "1.5 is not in the range 0<=x<=1"),
    ],
)
def test_what_cannot_be_remade_is_refused(
    words: tuple[str, ...], said: str, place: Path, tmp_path: Path
) -> None:
    done = ddiff(place, tmp_path / "none", *words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "none").glob("*.png"))


def test_a_cascade_without_a_painter_from_noise_is_named(place: Path, tmp_path: Path) -> None:
    hops = (HopSpec(stage="prior", how=SamplingSpec(num_steps=1)),)
    spec = CascadeSpec(name="blind", hops=hops, context_length=12, image_size=64)
    bundles = {name: place / name for name in ("clip", "prior")}
    bundle.save_cascade(tmp_path / "blind", spec, bundles, card="blind")
    words = ["sample", "x", "--image", str(place / "a.png"), "--vary", "1", "--cascade"]
    done = CliRunner().invoke(main, [*words, str(tmp_path / "blind"), "--out", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "use one with a base or a chain" in done.stderr


def test_a_picture_varied_by_nothing_is_that_picture_whatever_scale_the_cascade_paints_at(
    tmp_path: Path,
) -> None:
    spec = BASE.but(predicts="eps", from_draft=False)
    parents = parents_of_base(spec)
    made = encoder(spec, parents)
    clip = bundle.save(tmp_path / "clip", parents["clip"].spec, parents["clip"].weights, parents={}, facts={})
    weights = made.model.state_dict()  # type: ignore[attr-defined]
    bundle.save(tmp_path / "base", spec, weights, parents={"clip": clip}, facts={})
    how = SamplingSpec(num_steps=150, guidance_scale=8.0, clip="none")
    hops = (HopSpec(stage="base", how=how, follows_request=True),)
    cascade = CascadeSpec(name="base", hops=hops, context_length=12, image_size=16)
    bundle.save_cascade(
        tmp_path / "cascade", cascade, {name: tmp_path / name for name in ("clip", "base")}, card=""
    )
    (tmp_path / "a.png").write_bytes(images.png(PICTURE, {}))
    done = ddiff(tmp_path, tmp_path / "out", "a star", "--image", "a.png", "--vary", "0")
    assert done.exit_code == 0, done.output
    again, truth = (
        np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("out/00000000.png", "a.png")
    )
    assert np.abs(again - truth).mean() < 6  # of 255; .03 of [-1, 1] is 4
    with Image.open(tmp_path / "out/00000000.png") as picture:
        assert json.loads(picture.info["how"])[0]["guidance_scale"] == 1
