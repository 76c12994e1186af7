"""CLIP, the contrastive image-text model: parent of half the other stages, judge of re-ranking."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from dd_core import images, losses, ranks
from dd_core.layouts.clip import net_of
from dd_core.layouts.unpickle import TORN
from dd_core.nets.captioner import Captioner
from dd_core.nets.clip import MOST_LOG_SCALE, Clip, ClipNetSpec
from dd_core.ranks import gathered
from dd_core.stage import ClipNeeds, LearnedSpec, Losses, PairBatch, Stage, Trained
from dd_core.towers import open_clip

UNREADABLE = (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, SafetensorError)
"""What reading a file raises that is cut, empty or no file of weights, such as a web page saved as one."""


class ClipSpec(LearnedSpec):
    """An image tower and a text tower, trained on the pairs or taken from elsewhere."""

    kind: Literal["clip"] = "clip"
    net: ClipNetSpec = ClipNetSpec()
    pretrained: str = ""
    """Weights to take instead of training: an open_clip name such as ViT-L-14/openai, or MODEL:FILE."""
    captioner_layers: int = Field(0, ge=0)
    """Of a captioner that trains the image embedding by writing the caption from it; 0: none, as in CLIP."""
    caption_weight: float = Field(2.0, ge=0)
    """Of the captioner's loss relative to the contrastive one; CoCa: 2."""

    @property
    def image_size(self) -> int:
        """Side of the prepared images that it trains on."""
        return self.net.image_size

    @property
    def tokens(self) -> Mapping[str, int]:
        """None where its weights come from elsewhere: then only its children read captions by it."""
        return {} if self.pretrained else {"net.context_length": self.net.context_length}

    @property
    def compares(self) -> bool:
        """True: a caption has to be found among those of the batch."""
        return True

    @property
    def gathers(self) -> bool:
        """True: among those of every worker."""
        return True

    @property
    def roles(self) -> tuple[str, ...]:
        """None where its weights come from elsewhere."""
        return () if self.pretrained else ("start",)

    @property
    def files(self) -> dict[str, str]:
        """The weights, if they come from a file; those that open_clip knows by name need none."""
        file = self.pretrained.partition(":")[2]
        return {"pretrained": file} if file else {}


class ClipStage(Stage):
    """Trains both towers so that captions are nearest to, and with a captioner follow from, their images."""

    model: Clip

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        refuse_text_alone(spec.net)
        self.spec = spec
        self.model = Clip(spec.net)
        self.captioner = captioner_of(spec)

    @torch.no_grad()
    def after_step(self) -> None:
        self.model.towers.logit_scale.clamp_(max=MOST_LOG_SCALE)

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        image = self.model.embed_image(images.to_unit(batch.image))
        caption = self.model.read_packed(batch.tokens)
        text = caption.embedding
        among = losses.Among(gathered(image), gathered(text), ranks.first(len(image)))
        same = losses.same_captions(batch.tokens, gathered(batch.tokens))
        loss = ranks.told(losses.info_nce(image, text, self.model.logit_scale(), same, among))
        hit = gathered(losses.found(image, among.text, same)).mean()
        if self.captioner is None:
            return Losses(loss, {"retrieval": hit})
        words = self.model.towers.token_embedding.weight
        states = caption.packing.unpack(caption.states)
        nats = self.captioner(image, states, batch.tokens[:, : states.shape[1]], words)
        per_word = nats.sum() / batch.tokens.argmax(1).sum()
        parts = {"retrieval": hit, "word_nats": per_word.detach()}
        return Losses(loss + self.spec.caption_weight * per_word, parts)


def captioner_of(spec: ClipSpec) -> Captioner | None:
    """The network that trains the embedding to hold the whole caption; it does not ship."""
    if not spec.captioner_layers:
        return None
    net = spec.net
    return Captioner(
        embedding_width=net.embedding_width,
        width=net.text_width,
        layers=spec.captioner_layers,
        head_width=net.head_width,
    )


def refuse_text_alone(net: ClipNetSpec) -> None:
    """Raises ValueError if a CLIP is a text tower alone, which gives states of captions and no embeddings."""
    if net.towers == "text":
        raise ValueError(
            "this CLIP is a text tower alone, as it lies in files of Stable Diffusion: it tells networks the "
            "states of captions and embeds nothing; take a CLIP of two towers, or leave out what needs one"
        )


def clip_of(trained: Trained, *, states_alone: bool = False) -> Clip:
    """The towers of a trained CLIP, ready to use.

    Args:
        trained: The parent.
        states_alone: Whether only states of captions are needed, for which a text tower is enough.

    Raises:
        ValueError: The parent is not a CLIP, or lacks a tower that is needed.
    """
    if not isinstance(trained.spec, ClipSpec):
        raise ValueError(f"the parent 'clip' is a {type(trained.spec).__name__}, it must be a CLIP")
    if not states_alone:
        refuse_text_alone(trained.spec.net)
    clip = Clip(trained.spec.net)
    clip.load_state_dict(trained.weights)
    return clip.eval().requires_grad_(False)


