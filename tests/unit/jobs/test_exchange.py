"""Published weights become bundles that load, and bundles folders that come back as they were."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from dd_core import bundle
from dd_core.layouts import importing, ldm, published
from dd_core.layouts.adm import AdmLayout
from dd_core.layouts.moves import outward
from dd_core.layouts.published import Process, Published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.network import PlainSpec, build
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.network import NetworkSpec
from jobs import exchange
from jobs.cli import main

UNET = UNetSpec(
    width=32,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_at=(2,),
    heads=2,
    level_scale=1.0,
    attention="cross",
    resample="conv",
    scale_shift=False,
    text_width=24,
    text_at_level=False,
)
FIRST = AutoencoderNetSpec(width=32, channel_mult=(1, 2), blocks=1)
TINY = Published(
    PlainSpec(unet=UNET, in_channels=4, out_channels=4),
    "ldm",
    Process(schedule="sqrt_linear", beta_range=(0.00085, 0.012)),
    FIRST,
    0.18215,
)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of latent diffusion, very small, declared as a source of its own."""
    monkeypatch.setattr(exchange, "published", lambda: {"tiny": TINY})
    torch.manual_seed(0)
    unet, first = build(TINY.net), Autoencoder(FIRST)
    assert isinstance(unet, UNet)
    moves = ldm.ldm_unet_moves(unet, AdmLayout())
    state = {ldm.UNET + name: tensor for name, tensor in outward(unet.state_dict(), moves).items()}
    kept = {name: t for name, t in first.state_dict().items() if name not in ("moments", "observed")}
    state |= {ldm.AUTOENCODER + name: t for name, t in outward(kept, ldm.autoencoder_moves(first)).items()}
    state |= {"cond_stage_model.transformer.weight": torch.ones(2), "betas": torch.ones(1000)}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_a_file_becomes_bundles_and_these_folders_and_these_bundles_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    facts = exchange.import_weights("tiny", [checkpoint], tmp_path / "tiny", averaged=True)
    assert facts["not taken"] == {"readers": 1, "averaged": 0, "schedule": 1}
    unet, first = (bundle.load(Path(made["path"])) for made in facts["bundles"])
    assert unet.trained.spec == NetworkSpec(source="tiny", net=TINY.net, process=TINY.process)
    assert isinstance(first.trained.spec, AutoencoderSpec)
    net = Autoencoder(FIRST)
    net.load_state_dict(first.trained.weights)
    assert net.scale().item() == pytest.approx(0.18215)
    for name, found in (("unet", unet), ("autoencoder", first)):
        written = exchange.export_diffusers(tmp_path / "tiny" / name, tmp_path / f"{name}-folder")
        exchange.import_weights(
            "diffusers", [Path(written["path"])], tmp_path / f"{name}-back", averaged=True
        )
        back = bundle.load(tmp_path / f"{name}-back")
        same = {k: torch.allclose(w, back.trained.weights[k]) for k, w in found.trained.weights.items()}
        assert all(same.values())
        assert back.trained.weights.keys() == found.trained.weights.keys()
    spec = bundle.load(tmp_path / "unet-back").trained.spec
    assert isinstance(spec, NetworkSpec)
    assert spec.process == TINY.process


def test_the_commands_say_what_they_made_and_what_they_left(checkpoint: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        main, ["import", "tiny", str(checkpoint), "--out", str(tmp_path / "out"), "--json", "-q"]
    )
    assert run.exit_code == 0, run.output
    assert [made["kind"] for made in json.loads(run.stdout)["bundles"]] == ["network", "autoencoder"]
    folder = ["export", str(tmp_path / "out" / "unet"), "--format", "diffusers", "--out", str(tmp_path / "f")]
    assert CliRunner().invoke(main, folder).exit_code == 0
    assert (tmp_path / "f" / "scheduler" / "scheduler_config.json").is_file()
    again = CliRunner().invoke(main, ["import", "tiny", str(checkpoint), "--out", str(tmp_path / "out")])
    assert again.exit_code == 2


def test_an_unknown_source_is_refused_with_a_guess(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no source 'glide-bas'; did you mean 'glide-base'"):
        exchange.import_weights("glide-bas", [tmp_path], tmp_path / "out", averaged=True)
    with pytest.raises(ValueError, match="no plain CLIP named 'ViT-X'"):
        exchange.import_weights("openai-clip:ViT-X", [tmp_path], tmp_path / "out", averaged=True)


def test_the_towers_of_clip_become_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dd_core.layouts import clip  # noqa: PLC0415
    from dd_core.nets.clip import Clip, ClipNetSpec  # noqa: PLC0415
    from dd_core.stages.clip import clip_of  # noqa: PLC0415

    spec = ClipNetSpec(
        embedding_width=8,
        image_size=8,
        patch_size=4,
        image_width=16,
        image_layers=1,
        context_length=5,
        text_width=16,
        text_layers=1,
        head_width=8,
        vocab_size=20,
    )
    monkeypatch.setattr(clip, "net_of", lambda name: spec)
    towers = Clip(spec).towers
    state = {name: tensor.half() for name, tensor in towers.state_dict().items()}
    save_file(state | {"vocab_size": torch.tensor(20)}, tmp_path / "clip.safetensors")
    exchange.import_weights(
        "openai-clip:tiny", [tmp_path / "clip.safetensors"], tmp_path / "b", averaged=True
    )
    found = clip_of(bundle.load(tmp_path / "b").trained)
    assert found.spec.quick_gelu
    assert torch.equal(found.towers.text_projection, towers.text_projection.half().float())


def test_every_source_has_a_layout_that_fits_its_network() -> None:
    for name, source in published.published().items():
        with torch.device("meta"):
            net = build(source.net)
        ours = {move.ours for move in importing.moves_of(net, source.layout)}
        assert ours == net.state_dict().keys() - {"mean", "std"}, name
