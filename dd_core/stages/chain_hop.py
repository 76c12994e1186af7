"""A trained chain as a link of the cascade: generation, guidance, variations, filling of holes, enlarging.

Its samplers walk in the sigma frame, so x begins as sqrt(1 + sigma**2) eps (DDPM's N(0, 1)) at the level of
the first timestep, and as sigma eps for a chain without timesteps.  Everything that cannot work is refused
before a network is called.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dd_core import edits, images
from dd_core.cascade import CascadeState, Draw
from dd_core.denoiser import Conditioning, Denoiser
from dd_core.guidance import UNLIMITED, Rows, bounded, classifier_free, rows_of
from dd_core.labels import UNLABELLED
from dd_core.nets.clip import Clip
from dd_core.noise import SeededNoise, from_vp, to_vp
from dd_core.samplers import Sampling, SamplingSpec, begin, invert, sigmas_of
from dd_core.schedules import ScheduleSpec
from dd_core.stage import Trained
from dd_core.stages.captions import away_from
from dd_core.stages.chain import parents_of
from dd_core.stages.chain_spec import ChainSpec, denoiser_of
from dd_core.stages.chain_told import Heard, covering, encoded, read_by, seen, told, unsaid
from dd_core.stages.clip import embedded
from dd_core.stages.guides import Leaders, leaders_of
from dd_core.stages.known import known_of, refuse_known
from dd_core.stages.refusals import (
    HEARS,
    given_noise,
    refuse_edit,
    refuse_kept,
    refuse_small,
    refuse_unembedded,
    refuse_unheard,
    refuse_unlearned,
)


class Edit(NamedTuple):
    """A picture to vary or to fill, at the size of the hop, on its device."""

    known: Float[Tensor, " b 3 h w"]
    hole: Bool[Tensor, " b 1 h w"] | None
    """None: all of it is varied."""


class ChainHop:
    """Caption, class, embedding, pictures -> a picture.

    Args:
        trained: The chain.
        parents: Its parents, and its guides: "classifier", "noised_clip" and the CLIP of the latter
            (`leaders_of`).
        device: Where it paints.

    Raises:
        ValueError: A parent is missing or of another kind.
    """

    def __init__(
        self, trained: Trained, parents: Mapping[str, Trained], *, device: torch.device | str
    ) -> None:
        assert isinstance(trained.spec, ChainSpec)
        self.spec, self.device = trained.spec, torch.device(device)
        clip, autoencoder = parents_of(self.spec, parents)
        self.model = denoiser_of(self.spec)
        self.model.load_state_dict(trained.weights)
        self.model.eval().requires_grad_(False).to(self.device)
        self.clip = clip and clip.to(self.device)
        self.autoencoder = autoencoder and autoencoder.to(self.device)
        self.leaders: Leaders = leaders_of(parents, self.device)
        self.vocabulary = trained.vocabulary

    def refuse(self, state: CascadeState, how: SamplingSpec) -> None:
        refuse(self.spec, how, self.leaders.roles())
        if self.spec.factor == 1:
            refuse_kept(state, "chain")
        else:
            refuse_known(state, self.spec.image_size)
        refuse_edit(how, state, has_channels=self.spec.inpaints)
        refuse_told(self.spec, how, state, own_vocabulary=self.vocabulary is not None)
        if how.gradient is not None:
            decoded = bool(self.spec.latent_channels)
            self.leaders.refuse(how.gradient, state, self.spec.image_size, decoded=decoded)

    def start(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        refuse_small(self.spec.image_size, self.spec.factor, state.image)
        edit, spec = self.edit(state), self.spec
        sigmas = levels_of(spec, how)
        noise = SeededNoise(state.seeds, "" if spec.factor == 1 else f"{spec.image_size} px")
        eps = how.temperature * noise(torch.empty(self.shape(len(state.seeds)), device=self.device))
        first = float(sigmas[0])
        x, fill = from_vp(eps, first) if isinstance(spec.schedule, ScheduleSpec) else first * eps, None
        if spec.factor == 1 and (given := given_noise(state, x)) is not None:
            x = given
        if edit is not None:
            if edit.hole is None or how.strength < 1:
                x = encoded(edit.known, self.autoencoder) + first * eps
            if edit.hole is not None and spec.mask_of == "known":  # Stable Diffusion is told, not corrected
                known = encoded(edits.bared(edit.known, edit.hole), self.autoencoder)  # it sees past a hole
                fill = edits.inpaint(known, covering(edit.hole, known))
        elif (kept := known_of(state, spec.image_size, self.device)) is not None:
            fill = kept.edit
        sampling = begin(how, x, sigmas, noise)
        if sigmas[-1] > 0:
            sampling = in_vp(sampling, float(sigmas[-1]))
        return Draw(edits.edited(sampling, fill) if fill else sampling, self.rows(state, how))

    def embedder(self) -> Clip | None:
        return self.clip if self.spec.embedding_width else None

    def embedded(self, picture: Float[Tensor, " b 3 h w"]) -> Float[Tensor, " b d"]:
        by = self.spec.embedded_by
        assert self.clip is not None
        assert by is not None
        return embedded(self.clip, picture.to(self.device), by.size)

    def encode(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        if self.spec.factor > 1:
            raise ValueError(
                "a model that enlarges is told the picture, so it is not encoded; encode with a base"
            )
        sigmas, edit = levels_of(self.spec, how), self.edit(state)
        assert edit is not None
        known = encoded(edit.known, self.autoencoder)
        if sigmas[-1] > 0:
            known = from_vp(known, float(sigmas[-1]))
        return Draw(invert(known, sigmas), self.rows(state, how))

    def rows(self, state: CascadeState, how: SamplingSpec) -> Rows:
        """The rows of a request: conditioning, guidance and gradient of each sample."""
        refuse_unembedded(self.spec, state.image_embedding)
        spec, count = self.spec, len(state.seeds)
        picture = self.shown(state, self.edit(state))
        caption, null = self.read(state)
        label = torch.full((count,), UNLABELLED) if state.label is None else state.label
        embedding = state.image_embedding
        if embedding is None or not spec.embedding_width:
            embedding = torch.zeros(count, spec.embedding_width)
        heard = Heard(caption, label, embedding, self.counts(caption))
        cond = self.told(heard, picture)
        nothing = unsaid(spec, heard, null)._replace(counts=self.counts(null))
        without = cond if how.guidance_scale == 1 else self.told(nothing, picture)
        rows = rows_of(how, cond, without, count)
        if spec.latent_channels and how.clip is None:
            rows = rows._replace(limits=torch.tensor([UNLIMITED] * count))
        if how.gradient is not None:
            pull = self.leaders.pull(how.gradient, state, spec.image_size, decoded=bool(spec.latent_channels))
            rows = rows._replace(pull=pull)
        return rows

    def read(self, state: CascadeState) -> tuple[Int[Tensor, " b l"], Int[Tensor, " b l"]]:
        """Captions, and those that guidance leads away from, as tokens of this network."""
        silent = self.spec.told_dropout > 0
        if self.vocabulary is None:
            return state.tokens, away_from(state, silent=silent)
        none = [""] * len(state.captions) if silent else state.captions
        both = (state.captions, state.negatives or none)
        length = self.spec.context_length
        caption, null = (torch.tensor(self.vocabulary.tokens(one, length)) for one in both)
        return caption, null

    def counts(self, tokens: Int[Tensor, " b l"]) -> Bool[Tensor, " b l"] | None:
        """Which tokens are not padding, if the chain has a vocabulary of its own; otherwise None."""
        return None if self.vocabulary is None else tokens != self.vocabulary.end

    def told(self, heard: Heard, picture: Tensor | None) -> Conditioning:
        """What the network is told of a request."""
        heard = Heard._make(None if part is None else part.to(self.device) for part in heard)
        caption = read_by(self.spec, self.clip, heard.tokens)
        return told(self.spec, self.model.network, caption, heard, picture)

    def shown(self, state: CascadeState, edit: Edit | None) -> Tensor | None:
        """The image inputs of the network; without a hole, an inpainting model is told that all is hidden."""
        spec, size = self.spec, self.spec.image_size
        small = None if state.image is None or spec.factor == 1 else state.image.to(self.device)
        if edit is None or edit.hole is None:
            count = len(state.seeds)
            hole = torch.ones(count, 1, size, size, dtype=torch.bool, device=self.device)
            edit = Edit(torch.zeros(count, 3, size, size, device=self.device), hole)
        return seen(spec, self.autoencoder, small=small, known=edit.known, hole=edit.hole)

    def edit(self, state: CascadeState) -> Edit | None:
        """What is to be edited, at the size of this hop."""
        if state.known is None or (self.spec.factor > 1 and state.hole is None):
            return None  # an enlarging model varies nothing: it is told what to enlarge
        size = (self.spec.image_size, self.spec.image_size)
        known = F.interpolate(state.known.to(self.device), size, mode="area")
        if state.hole is None:
            return Edit(known, None)
        hole = F.adaptive_max_pool2d(state.hole.float().to(self.device), size) > 0
        return Edit(known, hole)

    def shape(self, count: int) -> tuple[int, int, int, int]:
        """Of x, in pixels or latents."""
        side = self.spec.image_size // (self.autoencoder.spec.factor if self.autoencoder else 1)
        return count, self.spec.channels, side, side

    def denoiser(self, rows: Rows) -> Denoiser:
        guided = bounded(classifier_free(self.model, rows, rescaled_as=self.spec.predicts), rows)
        return self.leaders.lead(guided, rows, self.autoencoder and self.autoencoder.decode)

    @torch.no_grad()
    def finish(self, state: CascadeState, x0: Tensor) -> CascadeState:
        picture = x0.float() if self.autoencoder is None else self.autoencoder.decode(x0.float())
        edit = self.edit(state)
        if edit is not None and edit.hole is not None:
            picture = torch.where(edit.hole, picture, edit.known)
        return state._replace(image=images.quantised(picture.cpu()))


def in_vp(sampling: Sampling, sigma: float) -> Sampling:
    """The same sampling, its result, which is still at level `sigma`, in DDPM's frame (latent diffusion)."""
    return to_vp((yield from sampling), sigma)


