"""Checks for missing parents and impossible requests, before a network is called; errors name a remedy."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from dd_core.cascade import CascadeState, as_said
from dd_core.samplers import SampledVariance, SamplingSpec
from dd_core.stage import LearnedSpec, Trained


def needed(parents: Mapping[str, Trained], role: str, kind: str) -> Trained:
    """The parent of a role, or an error that names role and stage.

    Raises:
        ValueError: It is missing.
    """
    if role not in parents:
        raise ValueError(f"{kind}: needs the parent {role!r}; train it first and name it in parents")
    return parents[role]


def refuse_vocabularies(parents: Mapping[str, Trained]) -> None:
    """For training, where prepared captions are tokens of CLIP's vocabulary.

    Raises:
        ValueError: A parent has a vocabulary of its own.
    """
    for role, parent in parents.items():
        if parent.vocabulary is not None:
            raise ValueError(
                f"the parent {role!r} reads captions by a vocabulary of its own, and prepared data holds "
                "CLIP's tokens; sample it as it is, or train a model of the same spec without it"
            )


class Hears(NamedTuple):
    """Which options of a sampling a kind of hop uses; the others are refused if they are asked for.

    It does not cover num_steps, spacing (for hops that go through noise levels), or what a request sets for
    the whole cascade: strength and inpainting.
    """

    variances: tuple[SampledVariance, ...] = ("fixed_small", "fixed_large")
    """The values of `variance` that its steps by sampler ddpm may have, the best first."""
    draws: bool = False
    """Whether it can draw several results for a request (`draws`), of which it keeps one."""
    guided: bool = True
    """Whether it uses guidance_scale, guidance_rescale and guidance_interval."""
    led: bool = True
    """Whether the gradient of a guide can lead it (`gradient`)."""
    clipped: bool = True
    """Whether it uses clip and dynamic_threshold."""
    levels: bool = True
    """Whether it goes through noise levels step by step; without, it uses no sampler, no spacing, and of
    guidance the scale alone."""


HEARS = {
    "base": Hears(),
    "chain": Hears(),
    "consistency": Hears(led=False),
    "upsampler": Hears(guided=False, led=False),
    "prior": Hears(draws=True, led=False, clipped=False),
    "causal_prior": Hears(("analytic", "fixed_small", "fixed_large"), draws=True, led=False, clipped=False),
    "autoregressive_prior": Hears(draws=True, led=False, clipped=False, levels=False),
}
"""Kind of a stage -> what its hop hears; a chain that learns its variance hears that too, and one that
predicts the image as well has the analytic variance."""


def refuse_unlinked(kind: str) -> None:
    """Raises ValueError if stages of this kind are no hops."""
    if kind not in HEARS:
        raise ValueError(f"{a(kind)} is no link of a cascade; {', '.join(HEARS)} are")


def refuse_unheard(how: SamplingSpec, kind: str, *, hears: Hears | None = None) -> None:
    """Refuse options of a sampling that this kind of hop would ignore, or cannot do.

    Args:
        how: What is asked for.
        kind: Of the stage, one of HEARS.
        hears: What this hop uses, if more than others of its kind.

    Raises:
        ValueError: With what to do about it.
    """
    hears, usual = hears or HEARS[kind], SamplingSpec()
    scaled = how.guidance_scale != 1 and "guidance_scale" in as_said(how).model_fields_set
    contrast = how.guidance_rescale > 0 or how.guidance_interval is not None
    walked = how.sampler != usual.sampler or how.spacing != usual.spacing
    remedies = (
        (
            not hears.draws and how.draws != 1,
            f"{a(kind)} keeps no best of {how.draws} draws; leave draws out, give the prior it",
        ),
        (
            not hears.led and how.gradient is not None,
            f"no guide reads what the {kind} paints; leave its gradient out, give the base one",
        ),
        (
            not hears.guided and (scaled or contrast),
            f"the {kind} is told no caption, so none guides it; set guidance_scale: 1, and leave "
            "guidance_rescale and guidance_interval out",
        ),
        (
            not hears.clipped and (how.clip is not None or how.dynamic_threshold is not None),
            f"clip and dynamic_threshold are for pixels, and {a(kind)} draws embeddings; leave them out",
        ),
        (
            not hears.levels and (walked or contrast),
            f"{a(kind)} has no noise levels; leave out sampler, spacing, guidance_interval and "
            "guidance_rescale",
        ),
        (
            kind != "chain" and how.temperature != 1,
            f"temperature is for the noise that a chain begins with, not {a(kind)}; leave it out",
        ),
        *sampled(how, kind, hears),
    )
    for wrong, remedy in remedies:
        if wrong:
            raise ValueError(remedy)


def sampled(how: SamplingSpec, kind: str, hears: Hears) -> list[tuple[bool, str]]:
    """Checks of sampler and variance for this kind of hop: (whether it fails, what to do about it)."""
    jumps, ancestral = how.sampler == "consistency", how.sampler == "ddpm"
    known = " or ".join(name for name in hears.variances if name != "fixed_large")
    unlearned, unmeasured = (
        ancestral and how.variance == name and name not in hears.variances for name in ("learned", "analytic")
    )
    return [
        (
            jumps and kind != "consistency",
            f"{a(kind)} is no consistency model; use ddim or dpmpp_2m, or distil it",
        ),
        (
            not jumps and kind == "consistency",
            f"a consistency model jumps; set its sampler to consistency, not {how.sampler}",
        ),
        (
            unlearned,
            f"this {kind} does not learn its variance (chains do, by loss hybrid or vlb); set variance: "
            f"{known}, fixed_large for 250 steps and more, or sampler: ddim",
        ),
        (
            unmeasured,
            f"{a(kind)}'s errors are not measured; set variance: {known}",
        ),
    ]


def a(kind: str) -> str:
    """The kind of a stage with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def refuse_unlearned(scale: float, guides_itself: bool, dropout: str) -> None:
    """Raises ValueError if guidance is asked of a model that was trained without dropped conditions."""
    if scale != 1 and not guides_itself:
        raise ValueError(
            f"guidance_scale {scale:g}, but the model has not learned to paint both told and not told; "
            f"set guidance_scale: 1, or train with {dropout}"
        )