def clip_for(kind: str, needs: ClipNeeds, trained: Trained) -> Clip:
    """The towers of a stage's parent CLIP, ready to use.

    Args:
        kind: Of the stage.
        needs: `clip_needs` of its spec.
        trained: The parent.

    Raises:
        ValueError: The parent is not a CLIP, lacks a tower that is needed, or has another width or context
            length; the fields of both are named.
    """
    clip = clip_of(trained, states_alone=not needs.both_towers)
    for name, fields in (
        ("text_width", needs.states),
        ("embedding_width", needs.embeddings),
        ("context_length", needs.tokens),
    ):
        theirs = getattr(clip.spec, name)
        for field, mine in fields.items():
            if mine not in (0, theirs):
                raise ValueError(
                    f"{kind}: {field} is {mine}, net.{name} of its parent clip is {theirs}; {needs.remedy}"
                )
    return clip


def embedding_of(clip: Clip, batch: PairBatch, at: int | None = None) -> Float[Tensor, " b d"]:
    """The image embeddings that a batch brings along, or those of its images where it brings none.

    Args:
        clip: The parent.
        batch: Pairs.
        at: Side that the embedded images must have; None: as they are.

    Raises:
        ValueError: The batch brings no embeddings, and images of another side.
    """
    if batch.embedding is not None:
        return batch.embedding
    if at is not None and batch.image.shape[-1] != at:
        raise ValueError(
            f"embedded_at is {at}, and the batch has images of {batch.image.shape[-1]} px and no embeddings; "
            "embed the larger images before"
        )
    with torch.no_grad():
        return clip.embed_image(images.to_unit(batch.image))


def embedded(clip: Clip, picture: Float[Tensor, " b 3 h w"], side: int) -> Float[Tensor, " b d"]:
    """Embeddings of pictures in [-1, 1], first reduced to this side as in preparation; never enlarged."""
    side = min(side, *picture.shape[2:])
    return clip.embed_image(F.interpolate(picture, (side, side), mode="area"))


def sized(spec: ClipSpec) -> ClipSpec:
    """The spec with the sizes of the model that `pretrained` names, if it names one; no weights are read.

    Raises:
        ValueError: open_clip does not know the model.
    """
    if not spec.pretrained:
        return spec
    name, _, tag = spec.pretrained.partition(":")[0].partition("/")
    net = net_of(name)
    quick_gelu = net.quick_gelu or tag == "openai"
    kept = {name: getattr(spec.net, name) for name in ("states", "pads_with", "mean", "std")}
    return spec.but(net=net.but(quick_gelu=quick_gelu, **kept))


def published(spec: ClipSpec, setting: str = "clip.pretrained") -> Trained:
    """A CLIP that somebody else has trained, by open_clip's name or from a file.

    Args:
        spec: `pretrained` says which: `ViT-B-32/openai` (downloaded by open_clip into its cache) or
            `ViT-B-32:path/to/weights.safetensors`.  `net.states` and `net.pads_with`, how captions are read
            for other networks, are kept; the rest of `net` is replaced by that of the model.
        setting: The field that a person named it in, for errors.

    Raises:
        ValueError: open_clip does not know the model, or the file is missing, damaged or does not fit.
    """
    name, separator, file = spec.pretrained.partition(":")
    name, _, tag = name.partition("/")
    spec = sized(spec)
    if separator and not Path(file).is_file():
        raise ValueError(f"{setting}: there is no file {file!r}")
    quick_gelu = spec.net.quick_gelu
    try:
        towers = open_clip().create_model(name, pretrained=file or tag, force_quick_gelu=quick_gelu)
    except (RuntimeError, KeyError, OSError, *UNREADABLE) as error:
        if isinstance(error, UNREADABLE) or str(error).startswith(TORN):
            what = file or f"what open_clip has in its cache as {spec.pretrained}"
            raise ValueError(f"{setting}: {what} is damaged or no file of weights; fetch it again") from None
        raise ValueError(f"{setting}: {spec.pretrained}: {str(error).splitlines()[0]}") from None
    preprocess = open_clip().get_model_preprocess_cfg(towers)
    net = spec.net.but(mean=tuple(preprocess["mean"]), std=tuple(preprocess["std"]))
    clip = Clip(net)
    clip.towers.load_state_dict(towers.state_dict())
    weights: dict[str, Tensor] = clip.state_dict()
    return Trained(spec.but(net=net), weights)
