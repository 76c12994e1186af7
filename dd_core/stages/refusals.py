"""What no hop can do, said before a network is asked; each error names the way out."""

from dd_core.cascade import CascadeState
from dd_core.samplers import SamplingSpec


def refuse_gradient(how: SamplingSpec, kind: str) -> None:
    """For the hops that no guide can read.

    Raises:
        ValueError: A gradient is asked for.
    """
    if how.gradient is not None:
        raise ValueError(f"no guide reads what the {kind} paints; leave its gradient out, give the base one")


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
            "this model has no mask channels; set inpainting: projection, which needs no training, "
            "or train one with inpaints: true"
        )
