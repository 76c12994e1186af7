"""First weights of a stage from another model: what must be alike, and what is new begins at zero.

Names and shapes of weights do not tell how many heads an attention has, nor what a network was told and
asked; so the specs are compared.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dd_core.layouts.published import Process, published
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.prior import CausalPriorSpec
from dd_core.nets.text import CaptionedSpec, UnclipSpec
from dd_core.schedules import LogNormalSpec, ScheduleSpec
from dd_core.spec import Spec
from dd_core.stage import Trained
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.network import NetworkSpec

FREE = ("image_channels", "in_channels", "out_channels", "dropout")
"""Of a network: what the shapes of weights say, or no weight depends on."""
AS_READ = ("states", "pads_with", "quick_gelu", "text_layers")
"""Of a CLIP that tells a network captions: what the width of its states does not show."""
READ_OTHERWISE = ("ldm-text256", "ldm-cin256")
"""Published networks that are told the states of something else."""
BETAS = {"linear": "linear", "cosine": "cosine", "sqrt_linear": "scaled_linear"}
"""Names of the schedules of published networks -> ours."""


def begun(
    spec: ChainSpec, start: Trained, now: Mapping[str, Tensor], clip: ClipNetSpec | None = None
) -> dict[str, Tensor]:
    """First weights of a chain, told no less of the picture than the other model was.

    Args:
        spec: The chain.
        start: The other model: a chain, or a published network.
        now: The state that is begun.
        clip: Who reads captions for the chain, if it reads none itself.

    Raises:
        ValueError: It is another network, was told or asked otherwise, was told features of CLIP that are no
            unit vectors or captions that were read otherwise, or hears of holes elsewhere.
    """
    refuse_features(spec.kind, start)
    refuse_holes(spec, start)
    mine, theirs = asked_of(spec), asked_of(start.spec)
    if "enlarged_by" not in theirs:  # it enlarged nothing, and weights for what it was not told begin at zero
        mine.pop("enlarged_by", None)
    refuse_other(spec.kind, mine, theirs)
    refuse_readers(spec.kind, start, clip)
    return widened(start, now, spec.channels / (spec.channels + spec.told_channels))


def refuse_features(kind: str, start: Trained) -> None:
    """Published networks of unCLIP are Karlo's, which hear CLIP's features as its towers project them.

    Here embeddings are unit vectors, stored ones too: a decoder would be told image and caption at another
    length, and a prior, less the mean of the others and over their deviation, nearly the same for all images.

    Raises:
        ValueError: The start is one of them.
    """
    match start.spec:
        case NetworkSpec(source=source, net=CausalPriorSpec() | UnclipSpec()):
            raise ValueError(
                f"{kind}: the parent 'start' is {source}, which was trained on CLIP's features at their own "
                "length and would be told unit vectors; leave start out and train it anew"
            )
        case _:
            pass


def refuse_readers(kind: str, start: Trained, clip: ClipNetSpec | None) -> None:
    """Published weights that were told captions in states that this stage's CLIP does not say.

    Raises:
        ValueError: The start is one of them; the field of the CLIP is named, with both values.
    """
    source = start.spec.source if isinstance(start.spec, NetworkSpec) else start.source
    reader = known[source].reader if source in (known := published()) else None
    if source in READ_OTHERWISE:
        raise ValueError(
            f"{kind}: the parent 'start' is {source}, which was told what no CLIP says; leave start out"
        )
    for name in AS_READ if reader else ():
        mine, theirs = getattr(clip, name, None), getattr(reader, name)
        if mine != theirs:
            raise ValueError(
                f"{kind}: the parent 'start' is {source}, for which captions were read otherwise: net.{name} "
                f"of its CLIP is {theirs!r} and {mine!r} here; make them equal, or leave start out"
            )


def refuse_holes(spec: ChainSpec, start: Trained) -> None:
    """Weights whose input fits in number, and not in what it means.

    Raises:
        ValueError: They hear of a hole elsewhere, or otherwise, than this network does.
    """
    match start.spec:
        case ChainSpec() as other if spec.inpaints and other.inpaints and other.factor < spec.factor:
            raise ValueError("chain: the parent 'start' fills holes and enlarges nothing; take one that does")
        case NetworkSpec(net=PlainSpec() as net) if spec.inpaints and spec.latent_channels:
            if net.unet.image_channels:
                raise ValueError(
                    f"chain: {start.spec.source} hears the mask before the picture, 1 in the hole, and this "
                    "network the other way round; start from the same model without holes"
                )
        case _:
            pass


def refuse_other(kind: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Weights that fit in shape, of a network that computes or was asked something else.

    Args:
        kind: Of the stage that begins.
        mine: Its network and how it is asked, as `asked` says.
        theirs: The same of the other model; empty if it can be no start.

    Raises:
        ValueError: They differ; the field is named, with both values.
    """
    if not theirs:
        raise ValueError(
            f"{kind}: the parent 'start' is neither a {kind} nor a published network of one; name another"
        )
    known = [name for name in mine if name.startswith("net.") or "predicts" in theirs]
    for name in known:
        if (other := theirs.get(name)) != mine[name]:
            what = "has another network" if name.startswith("net.") else "was trained otherwise"
            raise ValueError(
                f"{kind}: the parent 'start' {what}: {name} is {other!r} there and {mine[name]!r} here; "
                "make them equal, or leave start out"
            )


