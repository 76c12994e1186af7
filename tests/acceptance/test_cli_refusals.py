"""What cannot be painted: one line with the way out, exit code 2, and no network asked before it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dd_core import bundle
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.samplers import SamplingSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from jobs.cli import main
from tests.unit.serve import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny cascade, pictures that fit it and pictures that do not, and two cascades more."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.tiny_cascade(directory)
    Image.new("RGB", (64, 64)).save(directory / "image.png")
    Image.new("RGB", (32, 32)).save(directory / "small.png")
    Image.new("RGBA", (64, 64)).save(directory / "clear.png")
    Image.new("L", (64, 64), 255).save(directory / "mask.png")
    Image.new("L", (32, 64), 255).save(directory / "narrow.png")
    base = tiny.STAGES["base"]
    jumping = ConsistencySpec(base=base)  # type: ignore[arg-type]
    clip = bundle.load(directory / "clip").digest
    weights = bundle.load(directory / "base").trained.weights
    bundle.save(directory / "jumping", jumping, weights, parents={"clip": clip}, facts={})
    jumps = SamplingSpec(sampler="consistency", num_steps=2, guidance_scale=1.0)
    for name, hops in {
        "jumps": (HopSpec(stage="jumping", how=jumps), tiny.CASCADE.hops[2]),
        "fixed": tuple(hop.but(follows_request=False) for hop in tiny.CASCADE.hops),
    }.items():
        spec = CascadeSpec(name=name, hops=hops, context_length=12, image_size=64)
        bundles = {stage: directory / stage for stage in (*tiny.STAGES, "jumping")}
        kept = {
            stage: path
            for stage, path in bundles.items()
            if stage == "clip" or any(stage == h.stage for h in hops)
        }
        bundle.save_cascade(directory / name, spec, kept, card=name)
    return directory


@pytest.fixture
def silent() -> Iterator[list[str]]:
    """The networks that were asked while a command ran."""
    asked: list[str] = []

    def heard(module: nn.Module, _: object) -> None:
        asked.append(type(module).__name__)

    hook = register_module_forward_pre_hook(heard)
    yield asked
    hook.remove()


SAMPLE = {
    "a hole without mask channels": (("--image", "image.png", "--mask", "mask.png"), "(--training-free)"),
    "a scale below 0": (("--guidance", "-1"), "-1.0 is not in the range 0<=x<=50"),
    "no step": (("--steps", "0"), "0 is not in the range 1<=x<=4000"),
    "eta above 1": (("--image", "image.png", "--vary", "1.5"), "1.5 is not in the range 0<=x<=1"),
    "eta below 0": (("--image", "image.png", "--vary", "-0.5"), "-0.5 is not in the range 0<=x<=1"),
    "a mask of another size": (
        ("--image", "image.png", "--mask", "narrow.png", "--training-free"),
        "32 x 64, but the cascade paints 64 x 64; resize it",
    ),
    "a mask in colours": (("--image", "image.png", "--mask", "image.png"), "convert it to greyscale"),
    "a picture of another size": (("--image", "small.png"), "32 x 32, but the cascade paints 64 x 64"),
    "a picture that is not RGB": (("--image", "clear.png"), "its mode is RGBA; convert it to RGB"),
    "a mask of no picture": (("--mask", "mask.png"), "--mask needs the picture; give it with --image"),
    "a strength of no picture": (("--strength", "0.5"), "--strength needs the picture; give it with --image"),
    "a strength of no step": (
        ("--image", "image.png", "--strength", "0.01"),
        "strength 0.01 of 4 steps is no step; raise either",
    ),
    "a way without a hole": (("--training-free",), "fills the hole of --mask; give that"),
    "a class for those that know none": (("--label", "2"), "no hop uses --label"),
    "a reference that nothing looks at": (("--reference", "image.png"), "no hop uses --reference"),
    "ranking more than are painted": (("-n", "2", "--keep", "3"), "paint more"),
}


def refused(words: list[str], said: str, asked: list[str]) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert asked == []


@pytest.mark.parametrize(
    "words",
    [
        ["data", "shapes", "--out", "s3://bucket/raw"],
        ["toy", "--out", "s3://bucket/toy"],
        ["sample", "a star", "--cascade", "cascade", "--out", "s3://bucket/samples"],
        ["eval", "--out", "s3://bucket/pictures"],
        ["report", "s3://me:hunter2@bucket/run"],
        ["bits", "s3://bucket/run"],
        ["import", "adm", "file.pt", "--out", "s3://bucket/adm"],
        ["export", "s3://bucket/cascade", "--out", "folders"],
    ],
    ids=lambda words: words[0],
)
def test_an_address_is_not_taken_for_a_directory(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(words, "bucket", silent)
    done = CliRunner().invoke(main, words)
    assert "is an address, and this takes a directory; name one on this machine" in done.stderr
    assert "hunter2" not in done.output
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("case", SAMPLE)
def test_an_order_that_cannot_be_painted_ends_before_a_network_is_asked(
    case: str, place: Path, tmp_path: Path, silent: list[str]
) -> None:
    words, said = SAMPLE[case]
    found = [str(place / word) if word.endswith(".png") else word for word in words]
    out = ["--cascade", str(place / "cascade"), "--out", str(tmp_path / "out")]
    refused(["sample", "a red circle", *found, *out], said, silent)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("cascade", "words", "said"),
    [
        ("fixed", ["--steps", "5"], "no hop uses --steps; leave it out, or set follows_request"),
        ("fixed", ["--guidance", "2"], "no hop uses --guidance"),
        ("jumps", ["--image", "image.png"], "varies no picture, it fills holes; give a mask"),
        ("jumps", ["--image", "image.png", "--vary", "0.5"], "use one with a base or a chain"),
    ],
)
def test_an_order_that_this_cascade_cannot_hear_is_refused(
    cascade: str, words: list[str], said: str, place: Path, tmp_path: Path, silent: list[str]
) -> None:
    found = [str(place / word) if word.endswith(".png") else word for word in words]
    out = ["--cascade", str(place / cascade), "--out", str(tmp_path / "out")]
    refused(["sample", "a red circle", *found, *out], said, silent)


@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("guided", "cascade.hops.base.guides={}", "a clip and a noised_clip, but guides names none"),
        ("guided", "cascade.hops.base.guides.clip=noised_clip", "guide 'clip' is a noised_clip"),
        ("latent", "cascade.hops.base.how.num_steps=30", "that divides it, got 30"),
        ("glide", "cascade.hops.upsampler.how.num_steps=20", "fast27 take 27 steps; set num_steps: 27"),
        ("glide", "cascade.hops.guided.how.guidance_scale=-1", "greater than or equal to 0"),
        ("latent", "cascade.hops.base.how.eta=1.5", "less than or equal to 1"),
        ("latent", "cascade.hops.base.how.eta=-0.5", "greater than or equal to 0"),
    ],
)
def test_a_cascade_that_could_not_paint_is_refused_before_it_is_trained(
    recipe: str, change: str, said: str, silent: list[str]
) -> None:
    refused(["config", "validate", "--recipe", recipe, "--set", change], said, silent)


def test_what_can_be_painted_is(place: Path, tmp_path: Path, silent: list[str]) -> None:
    """The refusals are not all that these commands can say."""
    torch.manual_seed(0)
    words = ["sample", "a red circle", "--image", str(place / "image.png"), "--mask", str(place / "mask.png")]
    out = ["--training-free", "--cascade", str(place / "cascade"), "--out", str(tmp_path)]
    done = CliRunner().invoke(main, [*words, *out])
    assert done.exit_code == 0, done.output
    assert silent