def levels_of(spec: ChainSpec, how: SamplingSpec) -> Float[Tensor, " n"]:
    """The noise levels that a sampling visits; fewer for a variation, which begins at a lower one.

    A model that enlarges varies nothing: it is told what to enlarge.

    Raises:
        ValueError: The spacing cannot give so many steps, or the strength leaves none.
    """
    low, high = spec.sigma_range
    chain = spec.schedule if isinstance(spec.schedule, ScheduleSpec) else None
    sigmas = sigmas_of(how, sigma_min=low, sigma_max=high, chain=chain)
    if how.sampler != "ddim":  # as published: only DDIM's last step may end on the level of timestep 0
        sigmas = torch.cat([sigmas[:-1], torch.zeros_like(sigmas[:1])])
    return edits.varied(sigmas, how.strength) if spec.factor == 1 else sigmas


def refuse(spec: ChainSpec, how: SamplingSpec, guides: Collection[str]) -> None:
    """Refuse a sampling that a chain cannot do, whatever the request.

    Raises:
        ValueError: With what to do about it.
    """
    levels_of(spec, how)
    usual = HEARS[spec.kind]
    known = ("analytic", "learned") if spec.predicts == "x0" else ("learned",)
    learned = usual._replace(variances=(*known, *usual.variances))
    refuse_unheard(how, spec.kind, hears=learned if spec.learns_variance else usual)
    refuse_unlearned(how.guidance_scale, spec.guides_itself, "told_dropout")
    if how.gradient is not None:
        how.gradient.refuse_lacking(guides)
    if spec.latent_channels and (keeps := kept_in_range(how)):
        raise ValueError(f"{keeps} is for pixels, and this model paints latents; leave it out")


