"""The consistency model: a base or chain that jumps from any noise level to the image, in one step or a few.

It has the network and the conditioning of a base or of a chain.  Distilled, it starts with the weights of
that parent and learns to land, from anywhere on a path, where the parent's guided sampler would, whatever
the parent predicts (eps, v, x0, edm); without a teacher, it learns from the images alone.  Its levels are
those that samplers walk, ending at 0, where it is the identity: so one jump gives a finished picture.  The
published models end at 0.002.

Sources: Song et al. 2023 (arXiv:2303.01469), algorithms 2 and 3; distilled guidance: Luo et al. 2023
(arXiv:2310.04378), section 4.2; segments: Heek et al. 2024 (arXiv:2403.06807).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from dd_core import consistency
from dd_core.consistency import Cut, Distance, FixedLevels, GrowingLevels, Solver, draw_pair, ended, following
from dd_core.denoiser import Conditioning, Denoised, Denoiser, NetworkDenoiser
from dd_core.guidance import Rows, classifier_free, clip_x0
from dd_core.nets.clip import Clip
from dd_core.nets.perceptual import ClipFeatures, load_lpips
from dd_core.spec import Spec
from dd_core.stage import ClipNeeds, EmbeddedBy, Example, LearnedSpec, Losses, PairBatch, Stage, Trained
from dd_core.stages import base, chain_spec
from dd_core.stages.base import BaseSpec, BaseStage
from dd_core.stages.chain import ChainStage
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import clip_for, refuse_text_alone
from dd_core.stages.refusals import needed, refuse_unlearned


class TeacherSpec(Spec):
    """How the parent `base` is sampled as the teacher."""

    guidance_scale: float = Field(3.0, ge=0, le=50)
    """It is distilled too, so that sampling the student at scale 1 is guided by it."""
    solver: Solver = "heun"
    """heun asks the parent twice a step, as published; ddim once."""
    steps: int = Field(1, ge=1)
    """Of the teacher, from one level to the next.  With several, fewer levels are enough: the target need not
    have learned first what the teacher walks."""
    clipped: bool = True
    """Whether its estimates are clipped to the range of pixels, as in its own sampling (latents never are);
    as published they are not."""


class ConsistencySpec(LearnedSpec):
    """A base or a chain that is sampled in few steps."""

    kind: Literal["consistency"] = "consistency"
    base: Annotated[BaseSpec | ChainSpec, Field(discriminator="kind")]
    """Network, conditioning and noise levels; for distillation the parent's own spec, except for the dropout
    of its UNet."""
    teacher: TeacherSpec | None = TeacherSpec()
    """Distillation from the parent `base`; None: training without a teacher."""
    levels: Annotated[FixedLevels | GrowingLevels, Field(discriminator="kind")] = FixedLevels()
    sigma_max: float | None = Field(None, gt=0)
    """Where its paths begin; published: 80.  None: at the base's highest level, which for a chain with cosine
    betas is above 50,000, and then half of the levels lie where no picture is to be seen."""
    sigma_min: float | None = Field(None, gt=0)
    """The last level before paths end at 0; None: the base's lowest, which is also the least allowed."""
    distance: Literal["l1", "l2", "pseudo_huber", "lpips", "clip"] = "pseudo_huber"
    """Between two outputs.  lpips: as published, with `lpips_weights` and average pooling in place of VGG's
    max pooling; clip: features of the parent CLIP in place of VGG's."""
    lpips_weights: str = ""
    """Safetensors file with the state of lpips.LPIPS(net="vgg")."""
    segments: int = Field(1, ge=1)
    """Equal parts of its fixed levels; a jump goes to the end of the part that it begins in, so a picture
    takes as many jumps as there are parts, which are easier to learn than a single one; or a multiple, for
    which noise is drawn anew within the parts."""

    @model_validator(mode="after")
    def _fits(self) -> "ConsistencySpec":
        if self.distance == "lpips" and not self.lpips_weights:
            raise ValueError('distance "lpips" needs lpips_weights, a path; or use "clip"')
        low, high = self.base.sigma_range
        if self.sigma_max is not None and not low < self.sigma_max <= high:
            raise ValueError(
                f"sigma_max {self.sigma_max:g} must be above the base's lowest level, {low:g}, and at most "
                f"its highest, {high:g}; leave it out to begin there"
            )
        if self.sigma_min is not None and not low <= self.sigma_min < (self.sigma_max or high):
            raise ValueError(
                f"sigma_min {self.sigma_min:g} must be at least the base's lowest level, {low:g}, and below "
                f"where paths begin, {self.sigma_max or high:g}; leave it out for the lowest"
            )
        refuse_cut(self.levels, self.segments)
        if self.ends_at_lowest and self.segments > 1:
            raise ValueError(
                "a base that predicts consistency is the identity at its lowest level, and segments end at "
                "0; set segments: 1, or base.predicts: edm"
            )
        scale = self.teacher.guidance_scale if self.teacher else 1.0
        refuse_unlearned(scale, self.base.guides_itself, self.dropout)
        if self.ends_at_lowest and self.sigma_min not in (None, low := self.base.sigma_range[0]):
            raise ValueError(
                f"its network is the identity at its base's lowest noise level, {low:g}, not at sigma_min "
                f"{self.sigma_min:g}; leave sigma_min out"
            )
        if not isinstance(self.base, ChainSpec):
            return self
        if self.base.factor > 1:
            raise ValueError("a chain that enlarges is no consistency model; set base.factor: 1")
        if self.base.latent_channels and self.distance in {"lpips", "clip"}:
            raise ValueError(
                f"distance {self.distance} looks at pictures, and this base paints latents; use pseudo_huber"
            )
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """Roles of its parents."""
        seeing = ("clip",) if self.distance == "clip" else ()
        return tuple(dict.fromkeys((*self.base.needs, *seeing, *(("base",) if self.teacher else ()))))

    @property
    def roles(self) -> tuple[str, ...]:
        """A CLIP or a teacher may be named where it is not used; a student begins as its teacher."""
        begins = self.teacher is None and isinstance(self.base, ChainSpec)
        own = [role for role in self.base.roles if role != "start" or begins]
        return tuple(dict.fromkeys((*own, "clip", "base")))

    @property
    def dropout(self) -> str:
        """The field of its base that trains classifier-free guidance."""
        return "told_dropout" if isinstance(self.base, ChainSpec) else "caption_dropout"

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level of its paths, before their end at 0."""
        low, high = self.base.sigma_range
        return self.sigma_min or low, self.sigma_max or high

    @property
    def ends_at_lowest(self) -> bool:
        """Whether it is the identity at its lowest level, as published models are, and not at 0."""
        return self.base.predicts == "consistency"

    def cut(self, num_levels: int) -> Cut:
        """How its paths are cut."""
        (low, high), steps = self.sigma_range, self.teacher.steps if self.teacher else 1
        return Cut(num_levels, low, high, not self.ends_at_lowest, self.segments, steps)

    @property
    def classes(self) -> int:
        """Classes of the data, if its network is told them."""
        return self.base.classes

    @property
    def embedded_by(self) -> EmbeddedBy | None:
        """The parent CLIP, if its base is told embeddings."""
        return self.base.embedded_by

    @property
    def clip_needs(self) -> ClipNeeds | None:
        """What its base needs, and the image tower for the distance of that name."""
        told, pictures = self.base.clip_needs, self.distance == "clip"
        if told is None:
            return ClipNeeds(pictures=True) if pictures else None
        return told._replace(
            states={f"base.{field}": width for field, width in told.states.items()},
            embeddings={f"base.{field}": width for field, width in told.embeddings.items()},
            pictures=pictures,
        )

    @property
    def tokens(self) -> Mapping[str, int]:
        """Those of its base."""
        return {f"base.{field}": length for field, length in self.base.tokens.items()}

    @property
    def always_embedded(self) -> bool:
        """Whether its base is told image embeddings, and never trains without one."""
        return self.base.always_embedded

    @property
    def image_size(self) -> int:
        """Side of the prepared images that it trains on."""
        return self.base.image_size

    @property
    def files(self) -> dict[str, str]:
        """The weights of LPIPS, where it is the distance."""
        return {"lpips_weights": self.lpips_weights} if self.distance == "lpips" else {}


class ConsistencyStage(Stage):
    """Trains a network to give the same answer all along a path: the parent's, or that of the image itself.

    Args:
        spec: What to build.
        parents: Those of `spec.base`, and "base" for distillation; "clip" for the distance of that name.

    Raises:
        ValueError: A parent is missing, or the teacher is another than `spec.base` says.
    """

    model: NetworkDenoiser[Any]
    steps: Tensor
    """Optimizer steps so far.  A buffer, so that a resumed run is as far as an unbroken one."""

    def __init__(self, spec: ConsistencySpec, parents: Mapping[str, Trained]) -> None:
        super().__init__()
        self.spec = spec
        for role in spec.needs:
            needed(parents, role, spec.kind)
        student = stage_of(spec.base, parents)
        self.model, self.example = student.model, student.example
        frozen: list[nn.Module] = [*student.frozen]
        if spec.teacher is not None:
            refuse_other(spec, parents["base"])
            self.model.load_state_dict(parents["base"].weights)
            frozen.append(copy_of(self.model, spec.base))
        if (seeing := seeing_of(spec, parents, frozen)) is not None:
            frozen.append(seeing)
        self.distance = distance_of(spec, seeing)
        self.target = copy_of(self.model, spec.base).requires_grad_(False)
        """The EMA of the model that serves as its training target; what ships is another, longer average."""
        self.register_buffer("steps", torch.tensor(0))
        self.freeze(*frozen)

    def players(self, phase: str) -> list[nn.Parameter]:
        """Those of the model; the target follows it (`after_step`)."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def after_step(self) -> None:
        """The target follows the model."""
        mu = self.spec.levels.at(self.steps).mu
        torch._foreach_lerp_(list(self.target.parameters()), list(self.model.parameters()), 1 - mu)
        self.steps += 1

    def forward(self, batch: PairBatch, phase: str = "model") -> Losses:
        spec, example = self.spec, self.example(batch)
        cut = spec.cut(spec.levels.at(self.steps).num_levels)
        pair = draw_pair(example.x0, cut)
        student = bound(self.model, example.told(self.model.network))
        if cut.segments == cut.num_levels - 1:
            target = there  # every interval ends its segment, so an answer there is never used
        else:
            with torch.no_grad():
                target = ended(bound(self.target, example.told(self.target.network)))
        if spec.teacher is not None:
            teacher = following(self.walker(spec.teacher, example), spec.teacher.solver)
            gap = consistency.distillation(student, target, teacher, example.x0, pair, self.distance)
        else:
            gap = consistency.training(student, target, example.x0, pair, self.distance)
        levels = gap.new_tensor(float(cut.num_levels))
        return Losses(gap.mean(), {"gap": gap.detach().mean(), "levels": levels})

    @torch.no_grad()
    def walker(self, how: TeacherSpec, example: Example) -> Denoiser:
        """The parent as the teacher: guided, then clipped if `how` says so and it does not paint latents."""
        teacher = next(part for part in self.frozen if isinstance(part, NetworkDenoiser))
        cond = example.told(teacher.network)
        null = cond if how.guidance_scale == 1 else example.untold(teacher.network)
        scale = torch.full((len(example.x0),), how.guidance_scale)
        guided = classifier_free(teacher, Rows(cond, null, scale))
        latent = isinstance(self.spec.base, ChainSpec) and self.spec.base.latent_channels
        return clip_x0(guided) if how.clipped and not latent else guided


