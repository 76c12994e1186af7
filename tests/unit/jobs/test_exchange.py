"""Published weights become bundles that load, and bundles folders that come back as they were."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dd_core import bundle, sealed
from dd_core.cascade import CascadeSpec, HopSpec, requested, run
from dd_core.layouts import diffusers_scheduler, importing, ldm, published
from dd_core.layouts.adm import AdmLayout
from dd_core.layouts.files import WEIGHTS, weights_in_folder
from dd_core.layouts.moves import LayoutError, outward
from dd_core.layouts.published import Process, Published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.network import PlainSpec, build
from dd_core.nets.noised_clip import GlideClipSpec
from dd_core.nets.text import CaptionedSpec, CaptionedUNet, TextSpec
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.network import NetworkSpec
from dd_core.steering import GradientSpec
from dd_core.vocabulary import ENCODER, read_vocabulary
from jobs import exchange, export
from jobs.cli import main
from jobs.recipes import glide
from tests.conftest import room_for
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core import test_vocabulary
from tests.unit.serve.tiny import tiny_cascade

WHERE = "diffusion_pytorch_model-00002-of-00003.safetensors"
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
    Process(schedule="sqrt_linear", beta_range=(0.00085, 0.012), last="first"),
    FIRST,
    0.18215,
)


def ldm_file(unet: dict[str, Tensor], first: Autoencoder) -> dict[str, Tensor]:
    """What a file of latent diffusion holds: a UNet under its published names, and an autoencoder."""
    kept = {name: t for name, t in first.state_dict().items() if name not in ("moments", "observed")}
    theirs = outward(kept, ldm.autoencoder_moves(first))
    return {ldm.UNET + name: t for name, t in unet.items()} | {
        ldm.AUTOENCODER + name: t for name, t in theirs.items()
    }


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of latent diffusion, very small, declared as a source of its own."""
    monkeypatch.setattr(exchange, "published", lambda: {"tiny": TINY})
    torch.manual_seed(0)
    unet, first = build(TINY.net), Autoencoder(FIRST)
    assert isinstance(unet, UNet)
    moves = ldm.ldm_unet_moves(unet, AdmLayout())
    state = ldm_file(outward(unet.state_dict(), moves), first)
    state |= {"cond_stage_model.transformer.weight": torch.ones(2), "betas": torch.ones(1000)}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_a_file_becomes_bundles_and_these_folders_and_these_bundles_again(
    checkpoint: Path, tmp_path: Path
) -> None:
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(checkpoint), "global_step": 3}, pickled)
    facts = exchange.import_weights("tiny", [pickled], tmp_path / "tiny", averaged=True)
    assert facts["not taken"] == {"readers": 1, "averaged": 0, "schedule": 1}
    unet, first = (bundle.load(Path(made["path"])) for made in facts["bundles"])
    assert unet.trained.spec == NetworkSpec(source="tiny", net=TINY.net, process=TINY.process)
    assert isinstance(first.trained.spec, AutoencoderSpec)
    net = Autoencoder(FIRST)
    net.load_state_dict(first.trained.weights)
    assert net.scale().item() == pytest.approx(0.18215)
    for name, found in (("unet", unet), ("autoencoder", first)):
        written = export.export_diffusers(tmp_path / "tiny" / name, tmp_path / f"{name}-folder")
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


def first_of(directory: Path) -> Autoencoder:
    """The autoencoder of a bundle."""
    net = Autoencoder(FIRST)
    net.load_state_dict(bundle.load(directory).trained.weights)
    return net


