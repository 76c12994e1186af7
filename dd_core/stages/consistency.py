"""The consistency model: a base that jumps from any noise level to the image, in one step or a few.

It has the network of a base and is told what a base is told.  Distilled, it starts as the parent base and
learns to land, from anywhere on a path, where that base's guided sampler would; alone, it learns from the
images.  Its levels are those that samplers walk, ending in 0, where it is the identity: so one jump is a
finished picture, where the published models end at 0.002.

Sources: Song et al. 2023 (arXiv:2303.01469), algorithms 1 to 4; on the guidance that is learned with the
steps: Luo et al. 2023 (arXiv:2310.04378), section 4.2.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core import consistency, edits, images
from dd_core.cascade import CascadeState, Draw
from dd_core.consistency import Distance, Pace, draw_pair, ended
from dd_core.denoiser import Conditioning, Denoised, Denoiser, NetworkDenoiser
from dd_core.guidance import Rows, classifier_free, clip_x0, rows_of
from dd_core.nets.clip import Clip, ReadCaption
from dd_core.nets.dit import DiT
from dd_core.nets.draft import Draft
from dd_core.nets.perceptual import ClipFeatures, load_lpips
from dd_core.noise import SeededNoise
from dd_core.samplers import SamplingSpec, begin, edited, sigmas_of
from dd_core.spec import Spec
from dd_core.stage import EmbeddedBy, LearnedSpec, Losses, PairBatch, Stage, Trained
from dd_core.stages.base import BaseHop, BaseSpec, decoder_of, denoiser_of, null_like, roughened
from dd_core.stages.clip import clip_of, embedding_of
from dd_core.stages.draft import drawn
from dd_core.stages.refusals import refuse_draws, refuse_edit, refuse_gradient


class FixedLevels(Spec):
    """As many levels from the first step to the last, for distillation (Song et al. 2023, table 3)."""

    kind: Literal["fixed"] = "fixed"
    num_levels: int = Field(18, ge=2)
    """N: 18 on CIFAR-10, 40 on ImageNet-64."""
    mu: float = Field(0.95, ge=0, lt=1)
    """Share of the target's weights that stays at each step; 0 on CIFAR-10."""

    def at(self, step: Tensor) -> Pace:
        """How fine the path is, and how slow the target, at a step."""
        return Pace(self.num_levels, self.mu)


class GrowingLevels(Spec):
    """Few levels at first and many at last, for training alone (Song et al. 2023, appendix C)."""

    kind: Literal["growing"] = "growing"
    steps: int = Field(ge=1)
    """K, the step at which there are s1 + 1 of them; the budget's, as published."""
    s0: int = Field(2, ge=1)
    s1: int = Field(150, ge=2)
    mu0: float = Field(0.9, gt=0, lt=1)
    form: Literal["paper", "openai_code"] = "paper"
    """The published code averages less than the paper says; see `consistency.pace`."""

    @model_validator(mode="after")
    def _grows(self) -> "GrowingLevels":
        if self.s0 >= self.s1:
            raise ValueError(f"s0 {self.s0} must be below s1 {self.s1}: levels grow")
        return self

    def at(self, step: Tensor) -> Pace:
        """How fine the path is, and how slow the target, at a step."""
        reached = min(int(step), self.steps)
        return consistency.pace(reached, self.steps, s0=self.s0, s1=self.s1, mu0=self.mu0, form=self.form)


class TeacherSpec(Spec):
    """How the parent base walks when it is followed."""

    guidance_scale: float = Field(3.0, ge=0, le=50)
    """It is learned with the path, so that sampling at scale 1 is guided by it."""