def kept_in_range(how: SamplingSpec) -> str:
    """The option that clips estimates or images to the range of pixels; empty if none is set explicitly."""
    if how.dynamic_threshold is not None:
        return "dynamic_threshold"
    return f"clip {how.clip}" if how.clip in {"estimate", "image"} else ""


def refuse_told(
    spec: ChainSpec, how: SamplingSpec, state: CascadeState, *, own_vocabulary: bool = False
) -> None:
    """Refuse a request whose class or captions are missing or do not fit the chain.

    Args:
        spec: Of the chain.
        how: How it is to be sampled.
        state: The request.
        own_vocabulary: Whether the chain reads the captions themselves, not their tokens.

    Raises:
        ValueError: With what to do about it.
    """
    length = spec.context_length
    refuse_label(spec, how, state.label)
    remedies = (
        (
            own_vocabulary and len(state.captions) != len(state.tokens),
            "it reads captions by a vocabulary of its own, and the request has their tokens alone; "
            "give the captions",
        ),
        (
            bool(length) and not own_vocabulary and state.tokens.shape[1] != length,
            f"captions of {state.tokens.shape[1]} tokens, but the model reads {length}; prepare with that",
        ),
    )
    for wrong, remedy in remedies:
        if wrong:
            raise ValueError(remedy)


def refuse_label(spec: ChainSpec, how: SamplingSpec, label: Int[Tensor, " b"] | None) -> None:
    """Raises ValueError if chain or gradient need a class and get none, or if the chain does not know it."""
    by_class = bool(how.gradient and how.gradient.classes)
    lowest = UNLABELLED if spec.has_class_of_nothing else 0
    if label is None:
        if by_class or (spec.labels > 0 and not spec.has_class_of_nothing):
            raise ValueError("it paints by class, and the request names none; give a label")
    elif spec.labels and bool(((label < lowest) | (label >= spec.classes)).any()):
        raise ValueError(f"label {label.tolist()}: classes are 0 to {spec.classes - 1}")