def test_latents_are_scaled_as_was_measured_in_their_training(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scale_by_std` of latent diffusion: the checkpoint holds what its first batch came to."""
    monkeypatch.setattr(exchange, "published", lambda: {"tiny": TINY._replace(latent_scale=None)})
    with pytest.raises(LayoutError, match="nothing says the scale of these latents"):
        exchange.import_weights("tiny", [checkpoint], tmp_path / "tiny", averaged=True)
    save_file(load_file(checkpoint) | {"scale_factor": torch.tensor(0.25)}, checkpoint)
    exchange.import_weights("tiny", [checkpoint], tmp_path / "tiny", averaged=True)
    assert first_of(tmp_path / "tiny" / "autoencoder").scale().item() == pytest.approx(0.25)
    assert published.published()["ldm-churches256"].latent_scale is None


def test_an_autoencoder_by_itself_is_told_its_scale(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "AUTOENCODERS", {"tiny-kl": FIRST})
    alone = ["import", "tiny-kl", str(checkpoint), "--out", str(tmp_path / "kl")]
    refused = CliRunner().invoke(main, alone)
    assert refused.exit_code == 2
    assert "give --scale" in refused.output
    assert CliRunner().invoke(main, [*alone, "--scale", "0.5"]).exit_code == 0
    assert first_of(tmp_path / "kl").scale().item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"--scale is for .*tiny-kl.*, not sd1"):
        exchange.import_weights(
            "sd1", [checkpoint], tmp_path / "sd", averaged=True, more=exchange.More(scale=0.5)
        )


def test_weights_that_find_no_room_are_told_in_one_line_and_a_later_import_is_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "AUTOENCODERS", {"tiny-kl": FIRST})
    words = ["import", "tiny-kl", str(checkpoint), "--scale", "0.5", "--out", str(tmp_path / "kl")]
    with room_for(10_000):
        done = CliRunner().invoke(main, words)
    assert done.exit_code == 70
    assert done.stderr == (
        "ddiff: no space left on the disk; free some and run the same command again to continue\n"
    )
    assert not (tmp_path / "kl").exists()
    assert CliRunner().invoke(main, words).exit_code == 0
    sealed.verify(tmp_path / "kl")


def test_the_x4_upscaler_walks_the_betas_of_its_configuration() -> None:
    """x4-upscaling.yaml of Stable Diffusion: linear_start 0.0001, linear_end 0.02, evenly in their roots."""
    process = published.published()["sd-x4-upscaler"].process
    config = diffusers_scheduler.config_of(process)
    found = [config[name] for name in ("beta_schedule", "beta_start", "beta_end", "prediction_type")]
    assert found == ["scaled_linear", 0.0001, 0.02, "v_prediction"]


def test_an_upscaler_comes_with_its_autoencoder_and_leaves_its_noise_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion's x4 upscaler: a caption seen twice, classes that are levels of noise."""
    unet = UNET.but(text_only_at=(2,), image_channels=3, labels=10)
    small = TINY._replace(net=PlainSpec(unet=unet, in_channels=4, out_channels=4), layout="ldm-linear")
    monkeypatch.setattr(exchange, "published", lambda: {"tiny-x4": small})
    torch.manual_seed(0)
    net, first = build(small.net), Autoencoder(FIRST)
    theirs = outward(net.state_dict(), importing.moves_of(net, "ldm-linear"))
    shape = theirs["input_blocks.3.1.transformer_blocks.0.attn1.to_k.weight"].shape
    assert shape == (64, 24)  # the first attention looks at the caption
    state = ldm_file(theirs, first)
    state |= {"low_scale_model.betas": torch.ones(1000), "betas": torch.ones(1000)}
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "x4.safetensors")
    facts = exchange.import_weights("tiny-x4", [tmp_path / "x4.safetensors"], tmp_path / "x4", averaged=False)
    assert facts["not taken"] == {"readers": 1, "averaged": 0, "schedule": 1}
    found = bundle.load(tmp_path / "x4" / "unet").trained.weights
    assert all(torch.equal(found[name], weight) for name, weight in net.state_dict().items())
    plain = UNet(UNET, in_channels=4, out_channels=4)
    with pytest.raises(LayoutError):
        importing.weights_for(plain, "ldm-linear", theirs)


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
    assert f"{tmp_path / 'out' / 'unet'} exists; name another --out" in again.output


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """The UNet as a component of diffusers, its weights in three files and an index."""
    exchange.import_weights("tiny", [checkpoint], tmp_path / "tiny", averaged=True)
    written = export.export_diffusers(tmp_path / "tiny" / "unet", tmp_path / "folder")
    whole = Path(written["path"]) / WEIGHTS
    tensors = load_file(whole)
    names = [f"diffusion_pytorch_model-{part + 1:05}-of-00003.safetensors" for part in range(3)]
    places = {name: names[at % 3] for at, name in enumerate(sorted(tensors))}
    for part in names:
        save_file({name: tensors[name] for name, at in places.items() if at == part}, whole.parent / part)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (whole.parent / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    whole.unlink()
    return whole.parent


def test_a_component_in_several_files_is_that_of_one(folder: Path, tmp_path: Path) -> None:
    exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)
    found, first = (bundle.load(tmp_path / name).trained.weights for name in ("back", "tiny/unet"))
    assert found.keys() == first.keys()
    assert all(torch.allclose(found[name], weight) for name, weight in first.items())


def test_a_folder_of_ddpm_comes_in_and_goes_out(tmp_path: Path) -> None:
    """All in one folder, and its attention named as diffusers named it then."""
    unet = UNetSpec(
        width=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_at=(2,),
        heads=1,
        resample="conv",
        scale_shift=False,
        level_scale=1.0,
        text_at_level=False,
        embedding_tokens=0,
        sine_first=True,
        freq_shift=1,
        pads="after",
        epsilon=1e-6,
    )
    spec = NetworkSpec(source="ddpm", net=PlainSpec(unet=unet), process=Process(image_size=16))
    bundle.save(tmp_path / "ddpm", spec, build(spec.net).state_dict(), parents={}, facts={})
    folder = Path(export.export_diffusers(tmp_path / "ddpm", tmp_path / "out")["path"])
    (tmp_path / "out" / "scheduler" / "scheduler_config.json").rename(folder / "scheduler_config.json")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / WEIGHTS)
    for new, name in old.items():
        weights = {key.replace(f".{new}.", f".{name}."): weight for key, weight in weights.items()}
    assert "mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, folder / WEIGHTS)
    exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)
    first, back = (bundle.load(tmp_path / name).trained for name in ("ddpm", "back"))
    assert back.spec == spec.but(source="diffusers")
    assert back.weights.keys() == first.weights.keys()
    assert all(torch.equal(back.weights[name], weight) for name, weight in first.weights.items())


@pytest.mark.fault
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda index: {}, "has no weight_map"),
        (
            lambda index: {"weight_map": index["weight_map"] | {"conv_in.bias": "../a.safetensors"}},
            "of its folder",
        ),
        (lambda index: {"weight_map": index["weight_map"] | {"conv_in.bias": "a.bin"}}, "of its folder"),
        (
            lambda index: {"weight_map": index["weight_map"] | {"more": WHERE}},
            "'more' otherwise: it is not in it",
        ),
        (
            lambda index: {
                "weight_map": {k: v for k, v in index["weight_map"].items() if k != "conv_in.bias"}
            },
            "'conv_in.bias' otherwise: it is in it as well",
        ),
    ],
)
def test_an_index_that_does_not_tell_the_truth_is_refused(
    damage: Callable[[Any], Any], said: str, folder: Path, tmp_path: Path
) -> None:
    path = folder / f"{WEIGHTS}.index.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(LayoutError, match=said):
        exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)
    assert not (tmp_path / "back").exists()


def test_a_part_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / WHERE).unlink()
    with pytest.raises(FileNotFoundError, match=WHERE):
        exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)


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


def test_a_chain_of_another_length_says_its_own_betas_and_rescaled_time_is_refused() -> None:
    process = published.published()["improved-upsampler-64-256"].process
    config = diffusers_scheduler.config_of(process)
    assert (config["num_train_timesteps"], config["beta_start"]) == (4000, 2.5e-5)
    assert diffusers_scheduler.process_of(config, image_size=256) == process
    squares = Process(schedule="sqrt_linear", timesteps=500, beta_range=(0.00085, 0.012))
    config = diffusers_scheduler.config_of(squares)
    assert config["beta_start"] == 0.00085
    assert diffusers_scheduler.process_of(config, image_size=64) == squares
    with pytest.raises(LayoutError, match="diffusers tells t; it cannot be exported"):
        diffusers_scheduler.config_of(published.published()["improved-imagenet64"].process)


@pytest.mark.parametrize("name", ["upsampler", "prior"])
def test_what_diffusers_has_nothing_like_is_named_by_its_kind(name: str, tmp_path: Path) -> None:
    tiny_cascade(tmp_path)
    with pytest.raises(ValueError, match=rf"/{name}: diffusers has nothing like a stage of kind {name}; "):
        export.export_diffusers(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_consistency_model_that_was_exported_is_asked_as_one_when_it_comes_back(tmp_path: Path) -> None:
    jumps = diffusers_scheduler.jumps_of(0.002, 80.0)
    found = diffusers_scheduler.process_of(jumps, image_size=64)
    assert found == published.published()["consistency-imagenet64"].process
    with pytest.raises(LayoutError, match=r"sigma_max is 40\.0, ours knows consistency models of 80\.0 only"):
        diffusers_scheduler.process_of(jumps | {"sigma_max": 40.0}, image_size=64)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatchEuler"),
        ({"beta_schedule": "linear"}, "_class_name is None, ours knows the process of CM"),
        ({"_class_name": "LCMScheduler", "beta_schedule": "scaled_linear"}, "_class_name is 'LCM"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type is 'continuous'",
        ),
        ({"_class_name": "DDPMScheduler", "prediction_type": "flow_prediction"}, "prediction_type is 'flow"),
        ({"_class_name": "DDPMScheduler", "trained_betas": [0.1]}, r"trained_betas is \[0.1\]"),
    ],
)
def test_a_scheduler_of_another_process_is_refused(
    config: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    (folder.parent / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match=said):
        exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)
    assert not (tmp_path / "back").exists()


def test_an_enlarging_network_that_learned_its_variance_comes_back_as_one(tmp_path: Path) -> None:
    """ADM's upsampler: six channels go in and six come out, and neither half is like the other."""
    unet = UNetSpec(
        width=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_at=(2,),
        head_width=16,
        level_scale=1.0,
        image_channels=3,
    )
    process = published.ADM.but(image_size=16)
    spec = NetworkSpec(source="adm", net=PlainSpec(unet=unet, out_channels=6), process=process)
    bundle.save(tmp_path / "adm", spec, build(spec.net).state_dict(), parents={}, facts={})
    folder = Path(export.export_diffusers(tmp_path / "adm", tmp_path / "folder")["path"])
    exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)
    back = bundle.load(tmp_path / "back").trained.spec
    assert isinstance(back, NetworkSpec)
    assert isinstance(back.net, PlainSpec)
    assert back.process == process
    assert (back.net.in_channels, back.net.unet.image_channels, back.net.out_channels) == (3, 3, 6)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("learned_range", "of a variance that is learned: make variance_type"),
        ("learned", "variance_type is 'learned', unknown to ours"),
    ],
)
def test_a_variance_that_the_channels_contradict_is_refused(
    kind: str, said: str, folder: Path, tmp_path: Path
) -> None:
    path, config = folder.parent / "scheduler" / "scheduler_config.json", folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"variance_type": kind}))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 1}))
    weights = weights_in_folder(folder, WEIGHTS)
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :1].contiguous()
    for part in folder.glob("*.safetensors*"):
        part.unlink()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(LayoutError, match=said):
        exchange.import_weights("diffusers", [folder], tmp_path / "back", averaged=True)
    assert not (tmp_path / "back").exists()


LENGTH = 12
FAST = SamplingSpec(sampler="ddpm", num_steps=2, spacing="linspace", guidance_scale=3.0)


@pytest.fixture(scope="module")
def glides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Files of GLIDE, very small, its vocabulary, and the cascade that was imported from them."""
    place = tmp_path_factory.mktemp("glide")
    encoder, merges = test_vocabulary.written(place, 50_000)
    text = TextSpec(width=16, layers=1, heads=2, context_length=LENGTH)
    unet = chains.UNET.but(text_width=16)
    known, whole = published.published(), glide.paper()
    stages, files = [], {"encoder": encoder, "merges": merges}
    torch.manual_seed(0)
    for stage, source, more, size in (
        ("guided", "glide-base", 0, 16),
        ("upsampler", "glide-upsample", 3, 32),
    ):
        net = CaptionedSpec(unet=unet.but(image_channels=more), text=text)
        known[source] = known[source]._replace(net=net)
        before = whole.stage(stage)
        assert isinstance(before.stage, ChainSpec)
        stages.append(
            before.but(stage=before.stage.but(net=net, image_size=size, factor=size // 16), parents={})
        )
        holed = f"{source}-inpaint"
        known[holed] = known[holed]._replace(net=net.but(unet=unet.but(image_channels=more + 4)))
        for name in (source, holed):
            made = build(known[name].net)
            for weight in made.parameters():
                weight.data += 0.05 * torch.randn_like(weight)
            files[name] = place / f"{name}.safetensors"
            theirs = outward(made.state_dict(), importing.moves_of(made, "glide"))
            save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, files[name])
    hops = (HopSpec(stage="guided", how=FAST), HopSpec(stage="upsampler", how=FAST.but(guidance_scale=1.0)))
    cascade = CascadeSpec(name="glide", hops=hops, context_length=LENGTH, image_size=32)
    pairs = whole.pairs.but(context_length=LENGTH, sizes=(16, 32))
    small = whole.but(stages=tuple(stages), cascade=cascade, pairs=pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "published", lambda: known)
        patch.setattr(glide, "paper", lambda: small)
        files["cascade"] = place / "cascade"
        words = ["import", "glide", str(files["glide-base"]), str(files["glide-upsample"])]
        words += ["--tokenizer", str(encoder), str(merges), "--out", str(files["cascade"])]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        yield files


def test_an_imported_cascade_reads_captions_by_the_vocabulary_that_came_with_it(
    glides: dict[str, Path],
) -> None:
    opened, vocabulary = (
        bundle.load_cascade(glides["cascade"]),
        read_vocabulary(glides["encoder"], glides["merges"]),
    )
    for hop in opened.hops:
        assert isinstance(hop, ChainHop)
        net = hop.model.network
        assert isinstance(net, CaptionedUNet)
        state = requested(["A red circle"], [1], LENGTH, negatives=["squares"])
        state = state._replace(image=torch.zeros(1, 3, 16, 16))
        rows = hop.start(state, FAST if hop.spec.factor == 1 else FAST.but(guidance_scale=1.0)).rows
        wanted = [("A red circle", rows.cond.text)]
        wanted += [("squares", rows.null.text)] if hop.spec.factor == 1 else []
        for caption, told in wanted:
            ids = vocabulary.encoded(caption)
            tokens = torch.tensor([ids + [7] * (LENGTH - len(ids))])  # whatever the padding is
            heard = torch.arange(LENGTH)[None] < len(ids)
            torch.testing.assert_close(told, net.text(tokens, heard))
        nothing = hop.start(
            state._replace(negatives=(), negative=None, captions=("",)), FAST.but(guidance_scale=1.0)
        ).rows
        padding = net.text(torch.zeros(1, LENGTH, dtype=torch.long), torch.zeros(1, LENGTH, dtype=torch.bool))
        torch.testing.assert_close(nothing.cond.text, padding)


def test_what_it_is_told_decides_what_it_paints_and_tokens_alone_are_refused(
    glides: dict[str, Path], tmp_path: Path
) -> None:
    def painted(prompt: str) -> bytes:
        out = tmp_path / prompt
        done = CliRunner().invoke(
            main, ["sample", prompt, "--cascade", str(glides["cascade"]), "--out", str(out)]
        )
        assert done.exit_code == 0, done.output
        return Image.open(out / "00000000.png").tobytes()

    assert painted("a red circle") == painted("A RED circle") != painted("a  red circle")
    base = bundle.load_cascade(glides["cascade"]).hops[0]
    with pytest.raises(ValueError, match="has their tokens alone; give the captions"):
        run(base, requested(["a"], [1], LENGTH)._replace(captions=()), FAST)


def test_the_networks_of_glide_that_fill_holes_are_a_cascade_that_does(
    glides: dict[str, Path], tmp_path: Path
) -> None:
    words = [
        "import",
        "glide-inpaint",
        str(glides["glide-base-inpaint"]),
        str(glides["glide-upsample-inpaint"]),
    ]
    words += [
        "--tokenizer",
        str(glides["encoder"]),
        str(glides["merges"]),
        "--out",
        str(tmp_path / "filling"),
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    picture, mask = Image.new("RGB", (32, 32), (200, 30, 90)), Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    words = ["sample", "a star", "--cascade", str(tmp_path / "filling"), "--out", str(tmp_path / "out")]
    words += ["--image", str(tmp_path / "picture.png"), "--mask", str(tmp_path / "mask.png")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    painted = torch.tensor(list(Image.open(tmp_path / "out" / "00000000.png").tobytes())).view(32, 32, 3)
    assert (painted[:, :16] == torch.tensor([200, 30, 90])).all()
    assert not (painted[:, 16:] == torch.tensor([200, 30, 90])).all()
    hops = bundle.load_cascade(tmp_path / "filling").spec.hops
    assert [(hop.how.sampler, hop.how.guidance_scale) for hop in hops] == [("ddpm", 5.0), ("ddpm", 1.0)]


@pytest.mark.fault
def test_a_vocabulary_is_under_the_seal_and_must_be_that_of_the_weights(
    glides: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(glides["cascade"], tmp_path / "copy")
    inside = tmp_path / "copy" / "guided" / ENCODER
    assert inside.read_bytes() == glides["encoder"].read_bytes()
    inside.write_bytes(inside.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(sealed.SealError, match=f"guided/{ENCODER}"):
        bundle.load_cascade(tmp_path / "copy")
    encoder, merges = test_vocabulary.written(tmp_path)
    paths = [glides["glide-base"], glides["glide-upsample"]]
    with pytest.raises(ValueError, match=r"encoder.json: \d+ symbols, but glide-base reads 50257"):
        exchange.import_weights(
            "glide", paths, tmp_path / "o", averaged=True, more=exchange.More((encoder, merges))
        )
    for bad in (paths[:1], paths):
        with pytest.raises(ValueError, match="two files of weights, base and upsampler"):
            exchange.import_weights("glide", bad, tmp_path / "o", averaged=True)
    with pytest.raises(ValueError, match="--tokenizer is for glide, glide-inpaint, not sd1; leave it out"):
        exchange.import_weights(
            "sd1", paths, tmp_path / "o", averaged=True, more=exchange.More((encoder, merges))
        )
    assert not (tmp_path / "o").exists()


TAKES = {
    "glide": ("tokenizer", "clip"),
    "glide-inpaint": ("tokenizer",),
    "openai-clip:ViT-L-14": ("reads_for",),
    "diffusers": (),
}
OPTIONS = ("tokenizer", "scale", "classifier", "upsampler", "clip", "reads_for")


@pytest.mark.parametrize(
    ("source", "option"),
    [(source, option) for source, taken in TAKES.items() for option in OPTIONS if option not in taken],
)
def test_what_a_source_is_not_asked_is_refused_and_never_passed_over(
    source: str, option: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    values = {"tokenizer": (file, file), "clip": (file, file), "scale": 0.5, "reads_for": "sd1"}
    more = exchange.More()._replace(**{option: values.get(option, file)})
    with pytest.raises(
        ValueError, match=f"--{option.replace('_', '-')} is for .*, not {source}; leave it out"
    ):
        exchange.import_weights(source, [file, file], tmp_path / "o", averaged=True, more=more)


def test_the_noised_clip_of_glide_leads_its_base_to_the_caption(
    glides: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = exchange.published()
    net = known["glide-clip"].net
    assert isinstance(net, GlideClipSpec)
    about = {"image_size": 16, "patch_size": 8, "image_width": 16, "text_width": 16, "head_width": 8}
    small = known["glide-clip"]._replace(net=net.but(**about, image_layers=1, text_layers=1))
    monkeypatch.setattr(exchange, "published", lambda: known | {"glide-clip": small})
    torch.manual_seed(1)
    made = build(small.net)
    theirs = outward(made.state_dict(), importing.moves_of(made, "glide-clip"))
    for tower in ("image", "text"):
        mine = {name.removeprefix(f"{tower}."): t for name, t in theirs.items() if name.startswith(tower)}
        save_file({name: t.contiguous() for name, t in mine.items()}, tmp_path / f"{tower}.safetensors")
    words = ["import", "glide", str(glides["glide-base"]), str(glides["glide-upsample"]), "--tokenizer"]
    words += [str(glides["encoder"]), str(glides["merges"]), "--out", str(tmp_path / "led")]
    words += ["--clip", str(tmp_path / "image.safetensors"), str(tmp_path / "text.safetensors")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    opened = bundle.load_cascade(tmp_path / "led")
    (base, upsampler), hop = opened.spec.hops, opened.hops[0]
    assert base.guides == {"noised_clip": "noised_clip", "clip": "noised_clip"}
    assert base.how.gradient == GradientSpec(caption=3.0)
    assert (base.how.guidance_scale, upsampler.how.gradient) == (1.0, None)
    assert isinstance(hop, ChainHop)
    weights = hop.leaders.noised_clip.network.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(weights[name], value) for name, value in made.state_dict().items())
    pictures = set()
    for weight in ("0.5", "3", "30"):
        out = tmp_path / weight
        words = ["sample", "a star", "--cascade", str(tmp_path / "led"), "--out", str(out)]
        done = CliRunner().invoke(main, [*words, "--set", f"guided.gradient.caption={weight}"])
        assert done.exit_code == 0, done.output
        pictures.add(Image.open(out / "00000000.png").tobytes())
    assert len(pictures) == 3
    files = (tmp_path / "image.safetensors", tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="--clip is for glide, not glide-inpaint"):
        exchange.import_weights(
            "glide-inpaint", [], tmp_path / "o", averaged=True, more=exchange.More(clip=files)
        )
    swapped = exchange.More((glides["encoder"], glides["merges"]), clip=(files[1], files[0]))
    paths = [glides["glide-base"], glides["glide-upsample"]]
    with pytest.raises(LayoutError):
        exchange.import_weights("glide", paths, tmp_path / "o", averaged=True, more=swapped)
    assert not (tmp_path / "o").exists()
