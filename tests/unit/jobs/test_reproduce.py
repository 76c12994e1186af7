"""The text in a PNG suffices to paint it again to the bit; and it says which pictures it was made from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dd_core import bundle
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.network import PlainSpec
from dd_core.precision import has_bf16
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.stages import build_stage
from dd_core.stages.chain_spec import ChainSpec
from jobs.cli import main
from tests.unit.dd_core.test_chain import UNET
from tests.unit.serve.tiny import tiny_cascade

CLASSES = ChainSpec(
    net=PlainSpec(unet=UNET.but(labels=4)),
    image_size=16,
    schedule=ScheduleSpec(betas="cosine", num_timesteps=50),
    told_dropout=0.1,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade, one that paints by class, and pictures."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_cascade(directory)
    model = build_stage(CLASSES, {}).model
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    bundle.save(directory / "chain", CLASSES, model.state_dict(), parents={}, facts={})
    how = SamplingSpec(sampler="ddpm", variance="fixed_small", num_steps=3, spacing="trailing")
    hops = (HopSpec(stage="chain", how=how, follows_request=True),)
    cascade = CascadeSpec(name="chain", hops=hops, context_length=12, image_size=16)
    bundle.save_cascade(directory / "classes", cascade, {"chain": directory / "chain"}, card="")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for name, one in zip("ab", pixels, strict=True):
        Image.fromarray(one).save(directory / f"{name}.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:50, 10:30] = 255
    Image.fromarray(mask).save(directory / "mask.png")
    return directory


def run(place: Path, command: str, *words: str) -> tuple[int, str]:
    found = [str(place / word) if (place / word).is_file() else word for word in words]
    done = CliRunner().invoke(main, [command, *found])
    return done.exit_code, done.output


GIVEN = {"--image", "--mask", "--reference"}


@pytest.mark.parametrize(
    ("cascade", "words"),
    [
        ("cascade", ("ein Stern, größer",)),
        ("cascade", ("a star", "--negative", "a box", "--guidance", "2.5", "--steps", "3")),
        (
            "cascade",
            ("a star", "--set", "base.sampler=ddim", "--set", "base.eta=1", "--set", "prior.draws=3"),
        ),
        ("cascade", ("a star", "--set", "base.guidance_interval=[0.1, 5]", "--set", "base.clip=none")),
        ("cascade", ("a star", "--image", "a.png", "--strength", "0.6", "--negative", "b")),
        ("cascade", ("a star", "--image", "a.png", "--mask", "mask.png", "--training-free")),
        ("cascade", ("", "--image", "a.png", "--vary", "0.7")),
        ("cascade", ("", "--image", "a.png", "--image", "b.png", "--between", "0.4")),
        ("cascade", ("", "--image", "a.png", "--image", "b.png", "--between", "0.4", "--fresh-noise")),
        ("cascade", ("a box", "--image", "a.png", "--instead-of", "a star", "--by", "0.3")),
        ("classes", ("no caption", "--label", "2", "--guidance", "1.5")),
        ("cascade", ("a star", "--precision", "bf16")),
        ("cascade", ("a star", "--precision", "fp32")),
    ],
)
def test_what_a_picture_says_of_itself_paints_it_again_to_the_bit(
    cascade: str, words: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    rest = ("--cascade", str(place / cascade))
    done, said = run(place, "sample", *words, *rest, "--seed", "5", "-n", "2", "--out", str(tmp_path))
    assert done == 0, said
    given = [word for at, word in enumerate(words) if word in GIVEN or (at and words[at - 1] in GIVEN)]
    for name in ("00000005.png", "00000006.png"):
        done, said = run(place, "reproduce", str(tmp_path / name), *rest, *given)
        assert done == 0, said
        assert "the same to the bit" in said


def text_of(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        return {name: value for name, value in picture.info.items() if isinstance(value, str)}


def retold(path: Path, out: Path, **text: str | None) -> Path:
    """The same pixels with another text; None leaves a word out."""
    told = PngInfo()
    for name, value in (text_of(path) | text).items():
        if value is not None:
            told.add_text(name, value)
    with Image.open(path) as picture:
        picture.save(out, pnginfo=told)
    return out


def test_a_picture_says_its_precision_and_one_that_says_none_is_of_float32(
    place: Path, tmp_path: Path
) -> None:
    rest = ("--cascade", str(place / "cascade"))
    for kind in ("bf16", "fp32", "auto"):
        out = str(tmp_path / kind)
        assert run(place, "sample", "a star", *rest, "--precision", kind, "--out", out)[0] == 0
    name, auto = "00000000.png", "bf16" if has_bf16(torch.device("cpu")) else "fp32"
    half, full = tmp_path / "bf16" / name, tmp_path / "fp32" / name
    pixels = {
        kind: np.asarray(Image.open(tmp_path / kind / name)).tolist() for kind in ("bf16", "fp32", "auto")
    }
    assert pixels["bf16"] != pixels["fp32"]
    assert pixels["auto"] == pixels[auto]
    assert [text_of(path)["precision"] for path in (half, full)] == ["bf16", "fp32"]
    silent = retold(full, tmp_path / "silent.png", precision=None)
    done, said = run(place, "reproduce", str(silent), *rest)
    assert done == 0, said
    for told, why in (("unknown", "computed in unknown"), ("bf16+fp32", "its hops computed in bf16+fp32")):
        done, said = run(place, "reproduce", str(retold(full, tmp_path / "odd.png", precision=told)), *rest)
        assert done == 2
        assert why in said
        assert "damaged" not in said


def test_a_picture_that_is_remade_is_walked_back_in_float32_unless_told_otherwise(
    place: Path, tmp_path: Path
) -> None:
    rest = ("--cascade", str(place / "cascade"), "--out", str(tmp_path))
    done, said = run(place, "sample", "", "--image", "a.png", "--vary", "0.7", *rest)
    assert done == 0, said
    assert text_of(tmp_path / "00000000.png")["precision"] == "fp32"


@pytest.fixture(scope="module")
def painted(place: Path) -> Path:
    """A star that was led away from a box, and is varied from a picture."""
    words = ("a star", "--negative", "a box", "--image", "a.png", "--strength", "0.6")
    done, said = run(place, "sample", *words, "--cascade", str(place / "cascade"), "--out", str(place / "o"))
    assert done == 0, said
    return place / "o" / "00000000.png"


@pytest.mark.parametrize(
    "change", [{"negative_prompt": None}, {"negative_prompt": "a"}, {"seed": "1"}, {"prompt": "a box"}]
)
def test_another_text_is_another_picture_and_it_is_said_how_different(
    change: dict[str, str | None], painted: Path, place: Path, tmp_path: Path
) -> None:
    other = retold(painted, tmp_path / "b.png", **change)
    done, said = run(place, "reproduce", str(other), "--cascade", str(place / "cascade"), "--image", "a.png")
    assert done == 2
    assert "of the pixels are others now" in said


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        ({"how": None}, ("--image", "a.png"), "its text does not say its how"),
        ({"how": "[{}"}, ("--image", "a.png"), "its text is damaged"),
        ({"how": '[{"sampler": "hein"}]'}, ("--image", "a.png"), "its text is damaged"),
        ({"edit": '{"turn": 1}'}, ("--image", "a.png"), "its text speaks of 'turn'"),
        ({"cascade": "0" * 64}, ("--image", "a.png"), "was painted by cascade 000000000000, and"),
        ({}, (), "it was made from a picture (sha256"),
        ({}, ("--image", "b.png"), "is not what it was made from"),
        ({}, ("--image", "a.png", "--mask", "mask.png"), "it was made without --mask; leave that out"),
    ],
)
def test_what_cannot_be_painted_again_is_refused(
    change: dict[str, str | None],
    given: tuple[str, ...],
    said: str,
    painted: Path,
    place: Path,
    tmp_path: Path,
) -> None:
    other = retold(painted, tmp_path / "b.png", **change)
    done, told = run(place, "reproduce", str(other), "--cascade", str(place / "cascade"), *given)
    assert done == 2
    assert said in told
    assert "Traceback" not in told


def test_a_picture_that_ddiff_did_not_paint_is_refused(place: Path) -> None:
    done, said = run(place, "reproduce", "a.png", "--cascade", str(place / "cascade"))
    assert done == 2
    assert "it was not painted by ddiff, or a program that saved it left its text out" in said
