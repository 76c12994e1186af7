"""Published models that paint by themselves are imported as cascades, and these paint as published."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from dd_core import bundle, schedules
from dd_core.bundle import Cascade
from dd_core.cascade import CascadeState, requested, run
from dd_core.denoiser import Conditioning
from dd_core.layouts import importing
from dd_core.layouts.moves import outward
from dd_core.layouts.published import Published, published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.classifier import ClassifierSpec
from dd_core.nets.network import PlainSpec, build
from dd_core.nets.unet import UNet
from dd_core.schedules import ScheduleSpec
from dd_core.stages import build_stage
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_hop import ConsistencyHop
from dd_core.stages.network import NetworkSpec
from jobs import exchange
from jobs.cli import main
from jobs.recipes import glide
from tests.unit.dd_core import test_chain as chains
from tests.unit.jobs.test_exchange import ldm_file

CLASSES = 3
UNET = chains.UNET.but(labels=CLASSES)
FIRST = AutoencoderNetSpec(width=16, channel_mult=(1, 2), blocks=1, groups=4, latent_channels=3, codes=8)
COSINE = ScheduleSpec(betas="cosine")


def small(source: Published, side: int) -> Published:
    """The same network, very small; heads, labels, pictures and prediction as they are."""
    process = source.process.but(image_size=side)
    match source.net:
        case PlainSpec() as net:
            about = {
                "labels": CLASSES * bool(net.unet.labels),
                "image_channels": net.unet.image_channels,
                "resample": net.unet.resample,
                "scale_shift": net.unet.scale_shift,
            }
            return source._replace(net=net.but(unet=UNET.but(**about)), process=process)
        case ClassifierSpec() as net:
            half = net.but(unet=UNET.but(labels=0), image_size=side, classes=CLASSES)
            return source._replace(net=half, process=process)
    raise AssertionError(source)


SIDES = {
    "adm-imagenet64": 16,
    "adm-classifier64": 16,
    "adm-upsampler-64-256": 64,
    "adm-lsun256": 16,
    "ddpm-cifar10": 16,
    "improved-imagenet64": 16,
    "edm-imagenet64": 16,
    "consistency-imagenet64": 16,
    "ldm-faces256": 8,
}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Published]:
    """The sources, of which some are very small."""
    found = published() | {name: small(published()[name], side) for name, side in SIDES.items()}
    found["ldm-faces256"] = found["ldm-faces256"]._replace(autoencoder=FIRST)
    monkeypatch.setattr(exchange, "published", lambda: found)
    return found


def awake(net: nn.Module) -> nn.Module:
    """Weights of which none is zero."""
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return net


def file_of(source: Published, path: Path) -> nn.Module:
    """Random weights in the layout of a source, and the network that they are of."""
    torch.manual_seed(0)
    net = awake(build(source.net))
    state = outward(net.state_dict(), importing.moves_of(net, source.layout))
    if source.layout == "ldm":
        state = ldm_file(state, Autoencoder(FIRST))
    save_file({name: t.contiguous() for name, t in state.items()}, path)
    return net.eval()


def imported(known: dict[str, Published], source: str, place: Path, **more: str) -> tuple[nn.Module, Cascade]:
    """A source by the command, with what else goes into its cascade."""
    net = file_of(known[source], place / "base.safetensors")
    words = ["import", source, str(place / "base.safetensors"), "--out", str(place / "cascade")]
    for option, other in more.items():
        file_of(known[other], place / f"{option}.safetensors")
        words += [f"--{option}", str(place / f"{option}.safetensors")]
    done = CliRunner().invoke(main, [*words, "--json", "-q"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["cascade"] == str(place / "cascade")
    return net, bundle.load_cascade(place / "cascade")


def asked(**told: Any) -> CascadeState:
    """A request for two pictures."""
    return requested(["", ""], [1, 2], 77)._replace(**told)


def painted(cascade: Cascade, state: CascadeState, *, steps: int = 2) -> CascadeState:
    """Through all hops, in few steps."""
    for hop, spec in zip(cascade.hops, cascade.spec.hops, strict=True):
        few = {"spacing": "linspace", "sections": ()} if spec.how.sampler == "ddpm" else {}
        few |= {"variance": "fixed_small"} if spec.how.variance == "fixed_large" else {}
        state = run(hop, state, spec.how.but(num_steps=steps, **few))
    return state


def answer(hop: ChainHop, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """What the chain of a hop takes for the picture behind x."""
    level = hop.model.network.of_class(label) if hop.spec.labels else None
    with torch.no_grad():
        return hop.model(x, sigma, Conditioning(level=level)).x0


LABEL, X = torch.tensor([0, 2]), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("source", "schedule", "scale"),
    [
        ("adm-imagenet64", COSINE, 1),
        ("adm-lsun256", ScheduleSpec(), 1),
        ("ddpm-cifar10", ScheduleSpec(), 1),
        ("improved-imagenet64", COSINE.but(num_timesteps=4000), 0.25),
    ],
)
def test_a_network_of_timesteps_is_asked_as_published(
    source: str, schedule: ScheduleSpec, scale: float, known: dict[str, Published], tmp_path: Path
) -> None:
    net, cascade = imported(known, source, tmp_path)
    hop, t = cascade.hops[0], torch.tensor([7, schedule.num_timesteps - 300])
    assert isinstance(hop, ChainHop)
    assert isinstance(net, UNet)
    sigma = schedules.sigmas(schedule)[t].float()
    s = sigma[:, None, None, None]
    told = Conditioning(level=net.of_class(LABEL) if hop.spec.labels else None)
    with torch.no_grad():
        eps = net((X * s + X) / (1 + s**2).sqrt(), t * float(scale), told)[:, :3]
    torch.testing.assert_close(
        answer(hop, X * s + X, sigma, LABEL), X * s + X - s * eps, rtol=1e-4, atol=1e-3
    )
    image = painted(cascade, asked(label=LABEL if hop.spec.labels else None)).image
    assert image is not None
    assert image.shape == (2, 3, 16, 16)
    assert cascade.spec.hops[0].how.num_steps == (1000 if source == "ddpm-cifar10" else 250)
    with pytest.raises(ValueError, match="guidance_scale 3, but the model has not learned to paint both"):
        hop.refuse(asked(label=LABEL), cascade.spec.hops[0].how.but(guidance_scale=3.0))


def test_a_classifier_that_is_told_timesteps_leads_its_base_and_an_upsampler_enlarges(
    known: dict[str, Published], tmp_path: Path
) -> None:
    others = {"classifier": "adm-classifier64", "upsampler": "adm-upsampler-64-256"}
    _, cascade = imported(known, "adm-imagenet64", tmp_path, **others)
    hop, t = cascade.hops[0], torch.tensor([7, 700])
    assert isinstance(hop, ChainHop)
    leader = hop.leaders.classifier
    assert leader is not None
    sigma = schedules.sigmas(COSINE)[t].float()
    with torch.no_grad():
        theirs = leader.network(X / (1 + sigma[:, None, None, None] ** 2).sqrt(), t.float())
        torch.testing.assert_close(leader(X, sigma), theirs)
    state = asked(label=LABEL)
    led = painted(cascade, state).image
    assert led is not None
    assert led.shape == (2, 3, 64, 64)
    how = cascade.spec.hops[0].how
    assert how.gradient is not None
    assert how.gradient.classes == 1
    alone = painted(imported(known, "adm-imagenet64", made(tmp_path / "alone"))[1], state).image
    only = run(hop, state, how.but(num_steps=2)).image
    assert only is not None
    assert alone is not None
    assert not torch.equal(only, alone)


def made(place: Path) -> Path:
    """A new folder."""
    place.mkdir()
    return place


def test_the_command_paints_a_class_by_an_imported_cascade(
    known: dict[str, Published], tmp_path: Path
) -> None:
    imported(known, "edm-imagenet64", tmp_path)
    words = ["sample", "no caption", "--cascade", str(tmp_path / "cascade"), "--steps", "2"]
    without = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "none")])
    assert without.exit_code == 2
    assert "give a label" in without.output
    pictures = []
    for label in ("0", "2"):
        done = CliRunner().invoke(main, [*words, "--label", label, "--out", str(tmp_path / label)])
        assert done.exit_code == 0, done.output
        pictures.append(Image.open(tmp_path / label / "00000000.png").tobytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("source", ["edm-imagenet64", "consistency-imagenet64"])
def test_a_network_of_all_noise_levels_is_scaled_as_published(
    source: str, known: dict[str, Published], tmp_path: Path
) -> None:
    """Karras et al. 2022, table 1; Song et al. 2023, appendix C: the identity at 0.002."""
    net, cascade = imported(known, source, tmp_path)
    hop = cascade.hops[0]
    chain = hop.base if isinstance(hop, ConsistencyHop) else hop
    assert isinstance(chain, ChainHop)
    assert isinstance(net, UNet)
    sigma, low = torch.tensor([0.3, 40.0]), 0.002 * isinstance(hop, ConsistencyHop)
    s = sigma[:, None, None, None]
    x = X * (0.25 + s**2).sqrt()
    with torch.no_grad():
        output = net(
            x / (s**2 + 0.25).sqrt(), 250 * (sigma + 1e-44).log(), Conditioning(level=net.of_class(LABEL))
        )
    skip, out = 0.25 / ((s - low) ** 2 + 0.25), (s - low) * 0.5 / (s**2 + 0.25).sqrt()
    torch.testing.assert_close(answer(chain, x, sigma, LABEL), skip * x + out * output, rtol=1e-4, atol=1e-3)
    if low:
        torch.testing.assert_close(answer(chain, x, torch.full((2,), 0.002), LABEL), x)
    assert cascade.spec.hops[0].how.num_steps == (1 if low else 40)
    images = [painted(cascade, asked(label=LABEL), steps=1 if low else 2).image for _ in range(2)]
    assert images[0] is not None
    assert images[1] is not None
    assert images[0].shape == (2, 3, 16, 16)
    assert images[0].abs().max() <= 1
    assert images[0].std() > 0
    assert torch.equal(*images)


LETTER = "not to be lost"


@pytest.mark.parametrize(
    "words",
    [
        ["import", "adm-upsampler-64-256", "{place}/weights.safetensors"],
        ["import", "edm-imagenet64", "{place}/weights.safetensors"],
        ["import", "glide", "{place}/base", "{place}/up", "--tokenizer", "{place}/ids", "{place}/merges"],
        ["import", "diffusers", "{place}/pipeline"],
        ["export", "{place}/bundle", "--format", "diffusers"],
    ],
    ids=["network", "cascade", "two-files", "pipeline", "export"],
)
def test_what_lies_there_is_not_written_over(
    words: list[str], known: dict[str, Published], tmp_path: Path
) -> None:
    if words[1] in SIDES:
        file_of(known[words[1]], tmp_path / "weights.safetensors")
    (made(tmp_path / "pipeline") / "model_index.json").write_text("{}")
    spec = NetworkSpec(source="x", net=known["ddpm-cifar10"].net, process=known["ddpm-cifar10"].process)
    bundle.save(tmp_path / "bundle", spec, build(spec.net).state_dict(), parents={}, facts={})
    letter = made(tmp_path / "out") / "letter.txt"
    letter.write_text(LETTER)
    done = CliRunner().invoke(
        main, [*(word.format(place=tmp_path) for word in words), "--out", str(letter.parent)]
    )
    assert done.exit_code == 2
    assert f"{letter.parent} exists; name another --out" in done.output
    assert list(letter.parent.iterdir()) == [letter]
    assert letter.read_text() == LETTER


def test_latent_diffusion_that_hears_nothing_paints_with_the_autoencoder_of_its_file(
    known: dict[str, Published], tmp_path: Path
) -> None:
    _, cascade = imported(known, "ldm-faces256", tmp_path)
    image = painted(cascade, asked()).image
    assert image is not None
    assert image.shape == (2, 3, 16, 16)
    hop = cascade.hops[0]
    assert isinstance(hop, ChainHop)
    assert hop.spec.schedule == ScheduleSpec(
        betas="scaled_linear", beta_start=0.0015, beta_end=0.0195, last="first"
    )
    assert sorted(path.name for path in (tmp_path / "cascade").iterdir() if path.is_dir()) == [
        "autoencoder",
        "unet",
    ]


def test_what_enlarges_or_leads_is_a_bundle_by_itself_and_readers_of_captions_stay_networks(
    known: dict[str, Published], tmp_path: Path
) -> None:
    kinds = {}
    for source in ("adm-upsampler-64-256", "adm-classifier64"):
        file_of(known[source], tmp_path / f"{source}.safetensors")
        exchange.import_weights(
            source, [tmp_path / f"{source}.safetensors"], tmp_path / source, averaged=True
        )
        kinds[source] = bundle.load(tmp_path / source).trained.spec.model_dump()["kind"]
    assert kinds == {"adm-upsampler-64-256": "chain", "adm-classifier64": "noised_classifier"}
    more = exchange.More(classifier=Path("a"))
    with pytest.raises(ValueError, match=r"--classifier is for adm-imagenet64, .*, not edm-imagenet64"):
        exchange.import_weights("edm-imagenet64", [Path("b")], tmp_path, averaged=True, more=more)


def test_an_imported_chain_is_a_start_and_a_consistency_model_is_not_trained_as_a_chain(
    known: dict[str, Published], tmp_path: Path
) -> None:
    imported(known, "adm-imagenet64", tmp_path)
    found = bundle.load(tmp_path / "cascade" / "base").trained
    assert isinstance(found.spec, ChainSpec)
    begun = build_stage(found.spec, {"start": found}).model.state_dict()
    assert all(torch.equal(begun[name], weight) for name, weight in found.weights.items())
    with pytest.raises(ValueError, match="a consistency model is learned by stage consistency"):
        build_stage(found.spec.but(predicts="consistency"), {})


def test_every_published_unet_of_adm_improved_ddpm_and_consistency_models_is_a_stage() -> None:
    from dd_core.stages.published import stage_of  # noqa: PLC0415

    none = {name for name, source in published().items() if stage_of(source) is None}
    assert not [name for name in none if name.startswith(("adm", "edm", "improved", "consistency"))]
    enlarging = stage_of(published()["karlo-sr"])
    assert isinstance(enlarging, ChainSpec)
    assert enlarging.enlarged_by == "bicubic"


def test_the_upsampler_of_glide_begins_with_less_noise_as_published() -> None:
    assert glide.paper().cascade.hops[1].how.temperature == 0.997
