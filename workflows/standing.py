"""How far each stage of a run is, and which will be trained again, and why: said before anything starts.

Judged by what is written down, without reading weights: a damaged bundle is found when it is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dd_core import checkpoint, sealed
from workflows.files import braces
from workflows.made_of import MadeOf, differences, named_files, same
from workflows.parents import parent_home
from workflows.parts import data_digest
from workflows.run_spec import RunSpec, in_order
from workflows.shape_shards import ABOUT, WORLD
from workflows.storage import Home
from workflows.superseded import ASIDE, known, shortly

OTHERS = "to be prepared anew"
"""In place of the digest of data whose spec, or number of shards, has changed."""


class Standing(NamedTuple):
    """How far one stage is."""

    word: Literal["new", "continues", "done", "again"]
    step: int = 0
    """At which it continues."""
    because: tuple[str, ...] = ()
    """Of a stage that is trained again, what has changed."""
    digest: str = ""
    """Of its bundle, if it is done."""

    @property
    def text(self) -> str:
        """For people."""
        match self.word:
            case "continues":
                return f"continues at step {self.step:,}"
            case "again":
                return f"trained again, because {shortly(list(self.because))}"
            case word:
                return word


def standings(spec: RunSpec, run: Home) -> dict[str, Standing]:
    """How far each stage is.

    If there is no prepared data, each stage is judged as if the data will be what it was.

    Raises:
        ValueError: A parent, or a file that a stage names, is missing.
    """
    data, found = data_of(spec, run), dict[str, Standing]()
    for stage in in_order(spec.stages):
        parents = {
            role: found[named].digest if named in found else digest_of(parent_home(stage, role, run))
            for role, named in stage.parents.items()
        }
        home = run.at(stage.name)
        now = MadeOf(stage, data or str(known(home).get("data", "")), parents, named_files(stage))
        found[stage.name] = standing(home, now)
    return found


def standing(stage: Home, now: MadeOf) -> Standing:
    """How far one stage is, by what lies in its directory and what lies aside (workflows.superseded)."""
    was, aside = known(stage), stage.at(ASIDE)
    mine = [place for place, facts in places(stage, aside) if same(facts, now)]
    for place in mine:
        if digest := digest_of(place.at("bundle")):
            return Standing("done", digest=digest)
    if step := max((newest_step(place) for place in mine), default=0):
        return Standing("continues", step)
    if mine or not (digest_of(stage.at("bundle")) or newest_step(stage)):
        return Standing("new")
    return Standing("again", because=tuple(differences(was, now)))


def places(stage: Home, aside: Home) -> Iterator[tuple[Home, Mapping[str, Any]]]:
    """Where trainings of a stage lie, with what they are made of."""
    for place in (stage, *(aside.at(name) for name in aside.names())):
        if facts := known(place):
            yield place, facts


def newest_step(stage: Home) -> int:
    """The step of the newest finished checkpoint of a stage; 0 if there is none."""
    for name in checkpoint.steps_of(stage.at("checkpoints").names()):
        if step := stage.at(f"checkpoints/{name}").facts(sealed.MANIFEST).get("step"):
            return int(step)
    return 0


def digest_of(bundle: Home) -> str:
    """The digest of a bundle, as it says; empty if there is none."""
    return str(bundle.facts(sealed.MANIFEST).get("digest", ""))


def data_of(spec: RunSpec, run: Home) -> str:
    """The digest of the prepared data; OTHERS if the run will prepare others; empty if there are none."""
    home = run.at("data/prepared") if spec.shapes else Home.of(spec.pairs.destination)
    facts = home.facts(sealed.MANIFEST)
    asked = spec.pairs.model_dump(mode="json")
    before = {"held_out": 0.0} | facts["spec"] if "spec" in facts else {}
    if any(asked.get(name) != value for name, value in before.items()):
        return OTHERS
    if not spec.shapes and more_or_fewer(spec.pairs.shards, facts.get("shards", ())):
        return OTHERS
    if spec.shapes:
        world = run.at("data/raw").facts(ABOUT)
        if world and world != {"world": WORLD, **spec.shapes.model_dump(mode="json")}:
            return OTHERS
    return data_digest(facts) if facts else ""


def more_or_fewer(patterns: Sequence[str], before: Sequence[str]) -> bool:
    """Whether more or fewer tars are named than were prepared; the same number may be the same ones, moved.

    False for globs and directories: how many tars those mean is not written down.
    """
    names = {name for pattern in patterns for name in braces(pattern)}
    counted = all(name.endswith(".tar") and not set(name) & set("*?[") for name in names)
    return bool(before) and counted and len(names) != len(before)
