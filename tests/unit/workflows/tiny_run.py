"""A run directory as a finished run leaves it, with weights that have learned nothing."""

import json
from pathlib import Path

import torch

from dd_core import bundle, sealed
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.dit import DiTSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.upsampler import UpsamplerSpec
from workflows.census import totals
from workflows.journal import Journal
from workflows.pairs import PairsSpec
from workflows.parts import UNFINISHED, write_part
from workflows.shape_shards import ShapesSpec, write_shards
from workflows.storage import Home

CLIP = ClipNetSpec(
    embedding_width=16,
    image_size=32,
    patch_size=16,
    image_width=32,
    image_layers=1,
    context_length=16,
    text_width=32,
    text_layers=1,
    head_width=16,
)


def make_run(directory: Path) -> Path:
    """Data, a cascade of random weights, an autoencoder, a journal and scores."""
    prepared(directory)
    net = DiTSpec(
        image_size=16, conv_width=16, conv_blocks=1, width=32, layers=1, head_width=16, text_width=32
    )
    small = UNetSpec(
        width=8,
        channel_mult=(1, 1),
        blocks_per_level=1,
        attention_at=(),
        attention_in_middle=False,
        groups=4,
        image_channels=3,
    )
    autoencoder = AutoencoderNetSpec(
        width=8, channel_mult=(1, 1), blocks=1, groups=4, stem=4, mid_attention=False
    )
    trained = {"clip": saved(directory, "clip", ClipSpec(net=CLIP), {})}
    saved(directory, "base", BaseSpec(net=net, image_size=16), trained)
    saved(directory, "upsampler", UpsamplerSpec(net=small, image_size=64, crop=16), {})
    saved(
        directory,
        "autoencoder",
        AutoencoderSpec(net=autoencoder, image_size=64, crop=16, perceptual="none"),
        {},
    )
    hops = tuple(HopSpec(stage=stage, how=SamplingSpec(num_steps=3)) for stage in ("base", "upsampler"))
    bundle.save_cascade(
        directory / "cascade",
        CascadeSpec(name="tiny", hops=hops, context_length=16, image_size=64),
        {stage: directory / stage / "bundle" for stage in ("clip", "base", "upsampler")},
        card="tiny",
    )
    journal = Journal(directory / "base" / "metrics.jsonl")
    for step in (1, 2, 3):
        journal.log({"train/loss": 1 / step, "train/lr": 1e-3}, step)
    scores = {"all": 0.5, "one_object": 0.75, "n": 8, "colour": 0.9, "intervals": {"all": [0.2, 0.8]}}
    summary = {"oracle": scores, "seconds": {"base": 3.0, "total": 5.0}}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def prepared(directory: Path) -> None:
    """Twelve pairs of the embedded world, as `ddiff data prepare` leaves them."""
    (tar,) = write_shards(ShapesSpec(pairs=12, image_size=64), directory / "data" / "raw")
    data = directory / "data" / "prepared"
    data.mkdir(parents=True)
    spec = PairsSpec(shards=(str(tar),), destination=str(data), sizes=(16, 64), context_length=16)
    write_parts(data, [tar], spec)


def write_parts(data: Path, tars: list[str], spec: PairsSpec) -> None:
    """Tars as a preparation leaves them, without its Ray."""
    home, parts = Home.of(data), []
    for number, tar in enumerate(tars):
        *_, (_, _, part) = write_part(home, number, tar, spec)
        assert part is not None
        parts.append(part)
    home.drop(UNFINISHED)
    sealed.seal(data, {part.file: part.sha256 for part in parts}, totals(parts))


def saved(directory: Path, name: str, spec: StageSpec, parents: dict[str, Path]) -> Path:
    """A stage with its first, random weights, as a bundle."""
    torch.manual_seed(0)
    known = {role: bundle.load(path) for role, path in parents.items()}
    stage = build_stage(spec, {role: Trained(*found.trained) for role, found in known.items()})
    digests = {role: found.digest for role, found in known.items()}
    path = directory / name / "bundle"
    path.parent.mkdir(parents=True)
    bundle.save(path, spec, stage.model.state_dict(), parents=digests, facts={"step": 0})
    return path