def refuse_cut(levels: FixedLevels | GrowingLevels, segments: int) -> None:
    """Raises ValueError unless levels can be cut into so many equal parts."""
    if segments == 1:
        return
    if not isinstance(levels, FixedLevels):
        raise ValueError(f"{segments} segments cut fixed levels; set levels.kind: fixed, or segments: 1")
    if (levels.num_levels - 1) % segments:
        least = segments * max(2, levels.num_levels // segments) + 1
        raise ValueError(
            f"{levels.num_levels} levels are no {segments} segments of one length; "
            f"set levels.num_levels: {least}"
        )


def refuse_other(spec: ConsistencySpec, teacher: Trained) -> None:
    """Raises ValueError unless the teacher is the base that the spec describes."""
    if not isinstance(teacher.spec, BaseSpec | ChainSpec):
        raise ValueError(
            f"the parent 'base' is a {type(teacher.spec).__name__}, it must be a base or a chain"
        )
    mine, its = lasting(spec.base), lasting(teacher.spec)
    if mine != its:
        field = next(name for name in its if mine.get(name) != its[name])
        raise ValueError(
            f"consistency: base.{field} is not that of the parent base; a distilled model is the same "
            "network, so give both the same spec"
        )


def lasting(spec: BaseSpec | ChainSpec) -> dict[str, Any]:
    """All that a spec says but what is of its training alone: its UNet's dropout, and what stays frozen.

    Consistency models are published without dropout.
    """
    fields = spec.model_dump(exclude={"text_frozen"})
    fields["net"].get("unet", {}).pop("dropout", None)
    return fields


def stage_of(spec: BaseSpec | ChainSpec, parents: Mapping[str, Trained]) -> BaseStage | ChainStage:
    """The diffusion stage of a base spec, for its network and its `example`."""
    if isinstance(spec, BaseSpec):
        return BaseStage(spec, parents["clip"], parents.get("draft"))
    return ChainStage(spec, parents)


def copy_of(model: NetworkDenoiser[Any], spec: BaseSpec | ChainSpec) -> NetworkDenoiser[Any]:
    """The same network with the same weights.  Not by deepcopy, which needs tensors to have content."""
    copied: NetworkDenoiser[Any]
    copied = base.denoiser_of(spec) if isinstance(spec, BaseSpec) else chain_spec.denoiser_of(spec)
    copied.load_state_dict(model.state_dict())
    return copied


def bound(model: NetworkDenoiser[Any], cond: Conditioning) -> Denoiser:
    """A model with its conditioning bound."""

    def denoise(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Denoised:
        return model(x, sigma, cond)

    return denoise


def there(x: Float[Tensor, " b *s"], sigma: Float[Tensor, " b"]) -> Denoised:
    """The denoiser at the end of a path: x as it is."""
    return Denoised(x)


def distance_of(spec: ConsistencySpec, seeing: nn.Module | None) -> Distance:
    """The distance that a spec names; a perceptual one by the network from `seeing_of`."""
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
    """A network as a plain function, so that a stage that holds it does not register its weights."""

    def between(a: Float[Tensor, " b *s"], b: Float[Tensor, " b *s"]) -> Float[Tensor, " b"]:
        return network(a, b)

    return between


def seeing_of(
    spec: ConsistencySpec, parents: Mapping[str, Trained], frozen: Sequence[nn.Module]
) -> nn.Module | None:
    """The network of a perceptual distance, on the CLIP in `frozen` if one is there; None for pixels.

    Raises:
        ValueError: The LPIPS weights cannot be used, or the CLIP is a text tower alone.
    """
    match spec.distance:
        case "lpips":
            return load_lpips(Path(spec.lpips_weights), pooling="average")
        case "clip":
            assert spec.clip_needs is not None
            there = next((part for part in frozen if isinstance(part, Clip)), None)
            clip = there or clip_for(spec.kind, spec.clip_needs, parents["clip"])
            refuse_text_alone(clip.spec)
            return ClipFeatures(clip)
        case _:
            return None
