"""A trained consistency model as a link of the cascade: painting in a few jumps, and editing.

Sources: Song et al. 2023 (arXiv:2303.01469), algorithms 1 and 4; of a path in segments: Heek et al. 2024
(arXiv:2403.06807), algorithm 2.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dd_core import edits
from dd_core.cascade import CascadeState, Draw
from dd_core.consistency import FixedLevels, segmented
from dd_core.denoiser import Denoiser
from dd_core.guidance import UNLIMITED, Rows
from dd_core.noise import SeededNoise
from dd_core.samplers import SamplingSpec, begin, sigmas_of
from dd_core.stage import Trained
from dd_core.stages.base import BaseHop, BaseSpec
from dd_core.stages.chain_hop import ChainHop, kept_in_range, refuse_told
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.known import known_of, refuse_known
from dd_core.stages.refusals import needed, refuse_edit, refuse_unheard, refuse_unlearned


class ConsistencyHop:
    """What its base is told -> an image in how.num_steps jumps; or an edit of an image.

    Jumps start at training levels: those of taus, or without them num_steps spaced as evenly as possible.
    New noise is drawn after each jump; where the path is cut into segments, only if another jump of the same
    segment follows.  Published models end at their lowest level: without taus their jumps start at the first
    num_steps of num_steps + 1 Karras levels.  A guidance scale other than 1 is on top of the distilled one.

    Args:
        trained: The consistency model.
        parents: Those of its base.
        device: Where it paints.
    """

    def __init__(
        self, trained: Trained, parents: Mapping[str, Trained], *, device: torch.device | str
    ) -> None:
        assert isinstance(trained.spec, ConsistencySpec)
        self.spec = trained.spec
        like = Trained(trained.spec.base, trained.weights)
        own = {role: needed(parents, role, trained.spec.kind) for role in trained.spec.base.needs}
        self.base: BaseHop | ChainHop
        if isinstance(like.spec, BaseSpec):
            self.base = BaseHop(like, own["clip"], own.get("draft"), device=device)
        else:
            self.base = ChainHop(like, own, device=device)

    def refuse(self, state: CascadeState, how: SamplingSpec) -> None:
        refuse_unheard(how, "consistency")
        refuse_jumps(self.spec, how)
        refuse_edit(how, state, has_channels=True)  # its edits need no mask channels
        refuse_known(state, self.base.spec.image_size)
        if state.known is not None and state.hole is None:
            raise ValueError(
                "a consistency model varies no picture, it fills holes; give a mask, or take the base "
                "that it was distilled from"
            )
        if state.noise is not None:
            raise ValueError(
                "a consistency model draws its noise from the seeds alone; leave noise out, or take the base "
                "that it was distilled from"
            )
        if how.strength < 1:
            raise ValueError(
                f"a consistency model begins at the noise, not at strength {how.strength:g}; leave it out"
            )
        if isinstance(spec := self.base.spec, ChainSpec):
            refuse_told(spec, how, state)
            given = (state.known, state.gray, state.coarse)
            if spec.latent_channels and any(part is not None for part in given):
                raise ValueError(
                    "a consistency model of latents edits no picture; take the chain that it is like"
                )

    def start(self, state: CascadeState, how: SamplingSpec) -> Draw:
        self.refuse(state, how)
        sigmas, noise = levels_of(self.spec, how), SeededNoise(state.seeds)
        x = float(sigmas[0]) * noise(torch.empty(self.base.shape(len(state.seeds)), device=self.base.device))
        known = known_of(state, self.base.spec.image_size, self.base.device)
        if known is not None:
            x = x + known.image
        lowest = self.spec.sigma_range[0] if self.spec.ends_at_lowest else 0.0
        sampling = begin(how, x, sigmas, noise, sigma_min=lowest)
        if self.spec.segments > 1:
            sampling = segmented(x, sigmas, self.spec.cut(self.spec.levels.final).ends(), noise)
        rows = self.base.rows(state, how)
        if self.spec.segments > 1 and how.clip is None:  # an estimate of a segment's end is no picture
            rows = rows._replace(limits=torch.tensor([UNLIMITED] * len(state.seeds)))
        return Draw(edits.edited(sampling, known.edit) if known else sampling, rows)

    def denoiser(self, rows: Rows) -> Denoiser:
        return self.base.denoiser(rows)

    def finish(self, state: CascadeState, x0: Tensor) -> CascadeState:
        return self.base.finish(state, x0)


def refuse_jumps(spec: ConsistencySpec, how: SamplingSpec) -> None:
    """Refuse a sampling that a consistency model cannot do, whatever the request.

    Raises:
        ValueError: Jumps that do not end where the segments of its path do, or begin at levels that it was
            not trained at; guidance that it has not learned; clipping to pixels of what is no picture.
    """
    refuse_unlearned(how.guidance_scale, spec.base.guides_itself, spec.dropout)
    possible, last = possible_jumps(spec), spec.levels.final - 1
    many = how.num_steps > last or bool(how.taus and how.taus[-1] != last)
    latent = isinstance(spec.base, ChainSpec) and spec.base.latent_channels > 0
    remedies = (
        (
            bool(possible) and (bool(how.taus) or how.num_steps not in possible),
            f"its path is in {spec.segments} segments: it takes {' or '.join(map(str, possible))} steps, and "
            f"no taus; set num_steps: {spec.segments}",
        ),
        (
            not possible and not spec.ends_at_lowest and many,
            f"it was trained at {last + 1} levels; set num_steps to at most {last}, and let taus, if "
            f"there are any, end in {last}",
        ),
        (
            bool(kept_in_range(how)) and (latent or spec.segments > 1),
            f"{kept_in_range(how)} is for pictures, and this model answers with "
            f"{'latents' if latent else 'ends of segments'}; leave it out",
        ),
    )
    for wrong, remedy in remedies:
        if wrong:
            raise ValueError(remedy)


def possible_jumps(spec: ConsistencySpec) -> tuple[int, ...]:
    """In how many jumps its pictures can be drawn; empty: in any number."""
    if spec.segments == 1:
        return ()
    assert isinstance(spec.levels, FixedLevels)
    intervals = spec.levels.num_levels - 1
    return tuple(n for n in range(spec.segments, intervals + 1, spec.segments) if intervals % n == 0)


def levels_of(spec: ConsistencySpec, how: SamplingSpec) -> Float[Tensor, " n"]:
    """The levels at which jumps begin, falling, and the end, 0."""
    if spec.ends_at_lowest:
        low, high = spec.sigma_range
        jumps = how.but(taus=how.taus or tuple(range(how.num_steps + 1)))
        return sigmas_of(jumps, sigma_min=low, sigma_max=high)
    cut = spec.cut(spec.levels.final)
    even = [round(jump * (cut.num_levels - 1) / how.num_steps) for jump in range(how.num_steps + 1)]
    return cut.grid()[:: cut.steps][list(how.taus) or even]