def refuse_kept(state: CascadeState, kind: str) -> None:
    """Raises ValueError if a hop is asked to keep a picture's brightness or blocks; for hops that cannot."""
    if state.gray is not None or state.coarse is not None:
        given = "the brightness of a picture" if state.gray is not None else "the pixels of a smaller picture"
        raise ValueError(
            f"{a(kind)} does not keep {given}; take a consistency model, or give a picture and its hole"
        )


def refuse_weights(bounds: tuple[float, float]) -> None:
    """Raises ValueError unless the bounds of a loss weight are at least 0 and do not fall."""
    if not 0 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"weight_range {bounds} must be at least 0 and must not fall; put the lower one first"
        )


def refuse_small(image_size: int, factor: int, small: Tensor | None) -> None:
    """Raises ValueError unless there is a picture to enlarge, of the size that becomes image_size."""
    side = image_size // factor
    if factor > 1 and (small is None or small.shape[1:] != (3, side, side)):
        raise ValueError(
            f"it enlarges {side} px and got {None if small is None else tuple(small.shape[1:])}; "
            "put the hop that paints it before this one"
        )


def refuse_unembedded(spec: LearnedSpec, embedding: Tensor | None) -> None:
    """Raises ValueError if a network that never trained without an image embedding gets none."""
    if spec.always_embedded and embedding is None:
        raise ValueError(
            "it was told an image embedding at every step of its training (embedding_dropout 0) and got "
            "None; put a prior before it"
        )


def given_noise(state: CascadeState, like: Tensor) -> Tensor | None:
    """The noise that a request gives instead of `like`, which its seeds draw; None if it gives none.

    Raises:
        ValueError: It has the shape of another hop's noise, or a picture to edit is given as well.
    """
    if state.noise is None:
        return None
    if state.known is not None:
        raise ValueError("noise to begin with and a picture to edit exclude each other; leave one out")
    if state.noise.shape != like.shape:
        raise ValueError(
            f"the noise to begin with is {tuple(state.noise.shape)}, this hop's is {tuple(like.shape)}; "
            "encode the picture with this hop"
        )
    return state.noise.to(like)


def refuse_edit(how: SamplingSpec, state: CascadeState, *, has_channels: bool) -> None:
    """Refuse a picture to edit that does not fit its hole, strength or inpainting; for every hop.

    Raises:
        ValueError: With what to do about it.
    """
    known, hole = state.known, state.hole
    if known is None:
        if hole is not None or how.strength < 1:
            what = "a hole" if hole is not None else f"strength {how.strength:g}"
            raise ValueError(f"{what} needs the picture that it is of; give one")
        return
    if known.ndim != 4 or known.shape[1] != 3:
        raise ValueError(f"the picture to edit is {tuple(known.shape)}, not RGB; convert it to RGB")
    if hole is None:
        return
    if hole.shape != (len(known), 1, *known.shape[2:]):
        raise ValueError(
            f"the hole is {tuple(hole.shape[2:])}, the picture {tuple(known.shape[2:])}; make the sizes equal"
        )
    if how.inpainting == "model" and not has_channels:
        raise ValueError(
            "this model has no mask channels; set inpainting: projection (--training-free), which needs no "
            "training, or train one with inpaints: true"
        )
