"""`ddiff import diffusers`: a component of a pipeline of diffusers becomes a bundle, a pipeline a cascade.

Source: the documentation of diffusers and transformers; what a config.json does not say has their defaults.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dd_core.layouts import (
    clip,
    diffusers_autoencoder,
    diffusers_config,
    diffusers_scheduler,
    diffusers_unet,
    importing,
)
from dd_core.layouts.files import SCHEDULER, WEIGHTS, weights_in_folder
from dd_core.layouts.moves import LayoutError, fitted, inward
from dd_core.layouts.published import Process, Published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNet
from dd_core.samplers import SamplingSpec
from dd_core.stages import published as published_stages
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.network import NetworkSpec
from jobs.imported import Facts, Part, assembled, inner, stage_of, written
from jobs.published_cascades import card_of, cascade_of

SOURCE = "diffusers"
INDEX = "model_index.json"
AUTOENCODERS = ("vae", "vqvae")
"""Under which a pipeline has its autoencoder."""
TAKEN = ("unet", "scheduler", *AUTOENCODERS, "text_encoder", "tokenizer")
READER = "CLIPTextModel"
"""Class of the text tower whose states are what a UNet hears."""
PASSED_OVER = ("safety_checker", "feature_extractor")
"""Components of a pipeline that paint nothing."""


class Component(NamedTuple):
    """A UNet: what it is, how it was trained if a scheduler says so, its weights."""

    net: PlainSpec
    process: Process | None
    scheduler: Facts
    """Its scheduler_config.json; empty if there is none."""
    weights: dict[str, Tensor]


def import_folder(folder: Path, out: Path) -> Facts:
    """Write the cascade of a pipeline, or the bundle of one of its components.

    Raises:
        ValueError: It has what ours has not; the component or the field is named.
        FileNotFoundError: A file is missing.
    """
    if (folder / INDEX).is_file():
        return import_pipeline(folder, out)
    config = json_in(folder / "config.json")
    if config.get("_class_name") in ("AutoencoderKL", "VQModel"):
        net, weights = autoencoder_in(folder)
        return {"bundles": [written(out, stage_of(net), weights, SOURCE)]}
    unet = unet_in(folder)
    spec = NetworkSpec(source=SOURCE, net=unet.net, process=unet.process)
    return {"bundles": [written(out, spec, unet.weights, SOURCE)]}


def import_pipeline(folder: Path, out: Path) -> Facts:
    """Write the cascade of a pipeline that paints with one UNet: of pixels, or of latents and captions."""
    if out.exists():
        raise ValueError(f"{out} exists; name another --out")
    there = components(folder)
    unet, parents = unet_in(folder / "unet"), dict[str, Part]()
    if unet.process is None:
        missing = str(folder / "scheduler" / SCHEDULER)
        raise FileNotFoundError(2, "a pipeline says there how it was trained", missing)
    first = next((name for name in AUTOENCODERS if name in there), None)
    latent = reader = None
    if first is not None:
        latent, weights = autoencoder_in(folder / first)
        parents["autoencoder"] = Part(SOURCE, stage_of(latent), weights, {})
    if "text_encoder" in there:
        reader, weights = reader_in(folder)
        parents["clip"] = Part(SOURCE, ClipSpec(net=reader), weights, {})
    known = Published(unet.net, "ldm", unet.process, latent, reader=reader)
    stage = published_stages.stage_of(known)
    if not isinstance(stage, ChainSpec | ConsistencySpec):
        raise LayoutError(
            f"{folder}: its UNet is told what no hop of ours tells it; import it by itself: {folder / 'unet'}"
        )

    def parts() -> Iterator[tuple[str, Part]]:
        yield from parents.items()
        yield "unet", Part(SOURCE, stage, inner(unet.weights), {role: role for role in parents})

    cascade, card = cascade_of(SOURCE, stage, name="unet"), card_of(SOURCE, stage, led=False)
    if latent is None:
        clips = diffusers_scheduler.clips(unet.scheduler)
        cascade = cascade.but(hops=tuple(hop.but(how=clipped(hop.how, clips)) for hop in cascade.hops))
    left = {"not taken": [name for name in PASSED_OVER if name in there]}
    return assembled(out, cascade, parts(), card=card) | left


def clipped(how: SamplingSpec, clips: bool) -> SamplingSpec:
    """How pixels are sampled in diffusers, whose DDIM clips the image alone, and not eps."""
    if not clips:
        return how.but(clip="none")
    return how.but(clip="image") if how.sampler == "ddim" else how


def components(folder: Path) -> dict[str, str]:
    """Name -> class of the components that a pipeline has.

    Raises:
        LayoutError: It has one that ours has not, or lacks one.
    """
    listed = json_in(folder / INDEX)
    pairs = {name: value for name, value in listed.items() if isinstance(value, list)}
    there = {name: str(value[-1]) for name, value in pairs.items() if value and value[-1] is not None}
    if odd := sorted(there.keys() - {*TAKEN, *PASSED_OVER}):
        raise LayoutError(
            f"{folder / INDEX}: ours has no {odd[0]} ({there[odd[0]]}); a pipeline may have "
            f"{', '.join(TAKEN)}; import its components one by one"
        )
    if "unet" not in there:
        raise LayoutError(f"{folder / INDEX}: it has no unet; import its components one by one")
    if (kind := there.get("text_encoder", READER)) != READER:
        raise LayoutError(f"{folder / INDEX}: text_encoder is a {kind}, ours reads captions by {READER}")
    return there


def autoencoder_in(folder: Path) -> tuple[AutoencoderNetSpec, dict[str, Tensor]]:
    """An autoencoder and its weights, the scale of its latents among them."""
    config = json_in(folder / "config.json")
    state = diffusers_unet.modern(weights_in_folder(folder, WEIGHTS))
    net = diffusers_autoencoder.spec_of(config)
    with torch.device("meta"):
        first = Autoencoder(net)
    weights = fitted(first, inward(state, diffusers_autoencoder.autoencoder_moves(first)))
    return net, weights | importing.scaled(config.get("scaling_factor", 0.18215))


def unet_in(folder: Path) -> Component:
    """A UNet and its weights."""
    config = json_in(folder / "config.json")
    state = diffusers_unet.modern(weights_in_folder(folder, WEIGHTS))
    spec = diffusers_config.spec_of(config)
    with torch.device("meta"):
        unet = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
    linear = bool(config.get("use_linear_projection", False))
    weights = fitted(unet, inward(state, diffusers_unet.unet_moves(unet, linear=linear)))
    process, scheduler = None, dict[str, Any]()
    beside = folder / SCHEDULER  # in the same folder where the UNet is the whole pipeline
    if not beside.is_file():
        beside = folder.parent / "scheduler" / SCHEDULER
    if beside.is_file():
        scheduler = json_in(beside)
        process = diffusers_scheduler.process_of(scheduler, image_size=config.get("sample_size") or 64)
        spec = diffusers_config.told_apart(spec, learned_variance=process.learned_variance)
    return Component(spec, process, scheduler, weights)


def reader_in(folder: Path) -> tuple[ClipNetSpec, dict[str, Tensor]]:
    """The text tower of a pipeline, as its tokenizer pads captions, and its weights."""
    where = folder / "text_encoder"
    spec = clip.reader_of(json_in(where / "config.json"), pad=pad_of(folder / "tokenizer"))
    return spec, clip.transformers_weights(spec, weights_in_folder(where, clip.READER_WEIGHTS))


def pad_of(tokenizer: Path) -> str:
    """The token that a tokenizer fills captions up with; that of transformers' CLIP where no file says it."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        said = json_in(tokenizer / name).get("pad_token") if (tokenizer / name).is_file() else None
        if said is not None:
            return str(said.get("content") if isinstance(said, dict) else said)
    return clip.END_TOKEN


def json_in(path: Path) -> Facts:
    """A file of JSON."""
    if not path.is_file():
        raise FileNotFoundError(2, "no diffusers folder here; nothing is downloaded", str(path))
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise LayoutError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise LayoutError(f"{path} is damaged: it holds a {type(content).__name__}, no fields")
    return content
