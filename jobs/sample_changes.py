"""`--set HOP.FIELD=VALUE` of `ddiff sample`: what one call changes in how the hops of a cascade work."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dd_core.cascade import HopSpec
from dd_core.samplers import HEARD_BY, SamplingSpec
from jobs.config import ConfigError, apply
from jobs.failures import words_of


def changed(hops: Sequence[HopSpec], changes: Sequence[str], steps: int | None = None) -> list[HopSpec]:
    """The hops with these changes, which count as if the cascade itself said so.

    What the cascade says of the sampler that a change replaces is left out.

    Args:
        hops: Of the cascade.
        changes: Such as base.sampler=heun, base.churn.amount=40, prior.draws=4.
        steps: Asked of the hops that follow the request, so that a change is judged beside them.

    Raises:
        ConfigError: There is no such hop or field, or the values do not go together.
    """
    names = [hop.stage for hop in hops]
    fields = {hop.stage: said(hop.how) for hop in hops}
    for change in changes:
        name = name_in(change)
        if name not in names:
            raise ConfigError(f"--set {change}: no hop {name!r}; there are {', '.join(dict.fromkeys(names))}")
        apply(fields, change)
    touched = {name_in(change) for change in changes}
    for hop in hops:
        named = [path_in(change)[0] for change in changes if name_in(change) == hop.stage]
        leave_foreign_out(fields[hop.stage], named)
        if named and steps is not None and hop.follows_request and "num_steps" not in named:
            fields[hop.stage]["num_steps"] = steps
    return [settled(hop, fields[hop.stage]) if hop.stage in touched else hop for hop in hops]


def name_in(change: str) -> str:
    """The hop that a change names.

    Raises:
        ConfigError: It names none.
    """
    path, equals, _ = change.partition("=")
    name, dot, field = path.partition(".")
    if not (equals and dot and name and field):
        raise ConfigError(f"--set {change}: write it as HOP.FIELD=VALUE, such as base.num_steps=50")
    return name


def path_in(change: str) -> list[str]:
    """The fields that a change goes through within its hop."""
    return change.partition("=")[0].split(".")[1:]


def leave_foreign_out(fields: dict[str, Any], named: Sequence[str]) -> None:
    """Drop what belongs to another sampler than the one that was chosen, unless it was named, too."""
    if "sampler" not in named:
        return
    image = {"clip": "ddim"} if fields.get("clip") == "image" else {}
    for field, sampler in (HEARD_BY | image).items():
        if sampler != fields["sampler"] and field not in named:
            fields.pop(field, None)


def said(how: SamplingSpec) -> dict[str, Any]:
    """The fields that a sampling sets; those not set, or None, are left out."""
    return how.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def settled(hop: HopSpec, fields: Mapping[str, Any]) -> HopSpec:
    """A hop that is sampled by these fields.

    Raises:
        ConfigError: It cannot be; field and reason are named.
    """
    try:
        how = SamplingSpec.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"--set: {words_of(error, fields, hop.stage)}") from None
    try:
        return hop.but(how=how)
    except ValidationError as error:
        raise ConfigError(f"--set: {words_of(error)}") from None


def refuse_overruled(
    changes: Sequence[str], hops: Sequence[HopSpec], final: Sequence[SamplingSpec | None]
) -> None:
    """Refuse a --set that another option overrules, or whose hop does not run.

    Args:
        changes: As given.
        hops: With these changes.
        final: How each is sampled in the end; None: it is left out.

    Raises:
        ConfigError: With what to leave out.
    """
    for hop, how in zip(hops, final, strict=True):
        for change in changes:
            if name_in(change) != hop.stage:
                continue
            if how is None:
                raise ConfigError(f"--set {change}: a picture takes the place of this hop here; leave it out")
            path = path_in(change)
            if (other := at(how, path)) != at(hop.how, path):
                raise ConfigError(f"--set {change}: another option makes it {other}; leave one of them out")


def at(how: SamplingSpec, path: Sequence[str]) -> Any:
    """The value of a field, however deep."""
    inner: Any = how.model_dump(mode="json")
    for name in path:
        inner = inner[int(name) if isinstance(inner, list) else name] if inner is not None else None
    return inner
