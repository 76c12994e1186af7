"""`ddiff export`: our bundles to folders of diffusers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dd_core import bundle, sealed
from dd_core.bundle import Bundle
from dd_core.layouts import diffusers_autoencoder, diffusers_config, diffusers_scheduler, diffusers_unet
from dd_core.layouts.files import WEIGHTS
from dd_core.layouts.moves import LayoutError, outward
from dd_core.nets.autoencoder import Autoencoder
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNet
from dd_core.schedules import LogNormalSpec
from dd_core.stages import published
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.network import NetworkSpec

Facts = dict[str, Any]
EXPORTED = "chains whose net is of kind unet, UNets that were imported and autoencoders can be exported"


def export_diffusers(directory: Path, out: Path) -> Facts:
    """Write a bundle as components of a pipeline of diffusers: `unet` and `scheduler`, or `vae`.

    Raises:
        sealed.SealError: The bundle is damaged.
        ValueError: There is nothing in diffusers that computes the same.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name another --out")
    found = bundle.load(directory)
    try:
        return exported(found, directory, out)
    except LayoutError as error:
        raise ValueError(f"{directory}: {error}") from None


def exported(found: Bundle, directory: Path, out: Path) -> Facts:
    """As `export_diffusers`.

    Raises:
        LayoutError, ValueError: There is nothing in diffusers that computes the same.
    """
    match found.trained.spec:
        case NetworkSpec(net=PlainSpec() as net, process=process):
            side = process.image_size if process else 64
            scheduler = None
            if process and process.schedule != "karras":
                scheduler = diffusers_scheduler.config_of(process)
            return export_unet(net, found.trained.weights, out, side=side, scheduler=scheduler)
        case ChainSpec(net=PlainSpec()) | ConsistencySpec(base=ChainSpec(net=PlainSpec())) as spec:
            return export_chain(spec, found, directory, out)
        case AutoencoderSpec() as spec:
            whole = Autoencoder(spec.net)
            whole.load_state_dict(found.trained.weights)
            config = diffusers_autoencoder.config_of(spec.net, scale=whole.scale().item())
            weights = {
                name: t for name, t in found.trained.weights.items() if name not in ("moments", "observed")
            }
            moves = diffusers_autoencoder.autoencoder_moves(whole)
            return component(out / "vae", config, outward(weights, moves))
        case ChainSpec(net=net) | ConsistencySpec(base=ChainSpec(net=net)):
            raise ValueError(f"{directory}: diffusers has no network of kind {net.kind}; {EXPORTED}")
        case other:
            kind = other.model_dump()["kind"]
            raise ValueError(f"{directory}: diffusers has nothing like a stage of kind {kind}; {EXPORTED}")


def export_chain(spec: ChainSpec | ConsistencySpec, found: Bundle, directory: Path, out: Path) -> Facts:
    """Write the UNet of a chain, which takes timesteps as diffusers gives them, and its schedule of betas."""
    chain = spec.base if isinstance(spec, ConsistencySpec) else spec
    assert isinstance(chain, ChainSpec)
    assert isinstance(chain.net, PlainSpec)
    if chain.inpaints and chain.mask_of == "known":
        raise ValueError(
            f"{directory}: it is told the picture before the mask, 1 where it is known, and diffusers has "
            "both the other way round; train with mask_of: hole, or export the chain that it started from"
        )
    weights = {name.removeprefix(published.PREFIX): t for name, t in found.trained.weights.items()}
    side = chain.image_size // factor_of(chain, found, directory)
    return export_unet(chain.net, weights, out, side=side, scheduler=scheduler_of(spec, chain))


def scheduler_of(spec: ChainSpec | ConsistencySpec, chain: ChainSpec) -> Facts | None:
    """The scheduler config for the network of a chain; None: diffusers has no such scheduler."""
    if chain.predicts == "consistency":
        return diffusers_scheduler.jumps_of(*spec.sigma_range)
    levels = chain.schedule
    if isinstance(spec, ConsistencySpec) or isinstance(levels, LogNormalSpec) or chain.predicts == "edm":
        return None
    clipped = {"clip_sample": not chain.latent_channels}
    return diffusers_scheduler.config_of(published.process_of(chain, levels)) | clipped


def factor_of(chain: ChainSpec, found: Bundle, directory: Path) -> int:
    """Pixels per element of x along a side, by the autoencoder beside the chain in its run or cascade.

    Raises:
        ValueError: The autoencoder is not there.
    """
    if not chain.latent_channels:
        return 1
    beside = (
        *directory.parent.glob(f"*/{sealed.MANIFEST}"),
        *directory.parent.glob(f"../*/bundle/{sealed.MANIFEST}"),
    )
    for path in beside:
        if bundle.manifest(path).digest == found.parents["autoencoder"]:
            spec = bundle.load(path.parent).trained.spec
            assert isinstance(spec, AutoencoderSpec)
            return spec.net.factor
    raise ValueError(
        f"{directory}: its autoencoder, which says the side of its latents, is not beside it; export it from "
        "its run or its cascade"
    )


def export_unet(
    spec: PlainSpec, weights: Mapping[str, Tensor], out: Path, *, side: int, scheduler: Facts | None
) -> Facts:
    """Write a UNet, and beside it its scheduler if there is one; if not, that is said."""
    config = diffusers_config.config_of(spec, image_size=side)
    with torch.device("meta"):
        net = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
    facts = component(out / "unet", config, outward(weights, diffusers_unet.unet_moves(net, linear=True)))
    if scheduler is None:
        facts["scheduler"] = "none, for diffusers has none with its levels and scaling; sample it by `ddiff`"
    else:
        (out / "scheduler").mkdir()
        text = json.dumps(scheduler, indent=2)
        (out / "scheduler" / "scheduler_config.json").write_text(text)
    return facts


def component(directory: Path, config: Facts, weights: Mapping[str, Tensor]) -> Facts:
    """One folder: its config and its weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(dict(weights), directory / WEIGHTS, metadata={"format": "pt"})
    return {
        "path": str(directory),
        "class": config["_class_name"],
        "sha256": sealed.sha256(directory / WEIGHTS),
    }
