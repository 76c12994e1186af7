"""Guides of a hop: trained networks whose gradient leads a sampling, and what of a request they look at."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dd_core.cascade import CascadeState, Role
from dd_core.denoiser import Denoiser
from dd_core.guidance import Rows, by_estimate, by_gradient
from dd_core.nets.clip import Clip
from dd_core.noise import SeededNoise
from dd_core.stage import Trained
from dd_core.stages.classifier import NoisedClassifier, classifier_of
from dd_core.stages.clip import clip_for
from dd_core.stages.noised_clip import NoisedClip, NoisedClipSpec, noised_clip_of
from dd_core.stages.published_clip import PublishedClip, published_clip_of
from dd_core.steering import GradientSpec, Guides, Pull, score_of

CLEAN = 0.02
"""Noise level that guides are told for a decoded estimate: about the lowest at which ours are trained."""
ROLES: tuple[Role, ...] = ("noised_clip", "classifier")
"""Of the guides that read pictures."""
Decode = Callable[[Tensor], Tensor]
"""Latents -> pictures in [-1, 1]."""


class Leaders(NamedTuple):
    """The guides of a hop; None where the cascade names none."""

    classifier: NoisedClassifier | None = None
    noised_clip: NoisedClip | PublishedClip | None = None
    clip: Clip | PublishedClip | None = None
    """Whose text tower the noised CLIP was trained with; a published one has its own."""

    def roles(self) -> set[str]:
        """Roles of the guides that are there."""
        return {name for name, part in self._asdict().items() if part is not None}

    def guides(self) -> Guides:
        """The same as functions, for `score_of`."""
        tower = self.noised_clip
        if tower is None:
            return Guides(logits=self.classifier)
        scale = tower.logit_scale().detach().clamp(max=100)  # where training did not end it there
        return Guides(self.classifier, tower.embed_image, tower.features, scale)

    def lead(self, denoise: Denoiser, rows: Rows, decode: Decode | None = None) -> Denoiser:
        """The denoiser, its estimates moved along the gradient of the scores that the rows ask for.

        Args:
            denoise: Of pictures, or of latents.
            rows: Their `pull` says which scores.
            decode: For latents, estimate -> picture: the guides read the picture, at noise level CLEAN.
        """
        if rows.pull is None:
            return denoise
        score, scale = score_of(rows.pull, self.guides()), torch.ones(len(rows.scale))
        if decode is None:
            return by_gradient(denoise, score, scale=scale)
        side = one_size(self.reads())

        def of_latents(x0: Float[Tensor, " b c h w"]) -> Float[Tensor, " b"]:
            picture = F.adaptive_avg_pool2d(decode(x0), side)
            return score(picture, torch.full((len(x0),), CLEAN, device=x0.device))

        return by_estimate(denoise, of_latents, scale=scale)

    def reads(self) -> dict[str, int]:
        """Role -> side of the pictures that this guide reads, in pixels."""
        read: dict[str, int] = {}
        if self.noised_clip is not None:
            read["noised_clip"] = self.noised_clip.spec.image_size
        if self.classifier is not None:
            read["classifier"] = self.classifier.network.spec.image_size
        return read

    def pull(self, how: GradientSpec, state: CascadeState, side: int, *, decoded: bool = False) -> Pull:
        """What the gradient is to lead a request towards.

        Args:
            how: What pulls, and how strongly.
            state: The request.
            side: Of the pictures of the hop, in pixels.
            decoded: Whether the hop's pictures are decoded for the guides, and reduced to the size they read.

        Raises:
            ValueError: A guide is missing, reads pictures of another size, or knows fewer classes.
        """
        self.refuse(how, state, side, decoded=decoded)
        count = len(state.seeds)
        side = one_size(self.reads()) if decoded else side
        label = torch.zeros(count, dtype=torch.long) if state.label is None else state.label.clamp(min=0)
        width = self.noised_clip.spec.embedding_width if self.noised_clip else 0
        caption = torch.zeros(count, width)
        if how.caption:
            caption = self.caption(state)
        shape = (count, 3, side, side) if self.noised_clip else (count, 0, 0, 0)
        reference, noise = torch.zeros(shape), torch.zeros(shape)
        if how.looks_at_reference():
            assert state.reference is not None
            reference = F.interpolate(state.reference.float(), (side, side), mode="area")
            noise = SeededNoise(state.seeds, "reference")(reference)
        return Pull(torch.tensor([how.weights()] * count), label, caption, reference, noise)

    def caption(self, state: CascadeState) -> Float[Tensor, " b d"]:
        """Embeddings of a request's captions in the space of the noised CLIP, on the CPU."""
        assert self.clip is not None
        if isinstance(self.clip, PublishedClip):
            return self.clip.read(state.captions).cpu()
        return self.clip.read(state.tokens.to(next(self.clip.parameters()).device)).embedding.cpu()

    def refuse(self, how: GradientSpec, state: CascadeState, side: int, *, decoded: bool = False) -> None:
        """Raises ValueError as `pull` does, and asks no network."""
        how.refuse_lacking(self.roles())
        refuse_sizes(how, self.reads(), side, decoded=decoded)
        if how.caption and isinstance(self.clip, PublishedClip) and len(state.captions) != len(state.tokens):
            raise ValueError(
                "the guide 'noised_clip' reads captions at its own length, and the request has their tokens "
                "alone; give the captions"
            )
        refuse_aim(how, state, 0 if self.classifier is None else self.classifier.network.spec.classes)