def asked_of(spec: Spec) -> dict[str, Any]:
    """`asked` of a chain or a published network, of which a source may not say more than the network is."""
    match spec:
        case ChainSpec():
            found = asked(spec.net, spec.schedule, spec.predicts, rescaled=spec.rescaled_time)
            return found | ({"enlarged_by": spec.enlarged_by} if spec.factor > 1 else {})
        case NetworkSpec(process=Process() as process):
            found = asked(spec.net, levels_of(process), process.predicts, rescaled=process.rescaled_time)
            return found | enlarged(spec)
        case NetworkSpec():
            return parts("net", spec.net)
        case _:
            return {}


def enlarged(spec: NetworkSpec) -> dict[str, Any]:
    """How the smaller picture is enlarged that a published UNet is told, after four channels of a hole."""
    told = spec.net.unet.image_channels if isinstance(spec.net, PlainSpec | CaptionedSpec) else 0
    by = "bicubic" if spec.source.startswith("karlo-sr") else "bilinear"
    return {"enlarged_by": by} if told in {3, 7} else {}


def asked(
    net: Spec, levels: ScheduleSpec | LogNormalSpec, predicts: str, *, rescaled: bool = False
) -> dict[str, Any]:
    """A network field by field, what it answers, and how it is told the noise level."""
    return parts("net", net) | {"predicts": predicts} | told_level(net, levels, rescaled=rescaled)


def levels_of(process: Process) -> ScheduleSpec | LogNormalSpec:
    """The noise levels of a published network."""
    if process.schedule == "karras":
        return LogNormalSpec()
    first, last = process.beta_range
    return ScheduleSpec.model_validate(
        {
            "betas": BETAS[process.schedule],
            "num_timesteps": process.timesteps,
            "beta_start": first,
            "beta_end": last,
            "last": process.last,
        }
    )


def told_level(net: Spec, levels: ScheduleSpec | LogNormalSpec, *, rescaled: bool) -> dict[str, Any]:
    """How a network is told the noise level; one that is told log sigma may go on at other levels."""
    unet = getattr(net, "unet", net)
    if getattr(unet, "level_scale", None) != 1:
        return {"told": "log sigma"}
    if isinstance(levels, LogNormalSpec):
        return {"told": "250 log sigma"}
    unused = {"last"} | ({"beta_start", "beta_end"} if levels.betas == "cosine" else set())
    schedule = {f"schedule.{name}": value for name, value in levels.model_dump(exclude=unused).items()}
    return {"told": "timesteps", **schedule, "rescaled_time": rescaled and levels.num_timesteps != 1000}


def parts(prefix: str, net: Spec) -> dict[str, Any]:
    """What of a network no shape of its weights shows, field by field; heads decide over their width."""
    found: dict[str, Any] = {}
    for name, value in net:
        if isinstance(value, Spec):
            found |= parts(f"{prefix}.{name}", value)
        elif name not in FREE:
            found[f"{prefix}.{name}"] = value
    if found.get(f"{prefix}.heads"):
        found.pop(f"{prefix}.head_width", None)
    return found


def widened(start: Trained, now: Mapping[str, Tensor], of_x: float = 1.0) -> dict[str, Tensor]:
    """First weights from another model; input channels that it lacked are zero: it answers as before.

    Args:
        start: The other model.
        now: The state that is begun.
        of_x: Share of the input channels, the first ones, that are those of x.  What the other model lacks
            comes right after them, as what is told of a hole does; what that is told of stays at the end.

    Raises:
        ValueError: A weight is missing, or differs in more than input channels.
    """
    published = isinstance(start.spec, NetworkSpec)
    weights = {f"network.{name}" if published else name: value for name, value in start.weights.items()}
    if odd := sorted(weights.keys() ^ now.keys()):
        raise ValueError(f"chain: the parent 'start' has another network: {odd[0]} is in one of them only")
    return {name: wider(name, weights[name], value, of_x) for name, value in now.items()}


def wider(name: str, weight: Tensor, like: Tensor, of_x: float) -> Tensor:
    """A weight with zeros for the input channels that it lacked."""
    missing = like.shape[1] - weight.shape[1] if like.ndim == 4 == weight.ndim else 0
    if weight.shape != like.shape and (
        missing < 0 or weight.shape[0] != like.shape[0] or weight.shape[2:] != like.shape[2:]
    ):
        raise ValueError(
            f"chain: {name} of the parent 'start' is {tuple(weight.shape)}, here {tuple(like.shape)}; "
            "only input channels may be added"
        )
    if not missing:
        return weight
    own = round(like.shape[1] * of_x)
    new = weight.new_zeros(weight.shape[0], missing, *weight.shape[2:])
    return torch.cat([weight[:, :own], new, weight[:, own:]], dim=1)
