"""What a training is made of: spec, data, parents, files; whether two agree in it, and if not, where.

It is written down beside a training (made_of.json), in each of its checkpoints and in its bundle.  What an
older version of the code wrote is read by today's spec, which fills in new fields: so a new field changes
nothing, but a changed default does, since the old value was written down.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from dd_core import sealed
from workflows import feed
from workflows.journal import flat
from workflows.train_spec import TECHNICAL, TECHNICAL_OF_BUDGET, TrainSpec

FILES, EMBEDDINGS = "named_files", "embeddings"
"""Names of facts that older versions did not write."""
SHOWN = 60
"""Characters of a value in a message."""
UNKNOWN = "it was trained by a version that noted no spec"


class MadeOf(NamedTuple):
    """What the result of a training depends on."""

    spec: TrainSpec
    data: str
    """Digest of the prepared data."""
    parents: Mapping[str, str]
    """Role -> digest."""
    files: Mapping[str, str]
    """Field of the stage that names a file -> its sha256."""

    @property
    def fingerprint(self) -> str:
        """Digest of all of it."""
        return self.spec.fingerprint(self.data, self.parents, self.files)

    def facts(self, fingerprint: str = "") -> dict[str, Any]:
        """What to write down.

        Args:
            fingerprint: The one it began with, if an older version calculated that otherwise.
        """
        return {
            "fingerprint": fingerprint or self.fingerprint,
            "spec": self.spec.model_dump(mode="json"),
            "data": self.data,
            "parents": dict(self.parents),
            FILES: dict(self.files),
            EMBEDDINGS: feed.EMBEDDINGS,
        }


def named_files(spec: TrainSpec) -> dict[str, str]:
    """sha256 of each file that a stage names, by the field that does.

    Raises:
        ValueError: There is no such file.
    """
    for field, path in spec.stage.files.items():
        if not Path(path).is_file():
            raise ValueError(
                f"{spec.name}: stage.{field} names the file {path!r}, and there is none; mend it"
            )
    return {field: sealed.sha256(Path(path)) for field, path in spec.stage.files.items()}


def same(was: Mapping[str, Any], now: MadeOf) -> bool:
    """Whether a recorded training is the one that is wanted now.

    Args:
        was: Facts of a bundle or a checkpoint, or made_of.json, of this version or an older one, which
            ignored files; a fingerprint alone suffices if it was calculated as today or just before.
        now: What is wanted.
    """
    old = () if FILES in was else (now.spec.old_fingerprint(now.data, now.parents),)
    if was.get("fingerprint") in (now.fingerprint, *old):
        return True
    spec = read(was)
    if spec is None:
        return False
    files, made = was.get(FILES, now.files), was.get(EMBEDDINGS, 1)
    return spec.fingerprint(was["data"], was["parents"], files, embeddings=made) == now.fingerprint


def read(was: Mapping[str, Any]) -> TrainSpec | None:
    """The recorded spec, without its technical fields; None if there is none that can be read.

    How many workers it had stays: of some stages the samples that all of them compare at a time count.
    """
    if not {"spec", "data", "parents"} <= was.keys():
        return None
    try:
        left_out = {*TECHNICAL} - {"num_workers"}
        return TrainSpec.model_validate({k: v for k, v in was["spec"].items() if k not in left_out})
    except ValidationError:  # a field that was removed, or a value refused today
        return None


def differences(was: Mapping[str, Any], now: MadeOf) -> list[str]:
    """Where a recorded training differs from the one wanted, a line each: fields, parents, data and files."""
    if "spec" not in was:
        return [UNKNOWN]
    spec = read(was)
    before = dict(flat(spec.shaping() if spec else bare(was["spec"])))
    today = dict(flat(now.spec.shaping()))
    found = [
        f"{name} is {today.get(name, 'no more'):.{SHOWN}}, was {before.get(name, 'not there'):.{SHOWN}}"
        for name in today | before
        if today.get(name) != before.get(name)
    ]
    return found + list(others(was, now))


def others(was: Mapping[str, Any], now: MadeOf) -> Iterator[str]:
    """Differences outside the spec."""
    before = was.get("parents", {})
    for role in before | now.parents:
        if before.get(role) != now.parents.get(role):
            yield f"its parent {role} is another"
    if was.get("data") != now.data:
        yield "the data differ"
    for field, digest in now.files.items():
        if was.get(FILES, now.files).get(field) != digest:
            yield f"the content of the file in stage.{field} differs"
    if now.spec.stage.embedded_by is not None and was.get(EMBEDDINGS, 1) != feed.EMBEDDINGS:
        yield "embeddings are computed in another way today"


def bare(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The dump of a spec that cannot be read today, without its technical fields."""
    shaping = {name: value for name, value in fields.items() if name not in (*TECHNICAL, "parents")}
    budget = shaping.get("budget", {})
    return shaping | {"budget": {k: v for k, v in budget.items() if k not in TECHNICAL_OF_BUDGET}}
