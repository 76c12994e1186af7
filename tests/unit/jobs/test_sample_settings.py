"""`ddiff sample --set`, `--negative`, `--colourise` and `--enlarge`: heard, or refused with what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from dd_core import bundle, edits
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.churn import ChurnSpec
from dd_core.consistency import FixedLevels
from dd_core.samplers import SamplingSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from jobs.cli import main
from jobs.config import ConfigError
from jobs.sample_changes import changed
from tests.unit.dd_core.test_chain import DDPM, INPAINTING, trained
from tests.unit.serve.tiny import STAGES, tiny_cascade


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade, the same with its base as a consistency model, and pictures of their sizes."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny_cascade(directory)
    base = bundle.load(directory / "base")
    spec = ConsistencySpec(base=STAGES["base"], teacher=None, levels=FixedLevels(num_levels=8))
    quiet = {name: weight * 0.3 for name, weight in base.trained.weights.items()}  # pictures within the range
    bundle.save(directory / "jumping", spec, quiet, parents=base.parents, facts={})
    zero = {name: 0 * weight for name, weight in bundle.load(directory / "upsampler").trained.weights.items()}
    bundle.save(directory / "enlarging", STAGES["upsampler"], zero, parents={}, facts={})
    jump = SamplingSpec(sampler="consistency", num_steps=2, guidance_scale=1.0)
    hops = (
        HopSpec(stage="jumping", how=jump, follows_request=True),
        HopSpec(stage="enlarging", how=SamplingSpec(num_steps=2, guidance_scale=1.0)),
    )
    cascade = CascadeSpec(name="jumps", hops=hops, context_length=12, image_size=64)
    stages = {name: directory / name for name in ("clip", "jumping", "enlarging")}
    bundle.save_cascade(directory / "jumps", cascade, stages, card="")
    pixels = np.random.default_rng(0).integers(100, 150, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(directory / "a.png")
    Image.fromarray(pixels[:, :, 0]).save(directory / "gray.png")
    for side in (16, 10):
        Image.fromarray(pixels[:side, :side]).save(directory / f"small{side}.png")
    return directory


def ddiff(place: Path, cascade: str, out: Path, *words: str) -> Result:
    found = [str(place / word) if word.endswith(".png") else word for word in words]
    rest = ["--cascade", str(place / cascade), "--out", str(out)]
    return CliRunner().invoke(main, ["sample", *found, *rest])


def painted(place: Path, cascade: str, out: Path, *words: str) -> NDArray[np.uint8]:
    done = ddiff(place, cascade, out, *words)
    assert done.exit_code == 0, done.output
    return np.asarray(Image.open(out / "00000000.png"))


def how_in(out: Path) -> list[dict[str, object]]:
    with Image.open(out / "00000000.png") as picture:
        found: list[dict[str, object]] = json.loads(picture.info["how"])
    return found


def test_a_set_field_changes_that_hop_alone_and_the_picture(place: Path, tmp_path: Path) -> None:
    plain = painted(place, "cascade", tmp_path / "a", "a star")
    words = ("--set", "base.sampler=heun", "--set", "base.churn.amount=3", "--set", "base.num_steps=3")
    other = painted(place, "cascade", tmp_path / "b", "a star", *words)
    assert not np.array_equal(plain, other)
    before, after = how_in(tmp_path / "a"), how_in(tmp_path / "b")
    assert (before[0], before[2]) == (after[0], after[2])
    changed = {name for name, value in after[1].items() if value != before[1][name]}
    assert changed == {"sampler", "churn", "num_steps"}
    again = painted(place, "cascade", tmp_path / "c", "a star", "--set", "base.num_steps=4")
    assert np.array_equal(plain, again)  # what it was


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "bsae.eta=1"), "no hop 'bsae'; there are prior, base, upsampler"),
        (("--set", "base"), "write it as HOP.FIELD=VALUE"),
        (("--set", "num_steps=5"), "write it as HOP.FIELD=VALUE"),
        (("--set", "base.etta=1"), "SamplingSpec has no field 'etta'; did you mean 'eta'?"),
        (("--set", "base.sampler=hein"), "base.sampler: Input should be 'ddim', 'ddpm'"),
        (("--set", "base.spacing=leading"), "base.spacing: Input should be 'linspace', 'ddim_leading'"),
        (("--set", "base.eta=1"), "eta is for sampler ddim, not dpmpp_2m; leave it out"),
        (("--set", "base.churn.amont=1", "--set", "base.sampler=heun"), "did you mean 'amount'?"),
        (("--set", "base.gradient.caption=5"), "guides names none"),
        (("--set", "base.gradient=[1"), "is not YAML"),
        (("--set", "base.sampler=ddpm"), "this base does not learn its variance"),
        (("--set", "base.spacing=trailing"), "trained on all noise levels; use karras"),
        (("--set", "upsampler.guidance_scale=2"), "told no caption, so none guides it"),
        (("--set", "base.num_steps=5", "--steps", "6"), "another option makes it 6; leave one of them out"),
        (("--set", "prior.draws=4", "--image", "a.png", "--vary", "1"), "a picture takes the place of this"),
        (
            ("--set", "prior.guidance_scale=1", "--guidance", "1", "--negative", "a box"),
            "no hop is guided away from --negative, for each has scale 1",
        ),
        (
            ("--negative", "a box", "--image", "a.png", "--vary", "1"),
            "no hop is guided away from --negative, for each has scale 1",
        ),
        (("--negative", "a \udcff"), "is no text in UTF-8"),
        (("--colourise", "--image", "gray.png"), "hop base: a base does not keep the brightness"),
        (("--enlarge", "--image", "small16.png"), "hop base: a base does not keep the pixels"),
        (("--vary", "nan", "--image", "a.png"), "--vary is no number; give one from 0 to 1"),
        (("--instead-of", "a box", "--by", "nan", "--image", "a.png"), "--by is no number"),
        (("--colourise",), "--colourise needs the picture; give it with --image"),
        (("--colourise", "--enlarge", "--image", "gray.png"), "are different things; give one of them"),
        (("--enlarge", "--vary", "1", "--image", "a.png"), "--enlarge and --vary are different things"),
        (("--colourise", "--strength", ".5", "--image", "a.png"), "--colourise and --strength are different"),
    ],
)
def test_what_no_hop_can_do_is_refused_and_nothing_is_painted(
    words: tuple[str, ...], said: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("a network was asked")

    for network in ("dd_core.nets.dit.DiT.forward", "dd_core.nets.clip.Clip.read"):
        monkeypatch.setattr(network, asked)
    done = ddiff(place, "cascade", tmp_path / "none", "a star", *words)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert not (tmp_path / "none").exists()


ANCESTRAL = HopSpec(
    stage="base",
    how=SamplingSpec(sampler="ddpm", num_steps=100, spacing="linspace", variance="fixed_small"),
    follows_request=True,
)


def test_a_sampler_that_is_chosen_takes_over_nothing_that_only_the_former_one_hears() -> None:
    (hop,) = changed([ANCESTRAL], ["base.sampler=heun"])
    assert (hop.how.sampler, hop.how.variance, hop.how.num_steps) == ("heun", "learned", 100)
    stirred = ANCESTRAL.but(how=SamplingSpec(sampler="heun", churn=ChurnSpec(amount=3)))
    (hop,) = changed([stirred], ["base.sampler=ddim", "base.eta=1"])
    assert (hop.how.churn, hop.how.eta) == (None, 1)
    with pytest.raises(ConfigError, match="variance is for sampler ddpm, not heun; leave it out"):
        changed([ANCESTRAL], ["base.sampler=heun", "base.variance=fixed_small"])


@pytest.mark.parametrize(
    ("change", "steps"),
    [("base.spacing=fast27", 27), ("base.variance=fixed_large", 300)],
)
def test_a_change_is_judged_beside_the_steps_that_are_asked_for(change: str, steps: int) -> None:
    (hop,) = changed([ANCESTRAL], [change], steps)
    assert hop.how.num_steps == steps
    with pytest.raises(ConfigError):
        changed([ANCESTRAL], [change])
    with pytest.raises(ConfigError):  # its own number counts
        changed([ANCESTRAL], [change, "base.num_steps=100"], steps)
    with pytest.raises(ConfigError):
        changed([ANCESTRAL.but(follows_request=False)], [change], steps)


def test_a_negative_prompt_leads_away_and_a_cascade_that_reads_nothing_refuses_it(
    place: Path, tmp_path: Path
) -> None:
    plain = painted(place, "cascade", tmp_path / "a", "a star")
    assert np.array_equal(plain, painted(place, "cascade", tmp_path / "b", "a star", "--negative", ""))
    assert not np.array_equal(
        plain, painted(place, "cascade", tmp_path / "c", "a star", "--negative", "a box")
    )
    bundle.save_cascade(
        tmp_path / "blind",
        CascadeSpec(
            name="blind",
            hops=(HopSpec(stage="enlarging", how=SamplingSpec(num_steps=1)),),
            context_length=12,
            image_size=64,
        ),
        {"enlarging": place / "enlarging"},
        card="",
    )
    done = ddiff(tmp_path, "blind", tmp_path / "none", "a star", "--negative", "a box")
    assert done.exit_code == 2
    assert "no hop uses --negative; leave it out, or take one with a hop that reads captions" in done.stderr


def test_a_prompt_is_needed_where_it_is_read_and_nowhere_else(place: Path, tmp_path: Path) -> None:
    done = ddiff(place, "cascade", tmp_path / "none", "--set", "base.num_steps=1")
    assert (done.exit_code, "the prompt is empty; say what to paint" in done.stderr) == (2, True)
    chain = trained(DDPM)
    bundle.save(tmp_path / "base", chain.spec, chain.weights, parents={}, facts={})
    hops = (HopSpec(stage="base", how=SamplingSpec(num_steps=1, guidance_scale=1.0)),)
    spec = CascadeSpec(name="deaf", hops=hops, context_length=12, image_size=16)
    bundle.save_cascade(tmp_path / "deaf", spec, {"base": tmp_path / "base"}, card="")
    picture = painted(tmp_path, "deaf", tmp_path / "a")
    assert np.array_equal(picture, painted(tmp_path, "deaf", tmp_path / "b", "whatever"))


def test_a_grey_picture_is_colourised_and_a_small_one_enlarged_by_a_consistency_model(
    place: Path, tmp_path: Path
) -> None:
    coloured = painted(place, "jumps", tmp_path / "c", "a star", "--colourise", "--image", "gray.png").astype(
        float
    )
    gray = np.asarray(Image.open(place / "gray.png")).astype(float)
    inside = ((coloured > 0) & (coloured < 255)).all(2)  # what leaves the range of pixels is cut
    assert inside.mean() > 0.5
    assert np.abs(coloured @ np.array(edits.LUMA) - gray)[inside].max() < 1.5  # of 255, rounded three times
    assert np.ptp(coloured, axis=2).max() > 3  # it has colours
    enlarged = painted(
        place, "jumps", tmp_path / "e", "a star", "--enlarge", "--image", "small16.png"
    ).astype(float)
    small = np.asarray(Image.open(place / "small16.png")).astype(float)
    blocks = enlarged.reshape(16, 4, 16, 4, 3)
    inside = ((blocks > 0) & (blocks < 255)).all((1, 3))
    assert inside.mean() > 0.5
    assert np.abs(blocks.mean((1, 3)) - small)[inside].max() < 1
    with Image.open(tmp_path / "e" / "00000000.png") as picture:
        assert json.loads(picture.info["edit"]) == {"enlarge": True}
    for words, said in (
        (("--enlarge", "--image", "small10.png"), "10 x 10 does not enlarge to 16 x 16 in whole blocks"),
        (("--colourise", "--image", "a.png"), "its mode is RGB; convert it to greyscale"),
        (("--colourise", "--image", "small16.png"), "convert it to greyscale"),
    ):
        done = ddiff(place, "jumps", tmp_path / "none", "a star", *words)
        assert done.exit_code == 2
        assert said in done.stderr


def test_a_way_of_filling_holes_that_no_hop_needs_is_refused(tmp_path: Path) -> None:
    bundle.save(tmp_path / "base", INPAINTING, trained(INPAINTING).weights, parents={}, facts={})
    hop = HopSpec(stage="base", how=SamplingSpec(sampler="ddim", num_steps=2, guidance_scale=1.0))
    spec = CascadeSpec(name="filling", hops=(hop,), context_length=12, image_size=16)
    bundle.save_cascade(tmp_path / "filling", spec, {"base": tmp_path / "base"}, card="")
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "black.png")
    Image.fromarray(pixels[:, :, 0] + 255).save(tmp_path / "all.png")
    words = ("a star", "--image", "black.png", "--mask", "all.png")
    assert ddiff(tmp_path, "filling", tmp_path / "out", *words).exit_code == 0
    done = ddiff(tmp_path, "filling", tmp_path / "none", *words, "--training-free")
    assert done.exit_code == 2
    assert "no hop uses --training-free; leave it out, or take one with a base, an ups" in done.stderr