class ConsistencySpec(LearnedSpec):
    """A base of few steps: caption -> base.image_size x base.image_size RGB."""

    kind: Literal["consistency"] = "consistency"
    base: BaseSpec
    """Network, what it is told, and its noise levels; of a distilled one, the parent's own spec."""
    teacher: TeacherSpec | None = TeacherSpec()
    """Distillation from the parent base; None trains alone, without one."""
    levels: Annotated[FixedLevels | GrowingLevels, Field(discriminator="kind")] = FixedLevels()
    distance: Literal["l1", "l2", "pseudo_huber", "lpips", "clip"] = "pseudo_huber"
    """Between two answers.  lpips, as published, with the weights of `lpips_weights`; clip: features of the
    parent CLIP in its place."""
    lpips_weights: str = ""
    """Safetensors file with the state of lpips.LPIPS(net="vgg")."""

    @model_validator(mode="after")
    def _fits(self) -> "ConsistencySpec":
        if self.distance == "lpips" and not self.lpips_weights:
            raise ValueError('distance "lpips" needs lpips_weights, a path; or use "clip"')
        return self

    @property
    def embedded_by(self) -> EmbeddedBy | None:
        """Whom its base hears embeddings from."""
        return self.base.embedded_by

    @property
    def image_size(self) -> int:
        """Side of the prepared images that it trains on."""
        return self.base.image_size


class Heard(NamedTuple):
    """What a batch is told, before a network has read it."""

    caption: ReadCaption
    null: ReadCaption
    embedding: Float[Tensor, " b d"] | None
    draft: Float[Tensor, " b 3 h w"] | None = None

    def by(self, model: NetworkDenoiser[DiT]) -> Conditioning:
        """As this network hears it."""
        text = model.network.read(self.caption)
        return Conditioning(text=text, image_embedding=self.embedding, image=self.draft)

    def unsaid_by(self, model: NetworkDenoiser[DiT]) -> Conditioning:
        """The empty caption; no embedding, unless it has become a draft."""
        text = model.network.read(self.null)
        if self.draft is not None:
            return Conditioning(text=text, image_embedding=self.embedding, image=self.draft)
        nothing = None if self.embedding is None else torch.zeros_like(self.embedding)
        return Conditioning(text=text, image_embedding=nothing)