UNLED = Leaders()


def one_size(reads: Mapping[str, int]) -> int:
    """Side of the pictures that guides read, in pixels; 0 if none of them reads any.

    Args:
        reads: Role -> side of the pictures that this guide reads.

    Raises:
        ValueError: They read pictures of two sizes.
    """
    if len(set(reads.values())) > 1:
        raise ValueError(f"the guides read pictures of two sizes, {dict(reads)}; train them at the same")
    return max(reads.values(), default=0)


def refuse_sizes(how: GradientSpec, reads: Mapping[str, int], side: int, *, decoded: bool) -> None:
    """Refuse guides that cannot read the hop's pictures, whatever the request.

    Args:
        how: What pulls; guides that it does not ask are checked only if `decoded`.
        reads: Role -> side of the pictures that this guide reads, in pixels.
        side: Of the pictures of the hop.
        decoded: Whether these are decoded for the guides, and reduced to the size they read, which must then
            be the same for all of them.

    Raises:
        ValueError: A guide that is asked reads pictures of another size than the hop paints (if decoded, of a
            larger one), or guides read decoded pictures of two sizes.
    """
    for role in sorted(how.guides() & set(reads)):
        if reads[role] > side or (reads[role] != side and not decoded):
            raise ValueError(
                f"the guide {role!r} reads {reads[role]} px, its hop paints {side}; train it at that"
            )
    if decoded:
        one_size(reads)


def refuse_aim(how: GradientSpec, state: CascadeState, classes: int) -> None:
    """Refuse a label or a reference picture that the gradient cannot lead to, whatever the guides' weights.

    Args:
        how: What pulls.
        state: The request.
        classes: Of the classifier; 0 if there is none.

    Raises:
        ValueError: A row has no class that the classifier knows, or the reference picture is missing or not
            RGB.
    """
    label, reference = state.label, state.reference
    unknown = label is None or bool(((label < 0) | (label >= classes)).any())
    if how.classes and classes and unknown:
        given = None if label is None else label.tolist()
        raise ValueError(f"label {given} is no class of the classifier; there are 0 to {classes - 1}")
    if not how.looks_at_reference():
        return
    if reference is None:
        raise ValueError(
            "gradient image, style and structure look at a reference picture; give one, or weigh them 0"
        )
    if reference.ndim != 4 or reference.shape[1] != 3:
        raise ValueError(f"the reference picture is {tuple(reference.shape)}, not RGB; convert it to RGB")


def leaders_of(parents: Mapping[str, Trained], device: torch.device) -> Leaders:
    """The guides among the parents, on the device.

    Args:
        parents: Role -> trained; "leading_clip" is the CLIP that the noised one was trained with, where that
            is not the hop's own "clip".
        device: Where they go.
    """
    noised: NoisedClip | PublishedClip | None = None
    clip: Clip | PublishedClip | None = None
    if "noised_clip" in parents:
        given = parents["noised_clip"]
        published = published_clip_of(given)
        noised = (published or noised_clip_of(given)).to(device)
        clip = published
    tower = parents.get("leading_clip", parents.get("clip"))
    if noised is not None and clip is None and tower is not None:
        spec = parents["noised_clip"].spec
        assert isinstance(spec, NoisedClipSpec)
        clip = clip_for(spec.kind, spec.clip_needs, tower).to(device)
    classifier = classifier_of(parents["classifier"]).to(device) if "classifier" in parents else None
    return Leaders(classifier, noised, clip)
