"""Bits per dim of pictures under a trained chain: their variational bound, term by term.

The chain is conditioned as in training, but must not be told anything of the picture itself: a chain that is
told an embedding of it, or the picture made smaller, would know a part of the answer, and is refused.

Sources: Ho et al. 2020 (arXiv:2006.11239), eq. 5; Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.3.
"""

from jaxtyping import Float
from torch import Tensor

from dd_core import schedules
from dd_core.cascade import CascadeState
from dd_core.likelihood import Bits, bits_per_dim
from dd_core.noise import SeededNoise, Variance
from dd_core.samplers import SamplingSpec
from dd_core.schedules import ScheduleSpec
from dd_core.spec import Spec
from dd_core.stages.chain_hop import ChainHop, refuse_told
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.refusals import a

UNGUIDED = SamplingSpec(guidance_scale=1.0)


def refuse_bits(spec: Spec) -> None:
    """Raises ValueError, with the reason, if the bound in bits is not defined for this stage."""
    kind = getattr(spec, "kind", type(spec).__name__)
    if not isinstance(spec, ChainSpec):
        raise ValueError(
            f"bits per dim are a sum over the steps of a chain of timesteps, and {a(kind)} has none; take a "
            "chain, as recipes ddpm and improved_ddpm train it"
        )
    remedies = (
        (
            not isinstance(spec.schedule, ScheduleSpec),
            "it was trained on all noise levels (EDM) and has no timesteps to sum over",
        ),
        (bool(spec.latent_channels), "it paints latents, and their bits are not those of pixels"),
        (spec.factor > 1, "it is told the picture itself, smaller: its bits are not those of the picture"),
        (
            bool(spec.embedding_width),
            "it is told an embedding of the picture itself: its bits are not those of the picture",
        ),
    )
    for wrong, why in remedies:
        if wrong:
            raise ValueError(f"bits per dim are not defined for this chain: {why}; take another chain")


def refuse_variance(spec: ChainSpec, variance: Variance) -> None:
    """Raises ValueError for a learned variance if the chain does not learn it."""
    if variance == "learned" and not spec.learns_variance:
        raise ValueError("the chain does not learn its variance; take fixed_large or fixed_small")


def table_of(spec: ChainSpec, num_steps: int | None = None) -> Float[Tensor, " t"]:
    """The noise levels of a chain, rising: all, or `num_steps` of them, evenly spaced from first to last.

    Raises:
        ValueError: The chain has fewer timesteps.
    """
    assert isinstance(spec.schedule, ScheduleSpec)
    if num_steps is None:
        return schedules.sigmas(spec.schedule)
    return schedules.walk(spec.schedule, "linspace", num_steps).sigmas[:-1].flip(0)


def bits_of(
    hop: ChainHop,
    x0: Float[Tensor, " b 3 h w"],
    state: CascadeState,
    table: Float[Tensor, " t"],
    *,
    variance: Variance,
) -> Bits:
    """The bound of pictures, in bits per number, on the CPU; estimates are clipped, as published.

    Args:
        hop: The chain.
        x0: 8-bit pixels in [-1, 1].
        state: The conditioning of the pictures; its seeds fix their noise.
        table: `table_of`.
        variance: Of the steps.

    Raises:
        ValueError: The bound is not defined for this chain, or the state lacks conditions that it needs.
    """
    refuse_bits(hop.spec)
    refuse_variance(hop.spec, variance)
    refuse_told(hop.spec, UNGUIDED, state, own_vocabulary=hop.vocabulary is not None)
    if hop.clip is not None and state.tokens.shape[1] != (length := hop.clip.spec.context_length):
        raise ValueError(
            f"captions of {state.tokens.shape[1]} tokens, but its CLIP reads {length}; prepare with that"
        )
    denoise = hop.denoiser(hop.rows(state, UNGUIDED))
    found = bits_per_dim(denoise, x0.to(hop.device), table, SeededNoise(state.seeds), variance=variance)
    return Bits(*(part.double().cpu() for part in found))
