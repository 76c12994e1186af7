"""What a stage lacks and what no hop can do, said before a network is asked; each error names the way out."""

from collections.abc import Mapping

from torch import Tensor

from dd_core.cascade import CascadeState
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained


def needed(parents: Mapping[str, Trained], role: str, kind: str) -> Trained:
    """One of the parents, or an error that says whose is missing.

    Raises:
        ValueError: It is missing.
    """
    if role not in parents:
        raise ValueError(f"{kind}: needs the parent {role!r}; train it first and name it in parents")
    return parents[role]


def refuse_vocabularies(parents: Mapping[str, Trained]) -> None:
    """For training: prepared captions are tokens of CLIP's vocabulary, whatever a parent has learned.

    Raises:
        ValueError: A parent brings another vocabulary along.
    """
    for role, parent in parents.items():
        if parent.vocabulary is not None:
            raise ValueError(
                f"the parent {role!r} reads captions by a vocabulary of its own, and prepared data holds "
                "CLIP's tokens; sample it as it is, or train a model of the same spec without it"
            )


def refuse_gradient(how: SamplingSpec, kind: str) -> None:
    """For the hops that no guide can read.

    Raises:
        ValueError: A gradient is asked for.
    """
    if how.gradient is not None:
        raise ValueError(f"no guide reads what the {kind} paints; leave its gradient out, give the base one")


def refuse_draws(how: SamplingSpec, kind: str) -> None:
    """For the hops that choose nothing.

    Raises:
        ValueError: Several draws are asked for.
    """
    if how.draws != 1:
        raise ValueError(f"a {kind} keeps no best of {how.draws} draws; leave draws out, give the prior it")


def given_noise(state: CascadeState, like: Tensor) -> Tensor | None:
    """What a sampling begins with instead of `like`, noise drawn by the seeds; None unless it is given.

    Raises:
        ValueError: It is noise of another hop, or a picture to edit is given as well.
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
    """A picture to edit that cannot be edited so; for every hop.

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
