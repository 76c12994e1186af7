"""`ddiff import`: published weights become bundles, or a cascade where they can paint by themselves."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from dd_core.layouts import clip, importing
from dd_core.layouts.files import weights_in
from dd_core.layouts.published import AUTOENCODERS, Published, published
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.text import CaptionedSpec
from dd_core.stages import published as published_stages
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.network import NetworkSpec
from dd_core.vocabulary import read_vocabulary
from jobs.diffusers_folders import import_folder
from jobs.imported import Facts, Part, assembled, inner, stage_of, written
from jobs.published_cascades import CLASSIFIERS, UPSAMPLERS, card_of, cascade_of, filling, led_by_clip
from jobs.recipes import glide

CLIPS = ("openai-clip", "open-clip")
GLIDE = ("glide-base", "glide-upsample")
"""The networks of source glide, in order."""
CASCADES = ("glide", "glide-inpaint")
"""Sources of several files that become a cascade, with a tokenizer of their own."""
GLIDE_CARD = """# GLIDE

Published weights of Nichol et al. 2022 (arXiv:2112.10741), filtered: imported, not trained here.  Captions
are read by the vocabulary beside the weights.  Sampled as published: see cascade.json.
"""
LED_CARD = """
The base is led to the caption by the gradient of the noised CLIP, weight 3, with no classifier-free guidance;
`--guidance` of `ddiff sample` is that weight.
"""


class More(NamedTuple):
    """What some sources need or take besides their files."""

    tokenizer: tuple[Path, Path] | None = None
    """Of glide, which becomes a cascade: its encoder.json and vocab.bpe."""
    scale: float | None = None
    """Of an autoencoder that was published by itself: the factor that brings its latents to a standard
    deviation of one, where its file does not say it; with a codebook 1 unless it is given."""
    classifier: Path | None = None
    """Of a base of ADM: the file of the classifier that is to lead it."""
    upsampler: Path | None = None
    """Of a class-conditional base at 64 or 128 px: the file of the upsampler of its pictures."""
    clip: tuple[Path, Path] | None = None
    """Of glide: the files of the noised CLIP that is to lead it, those of its image and its text tower."""
    reads_for: str | None = None
    """Of a CLIP: it reads captions as the text encoder of this network, such as sd1; None: as CLIP does."""


NOTHING_MORE = More()


def import_weights(
    source: str,
    paths: Sequence[Path],
    out: Path,
    *,
    averaged: bool,
    more: More = NOTHING_MORE,
) -> Facts:
    """Write a bundle of each network in published files, or a cascade if they can paint by themselves.

    Args:
        source: What the files are: a name of `sources()`; they do not say so themselves.
        paths: Its files; for diffusers the folder of a pipeline or of one component.
        out: Where the bundle goes; UNet and autoencoder of one file go to `unet` and `autoencoder` in it.
        averaged: Take averaged weights where a file holds both.
        more: What some sources need or take besides.

    Raises:
        ValueError: The source is unknown, or a file is not laid out like it; the key is named.
        FileNotFoundError: There is no such file.
    """
    refuse_more(source, more)
    if source in CASCADES:
        return import_glide(paths, out, more, inpaints=source == "glide-inpaint")
    name, _, model = source.partition(":")
    if source == "diffusers":
        return import_folder(the_only(paths, source), out)
    if name in CLIPS and model:
        net = clip.net_of(model)
        net = net.but(quick_gelu=True) if name == "openai-clip" else net
        net = net if more.reads_for is None else read_for(more.reads_for, net)
        weights = clip.clip_weights(net, weights_in(the_only(paths, source)))
        return {"bundles": [written(out, ClipSpec(net=net), weights, source)]}
    if source in AUTOENCODERS:
        net_spec = AUTOENCODERS[source]
        weights = weights_in(the_only(paths, source))
        assumed = 1.0 if net_spec.codes else None
        found = importing.autoencoder(net_spec, weights, scale=more.scale or assumed)
        return {"bundles": [written(out, stage_of(net_spec), found, source)]}
    return import_network(source, paths, out, averaged=averaged, beside=beside_of(source, more))


def refuse_more(source: str, more: More) -> None:
    """Raises ValueError if an option is not for this source; it names the sources that take it."""
    name = source.partition(":")[0]
    for option, known in {
        "tokenizer": CASCADES,
        "scale": AUTOENCODERS,
        "classifier": CLASSIFIERS,
        "upsampler": UPSAMPLERS,
        "clip": ("glide",),
        "reads_for": CLIPS,
    }.items():
        if getattr(more, option) is not None and name not in known:
            word = option.replace("_", "-")
            raise ValueError(f"--{word} is for {', '.join(known)}, not {source}; leave it out")


def read_for(source: str, net: ClipNetSpec) -> ClipNetSpec:
    """A CLIP that reads captions as the text encoder of a published network does.

    Raises:
        ValueError: That network has no CLIP as its text encoder, or another CLIP.
    """
    readers = {name: network.reader for name, network in published().items() if network.reader}
    reader = readers.get(source)
    if reader is None:
        raise ValueError(f"--reads-for {source}: there are {', '.join(readers)}; or leave it out")
    for field in ("text_width", "text_layers", "quick_gelu"):
        if (mine := getattr(net, field)) != (theirs := getattr(reader, field)):
            raise ValueError(
                f"--reads-for {source}: its CLIP has {field} {theirs}, this one {mine}; take "
                f"{'openai-clip:ViT-L-14' if source.startswith('sd1') else 'open-clip:ViT-H-14'}"
            )
    return net.but(states=reader.states, pads_with=reader.pads_with)


def beside_of(source: str, more: More) -> dict[str, tuple[str, Path]]:
    """What else goes into the cascade of a base: stage -> source and file."""
    found: dict[str, tuple[str, Path]] = {}
    if more.classifier is not None:
        found["classifier"] = CLASSIFIERS[source][0], more.classifier
    if more.upsampler is not None:
        found["upsampler"] = UPSAMPLERS[source], more.upsampler
    return found


def import_network(
    source: str,
    paths: Sequence[Path],
    out: Path,
    *,
    averaged: bool,
    beside: Mapping[str, tuple[str, Path]] = MappingProxyType({}),
) -> Facts:
    """Write a published network and the autoencoder in its file: a cascade of them if it paints by itself."""
    if source not in (known := published()):
        close = difflib.get_close_matches(source, sources(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sources())}"
        raise ValueError(f"there is no source {source!r}; {hint}")
    network, stage = known[source], published_stages.stage_of(known[source])
    found = importing.imported(network, [weights_in(path) for path in paths], averaged=averaged)
    left = {"not taken": found.left or {}}
    if isinstance(stage, ConsistencySpec) or (isinstance(stage, ChainSpec) and stage.factor == 1):
        return import_painter(source, stage, found, out, beside=beside) | left
    if stage is not None:
        return {"bundles": [written(out, stage, inner(found.weights), source, left=found.left)]} | left
    spec = NetworkSpec(source=source, net=network.net, process=network.process)
    if not (parents := known_parents(source, found)):
        return {"bundles": [written(out, spec, found.weights, source, left=found.left)]} | left
    facts = {"left": found.left, "averaged": found.averaged}
    bundles = [written(out / "unet", spec, found.weights, source, **facts)]
    bundles += [written(out / role, part.spec, part.weights, source) for role, part in parents.items()]
    return {"bundles": bundles} | left


def import_painter(
    source: str,
    stage: ChainSpec | ConsistencySpec,
    found: importing.Imported,
    out: Path,
    *,
    beside: Mapping[str, tuple[str, Path]],
) -> Facts:
    """Write the cascade of a network that paints from noise, given at most a class or captions (own CLIP)."""
    if out.exists():
        raise ValueError(f"{out} exists; name another --out")
    known, stands_on = published(), known_parents(source, found)
    specs = {name: published_stages.stage_of(known[other]) for name, (other, _) in beside.items()}
    enlarged = specs.get("upsampler")
    assert enlarged is None or isinstance(enlarged, ChainSpec)
    name, led = "unet" if stands_on else "base", "classifier" in beside
    cascade = cascade_of(source, stage, name=name, led=led, enlarged=enlarged)

    def parts() -> Iterator[tuple[str, Part]]:
        yield from stands_on.items()
        facts = {"left": found.left, "averaged": found.averaged}
        parents = {role: role for role in stands_on}
        yield name, Part(source, stage, inner(found.weights), parents, facts=facts)
        for role, (other, path) in beside.items():
            weights = importing.imported(known[other], [weights_in(path)], averaged=False).weights
            spec = specs[role]
            assert spec is not None
            yield role, Part(other, spec, inner(weights), {})

    return assembled(out, cascade, parts(), card=card_of(source, stage, led=led))


def known_parents(source: str, found: importing.Imported) -> dict[str, Part]:
    """Role -> stage: the autoencoder and the reader of captions that came in the file of a network."""
    network, parts = published()[source], dict[str, Part]()
    if found.autoencoder is not None:
        parts["autoencoder"] = Part(source, stage_of(network.autoencoder), found.autoencoder, {})
    if found.reader is not None and network.reader is not None:
        parts["clip"] = Part(source, ClipSpec(net=network.reader), found.reader, {})
    return parts


def sources() -> list[str]:
    """Every SOURCE of `ddiff import`."""
    return [
        "diffusers",
        *CASCADES,
        *(f"{name}:MODEL" for name in CLIPS),
        *AUTOENCODERS,
        *published(),
    ]


def import_glide(paths: Sequence[Path], out: Path, more: More, *, inpaints: bool = False) -> Facts:
    """Write the cascade of GLIDE: base and upsampler, sampled as published, with the vocabulary of both.

    Args:
        paths: Base and upsampler, in this order.
        out: Where the cascade goes.
        more: Their tokenizer, encoder.json and vocab.bpe; and a noised CLIP, if one is to lead the base.
        inpaints: The files are of the networks for inpainting, which are others.

    Raises:
        ValueError: A file is missing or not what it should be; it is named.
        FileNotFoundError: There is no such file.
    """
    tokenizer = more.tokenizer
    if tokenizer is None or len(paths) != len(GLIDE):
        raise ValueError(
            "glide is two files of weights, base and upsampler, and reads by a vocabulary of its own: "
            "ddiff import glide BASE UPSAMPLE --tokenizer ENCODER.JSON VOCAB.BPE"
        )
    if out.exists():
        raise ValueError(f"{out} exists; name another --out")
    vocabulary, whole, known = read_vocabulary(*tokenizer), glide.paper(), published()
    specs = {hop.stage: whole.stage(hop.stage).stage for hop in whole.cascade.hops}
    networks = [f"{name}-inpaint" if inpaints else name for name in GLIDE]

    def parts() -> Iterator[tuple[str, Part]]:
        if more.clip is not None:
            yield "noised_clip", noised_clip(known["glide-clip"], more.clip)
        for (name, spec), source, path in zip(specs.items(), networks, paths, strict=True):
            assert isinstance(spec, ChainSpec)
            assert isinstance(spec.net, CaptionedSpec)
            if spec.net.text.vocab_size != len(vocabulary.ids):
                raise ValueError(
                    f"{tokenizer[0]}: {len(vocabulary.ids)} symbols, but {source} reads "
                    f"{spec.net.text.vocab_size}; it is the vocabulary of another model"
                )
            filled = spec.but(net=known[source].net, inpaints=True) if inpaints else spec
            found = importing.imported(known[source], [weights_in(path)], averaged=False)
            yield name, Part(source, filled, inner(found.weights), {}, vocabulary)

    cascade = filling(whole.cascade) if inpaints else whole.cascade
    if more.clip is not None:
        return assembled(out, led_by_clip(cascade), parts(), card=GLIDE_CARD + LED_CARD)
    return assembled(out, cascade, parts(), card=GLIDE_CARD)


def noised_clip(source: Published, files: Sequence[Path]) -> Part:
    """GLIDE's noised CLIP, from the files of its image and its text tower."""
    found = importing.imported(source, [weights_in(path) for path in files], averaged=False)
    spec = NetworkSpec(source="glide-clip", net=source.net, process=source.process)
    return Part("glide-clip", spec, found.weights, {})


def the_only(paths: Sequence[Path], source: str) -> Path:
    """The one path of a source that has one."""
    if len(paths) != 1:
        raise ValueError(f"{source} is one path, not {len(paths)}")
    return paths[0]
