"""Stable Diffusion's one file becomes a cascade that hears captions by the text tower in it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from dd_core import bundle
from dd_core.layouts import clip
from dd_core.layouts.moves import LayoutError
from dd_core.nets.clip import Clip
from dd_core.stages import build_stage
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec, clip_of
from jobs import exchange
from jobs.cli import main
from tests.unit.jobs import tiny_stable
from workflows.parents import outline
from workflows.storage import Home


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion very small."""
    found = tiny_stable.known()
    monkeypatch.setattr(exchange, "published", lambda: found)


def imported(source: str, place: Path) -> Path:
    """The cascade of a source, by the command."""
    tiny_stable.file_of(source, place / "model.safetensors")
    words = ["import", source, str(place / "model.safetensors"), "--out", str(place / "cascade")]
    done = CliRunner().invoke(main, [*words, "--json", "-q"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["stages"] == ["autoencoder", "clip", "unet"]
    beside = 1 if source.startswith("sd1") else 2  # positions; the projection and the scale of an embedding
    assert said["not taken"] == {"readers": beside, "averaged": 1, "schedule": 1}
    return place / "cascade"


@pytest.mark.parametrize("source", tiny_stable.SOURCES)
def test_it_is_asked_and_read_for_as_published(source: str, tmp_path: Path) -> None:
    opened = bundle.load_cascade(imported(source, tmp_path))
    (hop,), (about,) = opened.hops, opened.spec.hops
    assert isinstance(hop, ChainHop)
    assert hop.clip is not None
    reads = hop.clip.spec
    first = source.startswith("sd1")
    wanted = ("last", "end", True) if first else ("penultimate", "zero", False)
    assert (reads.states, reads.pads_with, reads.quick_gelu) == wanted
    assert hop.spec.predicts == {"sd2": "v"}.get(source, "eps")
    assert hop.spec.guides_itself
    how = about.how
    fills = source.endswith("inpaint")
    assert (hop.spec.inpaints, hop.spec.mask_of) == (fills, "hole" if fills else "known")
    assert (how.sampler, how.num_steps, how.eta, how.spacing) == ("ddim", 50, float(fills), "ldm_plus_one")
    assert how.guidance_scale == (7.5 if first else 10.0 if fills else 9.0)
    assert about.follows_request
    assert opened.spec.image_size == 16


def test_the_command_paints_what_the_caption_says_and_ranks_by_no_tower_that_is_not_there(
    tmp_path: Path,
) -> None:
    cascade, pictures = str(imported("sd1", tmp_path)), []
    for words in (["a star"], ["a red circle"], ["a star", "--negative", "a red circle"]):
        out = tmp_path / str(len(pictures))
        order = ["sample", *words, "--cascade", cascade, "--steps", "2", "--out", str(out)]
        done = CliRunner().invoke(main, order)
        assert done.exit_code == 0, done.output
        pictures.append(Image.open(out / "00000000.png").tobytes())
    assert len(set(pictures)) == 3
    order = ["sample", "a star", "--cascade", cascade, "-n", "2", "--keep", "1", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(main, order)
    assert done.exit_code == 2
    assert "this CLIP is a text tower alone" in done.output


def test_a_training_starts_from_it_where_captions_are_read_alike(tmp_path: Path) -> None:
    place = imported("sd1", tmp_path)
    start, reader = (bundle.load(place / name).trained for name in ("unet", "clip"))
    first = bundle.load(place / "autoencoder").trained
    assert isinstance(start.spec, ChainSpec)
    assert isinstance(reader.spec, ClipSpec)
    with pytest.raises(ValueError, match=r"start' is sd1, .*: net.text_layers of its CLIP is 12 and 2 here"):
        build_stage(start.spec, {"clip": reader, "autoencoder": first, "start": start})
    other = reader._replace(spec=reader.spec.but(net=reader.spec.net.but(pads_with="zero")))
    with pytest.raises(ValueError, match=r"net\.pads_with of its CLIP is 'end' and 'zero' here"):
        build_stage(start.spec, {"clip": other, "autoencoder": first, "start": start})
    assert outline(Home.of(place / "unet")).source == start.source == "sd1"  # a plan refuses it as well
    fresh = build_stage(start.spec, {"clip": reader, "autoencoder": first})
    assert fresh.model.state_dict().keys() == start.weights.keys()


def test_what_fills_holes_fills_them_and_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    cascade, side = str(imported("sd2-inpaint", tmp_path)), 16
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    hole = np.zeros((side, side), np.uint8)
    hole[4:12, 6:10] = 255
    Image.fromarray(given).save(tmp_path / "given.png")
    Image.fromarray(hole).save(tmp_path / "hole.png")
    shown = ["--image", str(tmp_path / "given.png"), "--mask", str(tmp_path / "hole.png")]
    pictures = []
    for words in ("a star", "a red circle"):
        out = tmp_path / words
        order = ["sample", words, "--cascade", cascade, "--steps", "4", *shown, "--out", str(out)]
        done = CliRunner().invoke(main, order)
        assert done.exit_code == 0, done.output
        pictures.append(np.asarray(Image.open(out / "00000000.png")))
        assert (pictures[-1][hole == 0] == given[hole == 0]).all()
    assert (pictures[0][hole > 0] != pictures[1][hole > 0]).any()


def test_a_reader_of_captions_is_no_clip_that_sees(tmp_path: Path) -> None:
    trained = bundle.load(imported("sd2-inpaint", tmp_path) / "clip").trained
    assert clip_of(trained, states_alone=True).spec.towers == "text"
    with pytest.raises(ValueError, match="this CLIP is a text tower alone"):
        clip_of(trained)
    with pytest.raises(ValueError, match="this CLIP is a text tower alone"):
        build_stage(trained.spec, {})  # type: ignore[arg-type]


@pytest.mark.fault
@pytest.mark.parametrize(("source", "other"), [("sd1", "sd2-base"), ("sd2-base", "sd1")])
def test_a_file_whose_text_tower_is_anothers_is_refused_by_its_key(
    source: str, other: str, tmp_path: Path
) -> None:
    state = tiny_stable.file_of(source, tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("cond_stage_model.")}
    save_file(kept | tiny_stable.reader_of(other), tmp_path / "model.safetensors")
    with pytest.raises(LayoutError, match=r"there is no weight 'cond_stage_model\."):
        exchange.import_weights(source, [tmp_path / "model.safetensors"], tmp_path / "o", averaged=False)
    assert not (tmp_path / "o").exists()


def test_a_clip_by_itself_is_told_for_whom_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = tiny_stable.known()["sd1"].reader
    assert reader is not None
    net = reader.but(
        towers="both",
        states="last",
        pads_with="zero",
        image_size=8,
        patch_size=4,
        image_width=8,
        image_layers=1,
    )
    monkeypatch.setattr(clip, "net_of", lambda name: net)
    save_file(Clip(net).towers.state_dict(), tmp_path / "clip.safetensors")
    words = ["import", "openai-clip:tiny", str(tmp_path / "clip.safetensors"), "--out"]
    for source, out, said in (
        ("sd1", "first", ""),
        (
            "sd2",
            "second",
            "--reads-for sd2: its CLIP has quick_gelu False, this one True; take open-clip:ViT-H",
        ),
        ("glide-base", "third", "--reads-for glide-base: there are sd1, sd1-inpaint,"),
    ):
        done = CliRunner().invoke(main, [*words, str(tmp_path / out), "--reads-for", source])
        assert (done.exit_code == 0) == (not said), done.output
        assert said in " ".join(done.output.split())
    trained = bundle.load(tmp_path / "first").trained
    assert isinstance(trained.spec, ClipSpec)
    assert (trained.spec.net.pads_with, trained.spec.net.towers) == ("end", "both")
    more = exchange.More(reads_for="sd1")
    with pytest.raises(ValueError, match="--reads-for is for openai-clip, open-clip, not sd1"):
        exchange.import_weights("sd1", [Path("a")], tmp_path / "o", averaged=True, more=more)


def test_a_text_tower_alone_has_states_and_an_embedding_of_no_width() -> None:
    reader = tiny_stable.known()["sd2"].reader
    assert reader is not None
    alone = Clip(reader).eval()
    tokens = torch.tensor([[18, 3, 19] + [0] * 74])
    whole = Clip(reader.but(towers="both", image_size=8, patch_size=4, image_width=8, image_layers=1)).eval()
    whole.load_state_dict(alone.state_dict(), strict=False)
    torch.testing.assert_close(alone.read(tokens).states, whole.read(tokens).states)
    assert alone.read(tokens).embedding.shape == (1, 0)
