"""What was trained here is written for diffusers, which then answers as it does and walks the same betas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dd_core import bundle, schedules
from dd_core.denoiser import Conditioning
from dd_core.layouts import diffusers_scheduler
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.schedules import LogNormalSpec, ScheduleSpec
from dd_core.spec import Spec
from dd_core.stages import build_stage
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.chain_spec import ChainSpec, denoiser_of
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.published import process_of
from dd_core.stages.start import levels_of
from jobs import export
from tests.parity.reference import randomised

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here and is not installed")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

ADM = UNetSpec(
    width=32,
    channel_mult=(1, 2),
    blocks_per_level=1,
    attention_at=(2,),
    head_width=16,
    level_scale=1,
    labels=4,
)
SD = ADM.but(
    attention="cross",
    resample="conv",
    scale_shift=False,
    labels=0,
    text_width=24,
    text_at_level=False,
    heads=4,
)
FIRST = AutoencoderNetSpec(width=16, channel_mult=(1, 2), blocks=1, groups=4)
PIXELS = ChainSpec(
    net=PlainSpec(unet=ADM, out_channels=6),
    image_size=16,
    schedule=ScheduleSpec(betas="cosine"),
    loss="hybrid",
)
LATENTS = ChainSpec(
    net=PlainSpec(unet=SD, in_channels=4, out_channels=4),
    image_size=32,
    latent_channels=4,
    schedule=ScheduleSpec(betas="scaled_linear", beta_start=0.00085, beta_end=0.012, last="first"),
    predicts="v",
)
FILLING = LATENTS.but(
    inpaints=True,
    mask_of="hole",
    net=LATENTS.net.but(unet=LATENTS.net.unet.but(image_channels=5)),  # type: ignore[union-attr]
)
X = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def saved(spec: Spec, chain: ChainSpec, place: Path, parents: dict[str, str]) -> UNet:
    """A bundle of random weights, and its network."""
    model = denoiser_of(chain)
    randomised(model)
    bundle.save(place, spec, model.state_dict(), parents=parents, facts={})
    assert isinstance(model.network, UNet)
    return model.network.eval()


def opened(written: Path, kind: str, scheduler: str) -> tuple[Any, Any]:
    """Both components by diffusers itself."""
    unet = getattr(diffusers, kind).from_pretrained(written / "unet").eval()
    return unet, getattr(diffusers, scheduler).from_pretrained(written / "scheduler")


@pytest.mark.parametrize("spec", [LATENTS, FILLING], ids=["paints", "fills"])
def test_a_chain_of_latents_is_the_unet_that_diffusers_samples_by_its_betas(
    spec: ChainSpec, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = build_stage(AutoencoderSpec(net=FIRST, image_size=32, crop=32, perceptual="none"), {})
    digest = bundle.save(
        run / "autoencoder" / "bundle", first.spec, first.model.state_dict(), parents={}, facts={}
    )
    net = saved(spec, spec, run / "base" / "bundle", {"autoencoder": digest})
    export.export_diffusers(run / "base" / "bundle", tmp_path / "out")
    theirs, scheduler = opened(tmp_path / "out", "UNet2DConditionModel", "DDIMScheduler")
    text, t = torch.randn(2, 5, 24), torch.tensor([3, 871])
    shown = torch.randn(2, spec.told_channels, 16, 16) if spec.inpaints else None
    heard = X if shown is None else torch.cat([X, shown], dim=1)
    with torch.no_grad():
        wanted = net(X, t.float(), Conditioning(text=text, image=shown))
        torch.testing.assert_close(theirs(heard, t, text).sample, wanted, rtol=1e-4, atol=1e-4)
    bars = schedules.alpha_bars(LATENTS.schedule).float()  # type: ignore[arg-type]
    torch.testing.assert_close(scheduler.alphas_cumprod, bars, rtol=1e-4, atol=1e-6)
    assert scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.clip_sample
    scheduler.set_timesteps(20)
    assert scheduler.timesteps.tolist() == schedules.timesteps("ldm_plus_one", 1000, 20).flip(0).tolist()
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert diffusers_scheduler.process_of(config, image_size=32) == process_of(LATENTS, LATENTS.schedule)  # type: ignore[arg-type]
    assert theirs.config.sample_size == 16
    alone = tmp_path / "alone"
    (run / "base" / "bundle").rename(alone)
    with pytest.raises(
        ValueError, match="its autoencoder, which says the side of its latents, is not beside"
    ):
        export.export_diffusers(alone, tmp_path / "again")


def test_a_chain_of_pixels_that_is_told_classes_answers_in_diffusers_as_here(tmp_path: Path) -> None:
    net = saved(PIXELS, PIXELS, tmp_path / "base", {})
    export.export_diffusers(tmp_path / "base", tmp_path / "out")
    theirs, scheduler = opened(tmp_path / "out", "UNet2DModel", "DDPMScheduler")
    label, t = torch.tensor([3, 0]), torch.tensor([3, 871])
    with torch.no_grad():
        wanted = net(X[:, :3], t.float(), Conditioning(level=net.of_class(label)))
        found = theirs(X[:, :3], t, class_labels=label).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (scheduler.config.variance_type, scheduler.config.clip_sample) == ("learned_range", True)
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert isinstance(PIXELS.schedule, ScheduleSpec)
    process = process_of(PIXELS, PIXELS.schedule)
    assert diffusers_scheduler.process_of(config, image_size=16) == process


def test_a_consistency_model_is_asked_by_diffusers_at_the_same_levels(tmp_path: Path) -> None:
    chain = ChainSpec(
        net=PlainSpec(unet=ADM),
        image_size=16,
        schedule=LogNormalSpec(),
        predicts="consistency",
        told_dropout=0.0,
    )
    net = saved(ConsistencySpec(base=chain, teacher=None), chain, tmp_path / "base", {})
    export.export_diffusers(tmp_path / "base", tmp_path / "out")
    theirs, scheduler = opened(tmp_path / "out", "UNet2DModel", "CMStochasticIterativeScheduler")
    scheduler.set_timesteps(1)
    label = torch.tensor([3, 0])
    with torch.no_grad():
        x, t = 80 * X[:, :3], scheduler.timesteps[0]
        output = theirs(scheduler.scale_model_input(x, t), t, class_labels=label).sample
        found = scheduler.step(output, t, x).prev_sample
        model = denoiser_of(chain)
        model.load_state_dict({f"network.{name}": weight for name, weight in net.state_dict().items()})
        wanted = model(x, torch.full((2,), 80.0), Conditioning(level=net.of_class(label))).x0
    torch.testing.assert_close(found, wanted.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_a_network_of_all_noise_levels_has_no_scheduler_which_is_said(tmp_path: Path) -> None:
    chain = ChainSpec(
        net=PlainSpec(unet=ADM), image_size=16, schedule=LogNormalSpec(), predicts="edm", told_dropout=0.0
    )
    saved(chain, chain, tmp_path / "base", {})
    facts = export.export_diffusers(tmp_path / "base", tmp_path / "out")
    assert facts["scheduler"].startswith("none, for diffusers has none")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unet"]


@pytest.mark.parametrize("kind", diffusers_scheduler.UNSAID)
def test_what_a_scheduler_leaves_unsaid_is_what_diffusers_takes(kind: str) -> None:
    scheduler = getattr(diffusers, kind)()
    found = diffusers_scheduler.process_of({"_class_name": kind}, image_size=64)
    levels = levels_of(found)
    assert isinstance(levels, ScheduleSpec)
    torch.testing.assert_close(scheduler.betas.double(), schedules.betas(levels), rtol=1e-5, atol=1e-8)
    assert scheduler.config.get("prediction_type", "epsilon") == diffusers_scheduler.PREDICTIONS["eps"]
    assert found.predicts == "eps"
    clips = bool(scheduler.config.get("clip_sample", False))
    assert diffusers_scheduler.clips({"_class_name": kind}) == clips
    first = getattr(scheduler, "final_alpha_cumprod", 1.0) == scheduler.alphas_cumprod[0]
    assert found.last == ("first" if first else "clean")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (PIXELS.but(rescaled_time=True, schedule=ScheduleSpec(num_timesteps=4000)), "diffusers tells t"),
        (
            PIXELS.but(inpaints=True, net=PlainSpec(unet=ADM.but(image_channels=4), out_channels=6)),
            "told the picture before the mask",
        ),
        (PIXELS.but(net=PlainSpec(unet=ADM.but(level_scale=100.0), out_channels=6)), "level_scale=100.0"),
        (
            PIXELS.but(net=PlainSpec(unet=ADM.but(stem="unshuffle", stem_factor=2), out_channels=6)),
            "stem='unshuffle'; what was published can be exported, and what recipes at paper scale train",
        ),
    ],
)
def test_what_diffusers_would_ask_otherwise_is_not_written(
    spec: ChainSpec, said: str, tmp_path: Path
) -> None:
    saved(spec, spec, tmp_path / "base", {})
    with pytest.raises(ValueError, match=said):
        export.export_diffusers(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
