"""Initial weights of a stage from another model: what must be equal; weights of new inputs start at zero.

Names and shapes of weights do not show how many heads an attention has, nor what the inputs and outputs of a
network mean; so the specs are compared.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dd_core.layouts.clip import words_moves
from dd_core.layouts.moves import inward
from dd_core.layouts.published import Process, published
from dd_core.nets.clip import ClipNetSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.prior import CausalPriorSpec
from dd_core.nets.text import CaptionedSpec, TextSpec, UnclipSpec
from dd_core.schedules import LogNormalSpec, ScheduleSpec
from dd_core.spec import Spec
from dd_core.stage import Trained
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import ClipSpec
from dd_core.stages.draft import DraftSpec
from dd_core.stages.network import NetworkSpec
from dd_core.text import END

FREE = ("image_channels", "in_channels", "out_channels", "dropout")
"""Fields of a network that the shapes of weights show, or that no weight depends on."""
AS_READ = ("states", "pads_with", "quick_gelu", "text_layers")
"""Fields of a CLIP that reads captions for a network, which the width of its states does not show."""
READ_OTHERWISE = ("ldm-text256", "ldm-cin256")
"""Published networks that are told states of something other than a CLIP."""
BETAS = {"linear": "linear", "cosine": "cosine", "sqrt_linear": "scaled_linear"}
"""Names of the schedules of published networks -> ours."""


def begun(
    spec: ChainSpec, start: Trained, now: Mapping[str, Tensor], clip: ClipNetSpec | None = None
) -> dict[str, Tensor]:
    """Initial weights of a chain that has at least the image inputs of the other model.

    Args:
        spec: The chain.
        start: The other model: a chain, or a published network; or a CLIP, whose text tower the transformer
            of a chain that reads captions itself begins with.
        now: The state to be filled.
        clip: The CLIP that reads captions for the chain, if it does not read them itself.

    Raises:
        ValueError: The other model is another network, has other inputs or outputs, was told CLIP features
            that are not unit vectors or captions read in another way, or takes holes in other channels.
    """
    if isinstance(start.spec, ClipSpec) and isinstance(spec.net, CaptionedSpec):
        words = words_of(spec.net.text, start.spec.net, start.weights)
        return dict(now) | {f"network.text.{name}": weight for name, weight in words.items()}
    refuse_features(spec.kind, start)
    refuse_holes(spec, start)
    mine, theirs = asked_of(spec), asked_of(start.spec)
    if "enlarged_by" not in theirs:  # it enlarged nothing, and weights for what it was not told begin at zero
        mine.pop("enlarged_by", None)
    refuse_other(spec.kind, mine, theirs)
    refuse_readers(spec.kind, start, clip)
    return widened(start, now, spec.channels / (spec.channels + spec.told_channels))


def words_of(text: TextSpec, clip: ClipNetSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a text transformer from the text tower of a CLIP, which knows the words already.

    The transformer has a vector for padding at each place, a CLIP has none.  Each begins as what a CLIP is
    given if the token END stands there, the token's vector plus the place's: at END a CLIP has learned to sum
    the caption up.

    Raises:
        ValueError: The two differ in size or activation; the field is named, with both values.
    """
    if clip.quick_gelu:
        raise ValueError(
            "chain: the text tower of the parent 'start' computes quick GELU, net.text computes GELU; "
            "leave start out"
        )
    heads = clip.text_heads or clip.text_width // clip.head_width
    for name, mine, theirs in (
        ("width", text.width, clip.text_width),
        ("layers", text.layers, clip.text_layers),
        ("heads", text.heads, heads),
        ("context_length", text.context_length, clip.context_length),
        ("vocab_size", text.vocab_size, clip.vocab_size),
    ):
        if mine != theirs:
            raise ValueError(
                f"chain: net.text.{name} is {mine}, the text tower of the parent 'start' has {theirs}; "
                "make them equal, or leave start out"
            )
    moves = list(words_moves(text.layers))
    named = {name for move in moves for name in move.theirs}
    found = inward({name: weight for name, weight in weights.items() if name in named}, moves)
    return found | {"padding": found["tokens.weight"][END] + found["places"]}


