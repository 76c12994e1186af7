"""What a consistency model is: whose network it has, and how it is taught.

Sources: Song et al. 2023 (arXiv:2303.01469), algorithms 2 and 3; distilled guidance: Luo et al. 2023
(arXiv:2310.04378), section 4.2; segments: Heek et al. 2024 (arXiv:2403.06807); paths from noise: Luhman &
Luhman 2021 (arXiv:2101.02388).
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dd_core.consistency import Cut, FixedLevels, GrowingLevels, Solver
from dd_core.spec import Spec
from dd_core.stage import ClipNeeds, EmbeddedBy, LearnedSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.refusals import refuse_unlearned


class TeacherSpec(Spec):
    """How the parent `base` is sampled as the teacher."""

    guidance_scale: float = Field(3.0, ge=0, le=50)
    """It is distilled too, so that sampling the student at scale 1 is guided by it."""
    solver: Solver = "heun"
    """heun asks the parent twice a step, as published; ddim once."""
    steps: int = Field(1, ge=1)
    """Of the teacher, from one level to the next.  With several, fewer levels are enough: the target need not
    have learned first what the teacher walks."""
    paths_from: Literal["images", "noise"] = "images"
    """Where the paths begin that the student learns: at images with noise, as published, one interval each;
    or at noise, which the teacher follows to its picture, so that the student learns from where sampling will
    lead it: each image of a batch, of which it then only sees what the network is told, is all intervals of a
    path, so a batch of b is b x (levels - 1) rows."""
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