class ConsistencyStage(Stage):
    """Trains a base to answer alike along a path: the parent's, or that of the image itself.

    Args:
        spec: What to build.
        clip: The parent that reads captions and images.
        teacher: The parent base, for distillation.
        draft: The parent whose drafts it starts from, if the base does.

    Raises:
        ValueError: The teacher is no base, or another than `spec.base` says.
    """

    model: NetworkDenoiser[DiT]
    steps: Tensor
    """Optimizer steps so far.  A buffer, so that a resumed run is as far as an unbroken one."""

    def __init__(
        self,
        spec: ConsistencySpec,
        clip: Trained,
        teacher: Trained | None = None,
        draft: Trained | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.model = denoiser_of(spec.base)
        towers = clip_of(clip)
        parents: list[nn.Module] = [towers]
        if teacher is not None:
            refuse_other(spec, teacher)
            self.model.load_state_dict(teacher.weights)
            parents.append(copy_of(self.model, spec.base))
        if (seeing := seeing_of(spec, towers)) is not None:
            parents.append(seeing)
        self.distance = distance_of(spec, seeing)
        if (decoder := decoder_of(spec.base, draft)) is not None:
            parents.append(decoder)
        self.target = copy_of(self.model, spec.base).requires_grad_(False)
        """The average of the model that it is trained towards; not what ships, which is averaged longer."""
        self.register_buffer("steps", torch.tensor(0))
        self.freeze(*parents)

    def players(self, phase: str) -> list[nn.Parameter]:
        """The model's; the target follows."""
        return list(self.model.parameters())

    @torch.no_grad()
    def after_step(self) -> None:
        """The target follows the model."""
        mu = self.spec.levels.at(self.steps).mu
        torch._foreach_lerp_(list(self.target.parameters()), list(self.model.parameters()), 1 - mu)
        self.steps += 1

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        spec, base = self.spec, self.spec.base
        x0 = images.to_unit(batch.image)
        heard = self.heard(batch, x0)
        num_levels = spec.levels.at(self.steps).num_levels
        pair = draw_pair(x0, num_levels, sigma_min=base.sigma_min, sigma_max=base.sigma_max, to_zero=True)
        student = bound(self.model, heard.by(self.model))
        with torch.no_grad():
            target = ended(bound(self.target, heard.by(self.target)))
        if spec.teacher is not None:
            teacher = self.walker(spec.teacher, heard)
            gap = consistency.distillation(student, target, teacher, x0, pair, self.distance)
        else:
            gap = consistency.training(student, target, x0, pair, self.distance)
        total, parts = gap.mean(), {"gap": gap.detach().mean(), "levels": gap.new_tensor(float(num_levels))}
        return Losses(total, parts)

    @torch.no_grad()
    def heard(self, batch: PairBatch, x0: Float[Tensor, " b 3 h w"]) -> Heard:
        """Captions and embeddings, left out and roughened as they were for the base."""
        base, clip = self.spec.base, self.frozen[0]
        assert isinstance(clip, Clip)
        null = null_like(batch.tokens)
        dropped = torch.rand(len(x0), 1, device=x0.device) < base.caption_dropout
        caption = clip.read(torch.where(dropped, null, batch.tokens))
        embedding, draft, decoder = None, None, self.frozen[-1]
        if base.net.embedding_width:
            made = decoder if isinstance(decoder, Draft) else None
            embedding = roughened(base, made, embedding_of(clip, batch), dropped)
            draft = drawn(made, embedding) if made else None
        return Heard(caption, clip.read(null), embedding, draft)

    @torch.no_grad()
    def walker(self, how: TeacherSpec, heard: Heard) -> Denoiser:
        """The parent base as it is sampled: guided, then clipped."""
        teacher = self.frozen[1]
        assert isinstance(teacher, NetworkDenoiser)
        scale = torch.full((len(heard.caption.states),), how.guidance_scale)
        return clip_x0(classifier_free(teacher, Rows(heard.by(teacher), heard.unsaid_by(teacher), scale)))


class ConsistencyHop:
    """Caption (and image embedding) -> small image in how.num_steps jumps; or an edit of an image.

    Without taus the jumps start at the first num_steps of num_steps + 1 Karras levels.  A guidance scale
    other than 1 comes on top of the one that was learned.
    """

    def __init__(
        self, trained: Trained, clip: Trained, draft: Trained | None = None, *, device: torch.device | str
    ) -> None:
        assert isinstance(trained.spec, ConsistencySpec)
        self.base = BaseHop(Trained(trained.spec.base, trained.weights), clip, draft, device=device)

    def refuse(self, state: CascadeState, how: SamplingSpec) -> None:
        if how.sampler != "consistency":
            raise ValueError(f"a consistency model jumps; set its sampler to consistency, not {how.sampler}")
        refuse_gradient(how, "consistency model")
        refuse_draws(how, "consistency model")
        refuse_edit(how, state, has_channels=True)  # its edits need no channels, nor leave to do without
        if state.known is not None and state.hole is None:
            raise ValueError(
                "a consistency model varies no picture, it fills holes; give a mask, or take the base "
                "that it was distilled from"
            )

    def start(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        spec, device, noise = self.base.spec, self.base.device, SeededNoise(state.seeds)
        jumps = how.but(taus=how.taus or tuple(range(how.num_steps + 1)))
        sigmas = sigmas_of(jumps, sigma_min=spec.sigma_min, sigma_max=spec.sigma_max)
        side = spec.image_size
        x = spec.sigma_max * noise(torch.empty(len(state.seeds), 3, side, side, device=device))
        known = known_of(state, side, device)
        if known is None:
            sampling = begin(jumps, x, sigmas, noise)
        else:
            sampling = edited(begin(jumps, x + known.image, sigmas, noise), known.edit)
        cond = self.base.told(state.tokens, state.image_embedding)
        return Draw(sampling, rows_of(how, cond, self.base.unsaid(state), len(x)))

    def denoiser(self, rows: Rows) -> Denoiser:
        return self.base.denoiser(rows)

    def finish(self, state: CascadeState, x0: Tensor) -> CascadeState:
        return self.base.finish(state, x0)


class Known(NamedTuple):
    """What an edit starts from, and how it keeps what it must."""

    image: Float[Tensor, " b 3 h w"]
    edit: edits.Edit


def known_of(state: CascadeState, side: int, device: torch.device) -> Known | None:
    """What a request knows of its image, at the side of a hop; None if it is no edit.

    Raises:
        ValueError: It asks for two edits at once, or for blocks that do not fill the side.
    """
    asked = [name for name in ("hole", "gray", "coarse") if getattr(state, name) is not None]
    if len(asked) > 1:
        raise ValueError(f"one edit at a time: {' and '.join(asked)} were given; leave all but one out")
    if state.known is not None and state.hole is not None:
        image = F.interpolate(state.known.to(device), (side, side), mode="area")
        hole = F.interpolate(state.hole.float().to(device), (side, side), mode="area") > 0
        return Known(image, edits.inpaint(image, hole))
    if state.gray is not None:
        gray = F.interpolate(state.gray.to(device), (side, side), mode="area")
        return Known(gray.expand(-1, 3, -1, -1), edits.colorize(gray))
    if state.coarse is not None:
        height, width = state.coarse.shape[2:]
        if height != width or side % height:
            raise ValueError(
                f"an image of {width} x {height} does not enlarge to {side} x {side} in whole blocks; "
                f"its side must divide {side}"
            )
        coarse, factor = state.coarse.to(device), side // height
        return Known(F.interpolate(coarse, scale_factor=factor), edits.upscale(coarse, factor))
    return None


def refuse_other(spec: ConsistencySpec, teacher: Trained) -> None:
    """Raises ValueError unless the teacher is the base that the spec describes."""
    if not isinstance(teacher.spec, BaseSpec):
        raise ValueError(f"the parent 'base' is a {type(teacher.spec).__name__}, it must be a base")
    if teacher.spec != spec.base:
        mine, its = spec.base.model_dump(), teacher.spec.model_dump()
        field = next(name for name in its if mine[name] != its[name])
        raise ValueError(
            f"consistency: base.{field} is not that of the parent base; a distilled model is the same "
            "network, so give both the same spec"
        )


def copy_of(model: NetworkDenoiser[DiT], spec: BaseSpec) -> NetworkDenoiser[DiT]:
    """The same network with the same weights.  Not by deepcopy, which needs tensors to have content."""
    copied = denoiser_of(spec)
    copied.load_state_dict(model.state_dict())
    return copied


def bound(model: NetworkDenoiser[DiT], cond: Conditioning) -> Denoiser:
    """A model that is told this."""

    def denoise(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Denoised:
        return model(x, sigma, cond)

    return denoise


def distance_of(spec: ConsistencySpec, seeing: nn.Module | None) -> Distance:
    """The distance that a spec names, by what `seeing_of` gives."""
    match spec.distance:
        case "l1":
            return consistency.l1
        case "l2":
            return consistency.l2
        case "pseudo_huber":
            return consistency.pseudo_huber
        case "lpips":
            assert seeing is not None
            return consistency.enlarged(unregistered(seeing))
        case "clip":
            assert seeing is not None
            return unregistered(seeing)
        case _:
            assert_never(spec.distance)


def unregistered(network: nn.Module) -> Distance:
    """A network as a function: a stage that holds it has none of its weights."""

    def between(a: Float[Tensor, " b *s"], b: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
        return network(a, b)

    return between


def seeing_of(spec: ConsistencySpec, clip: Clip) -> nn.Module | None:
    """The network by which a distance sees; None if it looks at pixels.

    Raises:
        ValueError: The LPIPS weights cannot be used.
    """
    match spec.distance:
        case "lpips":
            return load_lpips(Path(spec.lpips_weights))
        case "clip":
            return ClipFeatures(clip)
        case _:
            return None
