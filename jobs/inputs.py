"""What a job reads must lie where its nodes find it: an address, or a path that all of them see."""

from collections.abc import Iterator
from pathlib import Path

from jobs.config import ConfigError
from jobs.environment import same_everywhere
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec


def refuse_local(spec: RunSpec | PairsSpec) -> None:
    """Refuse inputs that a job would not find: here that costs nothing.

    Raises:
        ConfigError: A path is relative to the user's folder, which no node has; or data would be prepared
            into the folder of the job, which is deleted with it.
    """
    pairs = spec if isinstance(spec, PairsSpec) else None if spec.shapes else spec.pairs
    if pairs is not None and not same_everywhere(pairs.destination):
        raise ConfigError(
            f"destination {pairs.destination!r} would lie in the folder of the job, which Ray deletes; write "
            "s3://bucket/prepared or a directory that every node sees"
        )
    for shard in pairs.shards if pairs else ():
        refuse_here("shards", shard)
    for place, path in read_by(spec) if isinstance(spec, RunSpec) else ():
        refuse_here(place, path)


def read_by(spec: RunSpec) -> Iterator[tuple[str, str]]:
    """(field, path) of every file and bundle that a run names; not of its own stages."""
    own = {stage.name for stage in spec.stages}
    for stage in spec.stages:
        for role, parent in stage.parents.items():
            if parent not in own and ("/" in parent or Path(parent).exists()):  # else one made before
                yield f"stages.{stage.name}.parents.{role}", parent
        for field, file in stage.stage.files.items():
            yield f"stages.{stage.name}.stage.{field}", file
    if path := path_of(spec.evaluation.judge):
        yield "evaluation.judge", path


def path_of(judge: str) -> str:
    """The path or the address in the name of a CLIP; empty for MODEL/TAG."""
    if "://" in judge:
        return judge
    _, separator, file = judge.partition(":")
    return file if separator else judge if Path(judge).exists() else ""


def refuse_here(place: str, path: str) -> None:
    """Refuse a relative path; `place` is the field that names it.

    Raises:
        ConfigError: It means something else, or nothing, on a node.
    """
    if not same_everywhere(path):
        raise ConfigError(
            f"{place} {path!r} is a path beside this folder, which no node has; put it where all of them see "
            "it and write s3://bucket/... or a path that begins with /"
        )
