"""What a stage can be asked to paint, decided by its spec alone: before training, without weights."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

from dd_core.cascade import CascadeState, Role
from dd_core.samplers import SamplingSpec, sigmas_of
from dd_core.schedules import sigma_range
from dd_core.stage import LearnsEmbeddings
from dd_core.stages import StageSpec
from dd_core.stages.autoregressive_prior import AutoregressivePriorSpec
from dd_core.stages.base import BaseSpec
from dd_core.stages.causal_prior import CausalPriorStageSpec
from dd_core.stages.chain_hop import refuse, refuse_label
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency_hop import refuse_jumps
from dd_core.stages.consistency_spec import ConsistencySpec
from dd_core.stages.guides import ROLES, refuse_aim, refuse_sizes
from dd_core.stages.prior import PriorSpec
from dd_core.stages.refusals import refuse_unheard, refuse_unlearned, refuse_unlinked
from dd_core.stages.upsampler import UpsamplerSpec


def refuse_sampling(spec: StageSpec, how: SamplingSpec, guides: Collection[str]) -> None:
    """Raises ValueError for options that a hop of this stage cannot do or would ignore, or if it has none."""
    refuse_unlinked(spec.kind)
    if isinstance(spec, ChainSpec):
        refuse(spec, how, guides)
    else:
        refuse_unheard(how, spec.kind)
    if isinstance(spec, ConsistencySpec):
        refuse_jumps(spec, how)
    if isinstance(spec, BaseSpec | PriorSpec | CausalPriorStageSpec | AutoregressivePriorSpec):
        refuse_unlearned(how.guidance_scale, spec.guides_itself, "caption_dropout")
    if isinstance(spec, BaseSpec | PriorSpec | UpsamplerSpec):
        sigmas_of(how, sigma_min=spec.sigma_min, sigma_max=spec.sigma_max)
    if isinstance(spec, CausalPriorStageSpec):
        low, high = sigma_range(spec.schedule)
        sigmas_of(how, sigma_min=low, sigma_max=high, chain=spec.schedule)


def refuse_guides(spec: StageSpec, how: SamplingSpec, guides: Mapping[Role, StageSpec]) -> None:
    """Raises ValueError, as the hop itself does, if a guide cannot read what a hop of this stage paints.

    Args:
        spec: Of the stage.
        how: How the hop is to be sampled; has passed `refuse_sampling`.
        guides: Role -> stage, for the guides that are known.
    """
    if how.gradient is not None:
        reads: dict[str, int] = {role: guides[role].image_size for role in ROLES if role in guides}
        decoded = isinstance(spec, ChainSpec) and spec.latent_channels > 0
        refuse_sizes(how.gradient, reads, spec.image_size, decoded=decoded)


def refuse_cascade(hops: Sequence[tuple[str, StageSpec]], image_size: int) -> None:
    """Refuse hops that do not get what they need from the hops before them, whatever the request.

    Args:
        hops: Name and stage of each, in the order in which a request passes them.
        image_size: Side of the finished picture, in pixels.

    Raises:
        ValueError: A hop enlarges pictures of another size than is painted before it, or needs an image
            embedding (embedding_dropout 0) and none is drawn before it; or the last hop paints another size
            than image_size.
    """
    painted, embedded = 0, False
    for name, spec in hops:
        if isinstance(spec, LearnsEmbeddings):
            embedded = True
            continue
        if spec.always_embedded and not embedded:
            raise ValueError(
                f"hop {name}: it is told an image embedding at every step of its training (embedding_dropout "
                "0), and no hop before it draws one; put a prior there, or train it with embedding_dropout"
            )
        factor = spec.factor if isinstance(spec, UpsamplerSpec | ChainSpec) else 1
        if factor > 1 and painted * factor != spec.image_size:
            raise ValueError(
                f"hop {name}: it enlarges {spec.image_size // factor} px to {spec.image_size}, and before it "
                f"{f'{painted} px' if painted else 'nothing'} is painted; change its factor, or the hop "
                "before it"
            )
        painted = spec.image_size
    if painted != image_size:
        raise ValueError(
            f"cascade.image_size is {image_size}, but its last hop paints {painted} px; make them equal"
        )


def refuse_request(
    spec: StageSpec, how: SamplingSpec, guides: Mapping[Role, StageSpec], state: CascadeState
) -> None:
    """Refuse, as the hop itself does, a request that lacks what the hop needs or names what it does not know.

    Args:
        spec: Of the stage.
        how: How the hop is to be sampled; has passed `refuse_sampling`.
        guides: Role -> stage, for the guides that are known.
        state: The request before the first hop.

    Raises:
        ValueError: With what to do about it.
    """
    chain = spec.base if isinstance(spec, ConsistencySpec) else spec
    if isinstance(chain, ChainSpec):
        refuse_label(chain, how, state.label)
    refuse_guides(spec, how, guides)
    if how.gradient is not None:
        refuse_aim(how.gradient, state, guides["classifier"].classes if "classifier" in guides else 0)


@lru_cache(maxsize=1024)
def nearest_steps(spec: StageSpec, how: SamplingSpec, wanted: int, most: int) -> int:
    """The number of steps nearest to `wanted` that a hop of this stage can take, otherwise sampled by `how`.

    The larger of two that are equally near; at most `most`; `how.num_steps` if no number is possible.
    """
    for away in range(max(wanted, most)):
        for count in (wanted + away, wanted - away):
            if 1 <= count <= most and can_take(spec, how, count):
                return count
    return how.num_steps


def can_take(spec: StageSpec, how: SamplingSpec, steps: int) -> bool:
    """Whether a hop of this stage can be sampled in so many steps."""
    guides = how.gradient.guides() if how.gradient else set()
    try:
        refuse_sampling(spec, how.but(num_steps=steps), guides)
    except ValueError:
        return False
    return True


def reads_caption(spec: StageSpec) -> bool:
    """Whether a hop of this stage is told the caption."""
    match spec:
        case ChainSpec():
            return spec.text_width > 0
        case ConsistencySpec():
            return reads_caption(spec.base)
        case _:
            priors = PriorSpec | CausalPriorStageSpec | AutoregressivePriorSpec
            return isinstance(spec, BaseSpec | priors)


def hears_negative(spec: StageSpec) -> bool:
    """Whether a hop of this stage, where it is guided, uses a negative caption."""
    chain = spec.base if isinstance(spec, ConsistencySpec) else spec
    learned = not isinstance(chain, ChainSpec) or chain.guides_itself
    return learned and reads_caption(chain)


def led_away(spec: StageSpec, how: SamplingSpec) -> bool:
    """Whether a hop of this stage, sampled by `how`, uses a negative caption."""
    return how.guidance_scale != 1 and hears_negative(spec)
