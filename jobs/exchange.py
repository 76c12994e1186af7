"""`ddiff import` and `ddiff export`: published weights to our bundles, and these to folders of diffusers."""

import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dd_core import bundle, sealed
from dd_core.layouts import (
    clip,
    diffusers_autoencoder,
    diffusers_config,
    diffusers_scheduler,
    diffusers_unet,
    importing,
)
from dd_core.layouts.files import weights_in, weights_in_folder
from dd_core.layouts.moves import LayoutError, fitted, inward, outward
from dd_core.layouts.published import AUTOENCODERS, published
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.text import CaptionedSpec
from dd_core.nets.unet import UNet
from dd_core.spec import Spec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.network import NetworkSpec
from dd_core.vocabulary import read_vocabulary
from jobs.recipes import glide

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIPS = ("openai-clip", "open-clip")
GLIDE = ("glide-base", "glide-upsample")
"""What source glide is made of."""
IMAGE_SIDE = 256
"""What published autoencoders were trained at, in pixels."""
GLIDE_CARD = """# GLIDE

Published weights of Nichol et al. 2022 (arXiv:2112.10741), filtered: imported, not trained here.  Captions
are read by the vocabulary beside the weights.  Sampled as published: 100 ancestral steps with guidance 3,
then 27 of DDIM without.
"""
Facts = dict[str, Any]


def import_weights(
    source: str,
    paths: Sequence[Path],
    out: Path,
    *,
    averaged: bool,
    tokenizer: tuple[Path, Path] | None = None,
    scale: float | None = None,
) -> Facts:
    """Write the bundle of a published network, or one for each network in its file.

    Args:
        source: Which it is: a name of `sources()`; no file says so itself.
        paths: Its files; for diffusers the folder of one component.
        out: Where the bundle goes; UNet and autoencoder of one file go to `unet` and `autoencoder` in it.
        averaged: Take averaged weights where a file holds both.
        tokenizer: Of glide, which becomes a cascade: its encoder.json and vocab.bpe.
        scale: Of an autoencoder that was published by itself: what its latents are multiplied by, so that
            their deviation is one, where its file does not say it; with a codebook 1 unless it is given.

    Raises:
        ValueError: The source is unknown, or a file is not laid out like it; the key is named.
        FileNotFoundError: There is no such file.
    """
    if source == "glide":
        return import_glide(paths, out, tokenizer)
    if tokenizer is not None:
        raise ValueError("--tokenizer is for source glide, which becomes a cascade that paints; leave it out")
    if scale is not None and source not in AUTOENCODERS:
        raise ValueError("--scale is for autoencoders that come by themselves (ldm-kl-f8); leave it out")
    name, _, model = source.partition(":")
    if source == "diffusers":
        return {"bundles": import_folder(the_only(paths, source), out)}
    if name in CLIPS and model:
        net = clip.net_of(model)
        net = net.but(quick_gelu=True) if name == "openai-clip" else net
        weights = clip.clip_weights(net, weights_in(the_only(paths, source)))
        return {"bundles": [written(out, ClipSpec(net=net), weights, source)]}
    if source in AUTOENCODERS:
        net_spec = AUTOENCODERS[source]
        weights = weights_in(the_only(paths, source))
        assumed = 1.0 if net_spec.codes else None
        found = importing.autoencoder(net_spec, weights, scale=scale or assumed)
        return {"bundles": [written(out, stage_of(net_spec), found, source)]}
    return import_network(source, paths, out, averaged=averaged)


def import_network(source: str, paths: Sequence[Path], out: Path, *, averaged: bool) -> Facts:
    """Write the bundle of a published network, and that of the autoencoder in its file."""
    if source not in (known := published()):
        close = difflib.get_close_matches(source, sources(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sources())}"
        raise ValueError(f"there is no source {source!r}; {hint}")
    found = importing.imported(known[source], [weights_in(path) for path in paths], averaged=averaged)
    spec = NetworkSpec(source=source, net=known[source].net, process=known[source].process)
    if found.autoencoder is None or known[source].autoencoder is None:
        bundles = [written(out, spec, found.weights, source, left=found.left)]
    else:
        first = stage_of(known[source].autoencoder)
        bundles = [
            written(out / "unet", spec, found.weights, source, left=found.left, averaged=found.averaged)
        ]
        bundles.append(written(out / "autoencoder", first, found.autoencoder, source))
    return {"bundles": bundles, "not taken": found.left or {}}


def sources() -> list[str]:
    """What can be declared."""
    return ["diffusers", "glide", *(f"{name}:MODEL" for name in CLIPS), *AUTOENCODERS, *published()]


def import_glide(paths: Sequence[Path], out: Path, tokenizer: tuple[Path, Path] | None) -> Facts:
    """Write the cascade of GLIDE: base and upsampler, sampled as published, with the vocabulary of both.

    Args:
        paths: Base and upsampler, in this order; those for inpainting are other networks.
        out: Where the cascade goes.
        tokenizer: encoder.json and vocab.bpe.

    Raises:
        ValueError: A file is missing or not what it should be; it is named.
        FileNotFoundError: There is no such file.
    """
    if tokenizer is None or len(paths) != len(GLIDE):
        raise ValueError(
            "glide is two files of weights, base and upsampler, and reads by a vocabulary of its own: "
            "ddiff import glide BASE UPSAMPLE --tokenizer ENCODER.JSON VOCAB.BPE"
        )
    if out.exists():
        raise ValueError(f"{out} exists; name another --out")
    vocabulary, whole, known = read_vocabulary(*tokenizer), glide.paper(), published()
    specs = {hop.stage: whole.stage(hop.stage).stage for hop in whole.cascade.hops}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        stages: dict[str, Path] = {}
        for (name, spec), source, path in zip(specs.items(), GLIDE, paths, strict=True):
            assert isinstance(spec, ChainSpec)
            assert isinstance(spec.net, CaptionedSpec)
            if spec.net.text.vocab_size != len(vocabulary.ids):
                raise ValueError(
                    f"{tokenizer[0]}: {len(vocabulary.ids)} symbols, but {source} reads "
                    f"{spec.net.text.vocab_size}; it is the vocabulary of another model"
                )
            found = importing.imported(known[source], [weights_in(path)], averaged=False)
            weights = {f"network.{key}": weight for key, weight in found.weights.items()}
            stages[name], facts = Path(beside) / name, {"imported": source}
            bundle.save(stages[name], spec, weights, parents={}, facts=facts, vocabulary=vocabulary)
        digest = bundle.save_cascade(out, whole.cascade, stages, card=GLIDE_CARD)
    return {"cascade": str(out), "hops": list(specs), "digest": digest}