def refuse_features(kind: str, start: Trained) -> None:
    """Refuse the published networks of unCLIP, Karlo's: they are told CLIP's features without normalisation.

    Here embeddings are unit vectors, stored ones too: a decoder would be told image and caption embeddings of
    another length, and a prior, which whitens by mean and deviation of the features, nearly the same values
    for all images.

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
    """Refuse published weights trained on caption states that this stage's CLIP does not give.

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
    """Refuse weights whose input channels match in number, but not in meaning.

    Raises:
        ValueError: They take a hole in other channels, or in another form, than this network does.
    """
    match start.spec:
        case ChainSpec() as other if spec.inpaints and other.inpaints and other.factor < spec.factor:
            raise ValueError("chain: the parent 'start' fills holes and enlarges nothing; take one that does")
        case ChainSpec() as other if spec.inpaints and other.inpaints and other.mask_of != spec.mask_of:
            raise ValueError(
                f"chain: mask_of is {other.mask_of} in the parent 'start' and {spec.mask_of} here; make them "
                "equal, or start from the same model without holes"
            )
        case NetworkSpec(net=PlainSpec() as net) if spec.inpaints and spec.latent_channels:
            if net.unet.image_channels and spec.mask_of != "hole":
                raise ValueError(
                    f"chain: {start.spec.source} hears the mask before the picture, 1 in the hole; set "
                    "mask_of: hole, or start from the same model without holes"
                )
        case _:
            pass


def refuse_other(kind: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse weights that fit in shape, but whose network computes or predicts something else.

    Args:
        kind: Of the stage that is to start from them.
        mine: Its fields, from `asked`.
        theirs: Those of the other model; empty if that cannot be a start.

    Raises:
        ValueError: They differ; the field is named, with both values.
    """
    if not theirs:
        raise ValueError(
            f"{kind}: the parent 'start' is neither a {kind} nor a published network of one; name another"
        )
    known = [name for name in mine if name.startswith("net.") or "told" in theirs]
    for name in known:
        if (other := theirs.get(name)) != mine[name]:
            what = "has another network" if name.startswith("net.") else "was trained otherwise"
            raise ValueError(
                f"{kind}: the parent 'start' {what}: {name} is {other!r} there and {mine[name]!r} here; "
                "make them equal, or leave start out"
            )


def begin_as(model: nn.Module, spec: Any, start: Trained) -> None:
    """Begin a stage with the weights of another training of it, such as one on other data.

    Args:
        model: Of the stage; its weights are replaced.
        spec: Of the stage.
        start: The other training.

    Raises:
        ValueError: The other is of another kind, has another network, or predicts or is told something else.
    """
    alike = type(start.spec) is type(spec)
    refuse_other(spec.kind, fields_of(spec), fields_of(start.spec) if alike else {})
    try:
        model.load_state_dict(start.weights)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{spec.kind}: the parent 'start' has other weights: {why:.200}") from None


def fields_of(spec: Any) -> dict[str, Any]:
    """The fields of a stage's network, and what it predicts and is told, as `refuse_other` compares them."""
    own = {"embedding_width", "width", "layers"}  # a draft's
    fields = spec.model_dump(include=own) if isinstance(spec, DraftSpec) else spec.net.model_dump()
    found = {f"net.{name}": value for name, value in fields.items()}
    match spec.kind:
        case "base":
            return found | {"told": "log sigma", "predicts": spec.predicts}
        case "noised_classifier":
            return found | told_level(spec.net, spec.schedule or LogNormalSpec(), rescaled=False)
        case _:
            return found


def asked_of(spec: Spec) -> dict[str, Any]:
    """`asked` for a chain or a published network, the network's fields alone if its process is not known."""
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
    """How a published UNet's smaller picture is enlarged: 3 channels, after 4 of a hole if there is one."""
    told = spec.net.unet.image_channels if isinstance(spec.net, PlainSpec | CaptionedSpec) else 0
    by = "bicubic" if spec.source.startswith("karlo-sr") else "bilinear"
    return {"enlarged_by": by} if told in {3, 7} else {}


def asked(
    net: Spec, levels: ScheduleSpec | LogNormalSpec, predicts: str, *, rescaled: bool = False
) -> dict[str, Any]:
    """Fields to compare: those of the network, what it predicts, and how it is told the noise level."""
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
    """Fields of a network that weight shapes do not show; `heads`, if set, overrides `head_width`."""
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
    """Initial weights from another model; input channels that it lacks get zeros, so outputs are the same.

    Args:
        start: The other model.
        now: The state to be filled.
        of_x: Share of the input channels that are those of x, the first ones.  Channels that the other model
            lacks are inserted right after them, where those of a hole are; its other inputs stay at the end.

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
