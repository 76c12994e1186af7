"""A pipeline in folders, as diffusers writes it, becomes a cascade that paints what its parts paint.

The text tower is written out under the names of transformers, which need not be installed.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from dd_core import bundle
from dd_core.cascade import requested
from dd_core.layouts.clip import TRANSFORMERS
from dd_core.noise import SeededNoise
from dd_core.samplers import sample
from dd_core.stages.chain_hop import ChainHop
from jobs.cli import main
from tests.parity.reference import randomised
from tests.parity.test_stable_diffusion import (
    CAPTIONS,
    SCALE,
    SEEDS,
    STEPS,
    networks,
    padded,
    transformers_states,
)
from tests.unit.jobs.tiny_stable import HEAD, LAYERS, LENGTH, SIDE, WIDTH, transformers_tower

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LAST = {"set_alpha_to_one": False, "steps_offset": 1}
FORMS: dict[str, dict[str, Any]] = {
    "first": {"scheduler": "PNDMScheduler", "pad": "<|endoftext|>", "act": "quick_gelu"},
    "second": {"scheduler": "DDIMScheduler", "pad": "!", "act": "gelu", "predicts": "v_prediction"},
    "fills": {
        "scheduler": "DDIMScheduler",
        "pad": {"content": "<|endoftext|>"},
        "act": "quick_gelu",
        "channels": 9,
    },
}


class Pipeline(NamedTuple):
    """Its parts in diffusers, and the text tower by name."""

    unet: nn.Module
    first: nn.Module
    tower: dict[str, Tensor]


def text_tower(folder: Path, form: dict[str, Any]) -> dict[str, Tensor]:
    """Write text encoder and tokenizer."""
    tower = transformers_tower()
    config = {
        "architectures": ["CLIPTextModel"],
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": WIDTH // HEAD,
        "hidden_act": form["act"],
        "max_position_embeddings": LENGTH,
        "vocab_size": 49408,
    }
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": form["pad"]}))
    named = {f"text_model.{name}": weight for name, weight in tower.items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
    save_file(named | positions, folder / "text_encoder" / "model.safetensors")
    return {TRANSFORMERS + name: weight for name, weight in tower.items()}


def pipeline(folder: Path, form: dict[str, Any]) -> Pipeline:
    """Write a small one."""
    torch.manual_seed(0)
    unet, first = networks(form.get("channels", 4), scaling_factor=0.2, attention_head_dim=2)
    for name, part in {"unet": unet, "vae": first}.items():
        randomised(part).save_pretrained(folder / name)
    predicts = form.get("predicts", "epsilon")
    kind = getattr(diffusers, form["scheduler"])
    kind(**BETAS, **LAST, prediction_type=predicts).save_pretrained(folder / "scheduler")
    listed = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", form["scheduler"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(listed))
    return Pipeline(unet.eval(), first.eval(), text_tower(folder, form))


def imported(folder: Path, out: Path) -> Any:
    order = ["import", "diffusers", str(folder), "--out", str(out), "--json", "-q"]
    return CliRunner().invoke(main, order)


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_pipeline_paints_what_its_parts_paint_in_diffusers(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    theirs = pipeline(tmp_path, form)
    done = imported(tmp_path, tmp_path / "cascade")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["stages"] == ["autoencoder", "clip", "unet"]
    assert said["not taken"] == ["safety_checker"]
    cascade = bundle.load_cascade(tmp_path / "cascade")
    (hop,), (about,) = cascade.hops, cascade.spec.hops
    assert isinstance(hop, ChainHop)
    assert (about.how.num_steps, about.how.guidance_scale, cascade.spec.image_size) == (50, 7.5, 2 * SIDE)
    asked = requested(CAPTIONS, SEEDS, LENGTH)
    draw = hop.start(asked, about.how.but(num_steps=STEPS, guidance_scale=SCALE, eta=0.0))
    found = sample(draw.sampling, hop.denoiser(draw.rows))

    with_end, quick = form["pad"] != "!", form["act"] == "quick_gelu"
    told, not_told = (
        transformers_states(theirs.tower, padded(captions, with_end=with_end), quick=quick)
        for captions in (CAPTIONS, ("", ""))
    )
    shown = []
    if name == "fills":  # no picture was given: all of it is hole
        gray = theirs.first.encode(torch.zeros(2, 3, 2 * SIDE, 2 * SIDE)).latent_dist.mode() * 0.2
        shown = [torch.ones(2, 1, SIDE, SIDE), gray]
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x = SeededNoise(SEEDS)(torch.empty(2, 4, SIDE, SIDE))
    for t in scheduler.timesteps:
        heard = torch.cat([x, *shown], dim=1)
        yes, no = (theirs.unet(heard, t, encoder_hidden_states=one).sample for one in (told, not_told))
        x = scheduler.step(no + SCALE * (yes - no), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    image = hop.finish(asked, found).image
    assert image is not None
    expected = theirs.first.decode(x / 0.2).sample.clamp(-1, 1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1.01 / 255)


def pixel_unet() -> Any:
    """A small network of pixels."""
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def test_a_pipeline_of_pixels_hears_nothing(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(pixel_unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    done = imported(tmp_path / "pipeline", tmp_path / "cascade")
    assert done.exit_code == 0, done.output
    order = [
        "sample",
        "anything",
        "--cascade",
        str(tmp_path / "cascade"),
        "--steps",
        "2",
        "--out",
        str(tmp_path / "a"),
    ]
    done = CliRunner().invoke(main, order)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a" / "00000000.png").is_file()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "ours has no text_encoder_2"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is a T5EncoderModel"),
        ({"unet": [None, None]}, "it has no unet"),
        ({"text_encoder": [None, None]}, "its UNet is told what no hop of ours tells it"),
    ],
)
def test_a_pipeline_that_ours_has_not_is_refused_by_what_is_odd(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pipeline(tmp_path, FORMS["first"])
    listed = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(listed | changed))
    done = imported(tmp_path, tmp_path / "cascade")
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "cascade").exists()
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("intermediate_size", 99),
        ("max_position_embeddings", 248),
        ("vocab_size", 100),
    ],
)
def test_a_text_tower_that_ours_has_not_is_refused_by_its_field(
    field: str, value: Any, tmp_path: Path
) -> None:
    pipeline(tmp_path, FORMS["first"])
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    done = imported(tmp_path, tmp_path / "cascade")
    assert done.exit_code == 2
    assert f"{field} is {value!r}" in done.output


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_a_file_that_holds_no_fields_is_damaged(file: str, tmp_path: Path) -> None:
    pipeline(tmp_path, FORMS["first"])
    (tmp_path / file).write_text("[]")
    done = imported(tmp_path, tmp_path / "cascade")
    assert done.exit_code == 2
    assert "is damaged: it holds a list, no fields" in done.output


@pytest.mark.parametrize("clips", [True, False])
@torch.no_grad()
def test_estimates_of_pixels_are_clipped_as_the_scheduler_clips_them(clips: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet, scheduler = randomised(pixel_unet()).eval(), diffusers.DDIMScheduler(clip_sample=clips)
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained(tmp_path / "pipeline")
    done = imported(tmp_path / "pipeline", tmp_path / "cascade")
    assert done.exit_code == 0, done.output
    cascade = bundle.load_cascade(tmp_path / "cascade")
    (hop,), (about,) = cascade.hops, cascade.spec.hops
    assert about.how.clip == ("image" if clips else "none")
    draw = hop.start(requested([""], [0], LENGTH), about.how.but(num_steps=10))
    found = sample(draw.sampling, hop.denoiser(draw.rows))
    scheduler.set_timesteps(10)
    x = SeededNoise([0])(torch.empty(1, 3, 16, 16))
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)
    assert (float(x.abs().max()) > 1.01) != clips


@pytest.mark.parametrize("odd", [{"clip_sample_range": 3.0}, {"thresholding": True}])
def test_a_scheduler_that_clips_in_another_way_is_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(**odd)
    diffusers.DDIMPipeline(pixel_unet(), scheduler).save_pretrained(tmp_path / "pipeline")
    done = imported(tmp_path / "pipeline", tmp_path / "cascade")
    assert done.exit_code == 2
    assert f"{next(iter(odd))} is {next(iter(odd.values()))}, unknown to ours" in done.output
    assert not (tmp_path / "cascade").exists()