def the_only(paths: Sequence[Path], source: str) -> Path:
    """The one path of a source that has one."""
    if len(paths) != 1:
        raise ValueError(f"{source} is one path, not {len(paths)}")
    return paths[0]


def stage_of(net: AutoencoderNetSpec | None) -> AutoencoderSpec:
    """An autoencoder as a stage of ours."""
    assert net is not None
    return AutoencoderSpec(net=net, image_size=IMAGE_SIDE, crop=IMAGE_SIDE, perceptual="none")


def written(directory: Path, spec: Spec, weights: Mapping[str, Tensor], source: str, **facts: Any) -> Facts:
    """Save a bundle and say what was saved."""
    if directory.exists():
        raise ValueError(f"{directory} exists; name another --out")
    count = sum(weight.numel() for weight in weights.values())
    digest = bundle.save(directory, spec, weights, parents={}, facts={"imported": source, **facts})
    return {"path": str(directory), "kind": spec.model_dump()["kind"], "weights": count, "digest": digest}


def import_folder(folder: Path, out: Path) -> list[Facts]:
    """The bundle of one component of a pipeline of diffusers."""
    config = json_in(folder / "config.json")
    state = weights_in_folder(folder, WEIGHTS)
    if config.get("_class_name") in ("AutoencoderKL", "VQModel"):
        net = diffusers_autoencoder.spec_of(config)
        with torch.device("meta"):
            first = Autoencoder(net)
        weights = fitted(first, inward(state, diffusers_autoencoder.autoencoder_moves(first)))
        weights |= importing.scaled(config.get("scaling_factor", 0.18215))
        return [written(out, stage_of(net), weights, "diffusers")]
    spec = diffusers_config.spec_of(config)
    with torch.device("meta"):
        unet = UNet(spec.unet, in_channels=spec.in_channels, out_channels=spec.out_channels)
    linear = bool(config.get("use_linear_projection", False))
    weights = fitted(unet, inward(state, diffusers_unet.unet_moves(unet, linear=linear)))
    beside = folder.parent / "scheduler" / "scheduler_config.json"
    process = None
    if beside.is_file():
        process = diffusers_scheduler.process_of(
            json_in(beside),
            image_size=config.get("sample_size") or 64,
            learned_variance=spec.out_channels == 2 * spec.in_channels,
        )
    return [written(out, NetworkSpec(source="diffusers", net=spec, process=process), weights, "diffusers")]


def json_in(path: Path) -> Facts:
    """A file of JSON."""
    if not path.is_file():
        raise FileNotFoundError(2, "it is no folder of diffusers", str(path))
    try:
        content: Facts = json.loads(path.read_bytes())
    except ValueError as error:
        raise LayoutError(f"{path} is damaged: {error}") from None
    return content


def export_diffusers(directory: Path, out: Path) -> Facts:
    """Write a bundle as components of a pipeline of diffusers: `unet` and `scheduler`, or `vae`.

    Raises:
        sealed.SealError: The bundle is damaged.
        ValueError: There is nothing in diffusers that computes the same.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name another --out")
    found = bundle.load(directory)
    match found.trained.spec:
        case NetworkSpec(net=PlainSpec()) as spec:
            return export_unet(spec, found.trained.weights, out)
        case AutoencoderSpec() as spec:
            net = Autoencoder(spec.net)
            net.load_state_dict(found.trained.weights)
            config = diffusers_autoencoder.config_of(spec.net, scale=net.scale().item())
            weights = {
                name: t for name, t in found.trained.weights.items() if name not in ("moments", "observed")
            }
            moves = diffusers_autoencoder.autoencoder_moves(net)
            return component(out / "vae", config, outward(weights, moves))
        case other:
            raise ValueError(
                f"{directory}: diffusers has nothing that computes what a {type(other).__name__} does; "
                "UNets that were imported and autoencoders can be exported"
            )


def export_unet(spec: NetworkSpec, weights: Mapping[str, Tensor], out: Path) -> Facts:
    """A UNet, and beside it how it is asked."""
    assert isinstance(spec.net, PlainSpec)
    size = spec.process.image_size if spec.process else 64
    config = diffusers_config.config_of(spec.net, image_size=size)
    with torch.device("meta"):
        net = UNet(spec.net.unet, in_channels=spec.net.in_channels, out_channels=spec.net.out_channels)
    facts = component(out / "unet", config, outward(weights, diffusers_unet.unet_moves(net, linear=True)))
    if spec.process and spec.process.schedule != "karras":
        (out / "scheduler").mkdir()
        text = json.dumps(diffusers_scheduler.config_of(spec.process), indent=2)
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
