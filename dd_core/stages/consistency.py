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
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dd_core import consistency
from dd_core.consistency import (
    Cut,
    Distance,
    Follow,
    draw_pair,
    ended,
    following,
)
from dd_core.denoiser import Conditioning, Denoised, Denoiser, NetworkDenoiser
from dd_core.guidance import Rows, classifier_free, clip_x0
from dd_core.nets.clip import Clip
from dd_core.nets.perceptual import ClipFeatures, load_lpips
from dd_core.stage import Example, Losses, PairBatch, Stage, Trained
from dd_core.stages import base, chain_spec
from dd_core.stages.base import BaseSpec, BaseStage
from dd_core.stages.chain import ChainStage
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.clip import clip_for, refuse_text_alone
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from dd_core.stages.refusals import needed


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
        if spec.teacher is None:
            pair = draw_pair(example.x0, cut)
            gap = consistency.training(*self.pupils(example, cut), example.x0, pair, self.distance)
        elif spec.teacher.paths_from == "images":
            pair, teacher = draw_pair(example.x0, cut), self.followed(spec.teacher, example)
            pupils = self.pupils(example, cut)
            gap = consistency.distillation(*pupils, teacher, example.x0, pair, self.distance)
        else:
            teacher = self.followed(spec.teacher, example)
            noisy, pair = consistency.rollout(teacher, torch.randn_like(example.x0), cut)
            pupils = self.pupils(example, cut, rows=cut.num_levels - 1)
            gap = consistency.gap(*pupils, noisy, pair, self.distance)
        levels = gap.new_tensor(float(cut.num_levels))
        return Losses(gap.mean(), {"gap": gap.detach().mean(), "levels": levels})

    def pupils(self, example: Example, cut: Cut, rows: int = 1) -> tuple[Denoiser, Denoiser]:
        """Student and target, told each example as many times in a row as it has rows."""
        picked = torch.arange(len(example.x0)).repeat_interleave(rows)
        student = bound(self.model, example.told(self.model.network).pick(picked))
        if cut.segments == cut.num_levels - 1:
            return student, there  # every interval ends its segment, so an answer there is never used
        with torch.no_grad():
            target = bound(self.target, example.told(self.target.network).pick(picked))
        return student, ended(target)

    def followed(self, how: TeacherSpec, example: Example) -> Follow:
        """The path of the teacher, as `how` says."""
        return following(self.walker(how, example), how.solver)

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
