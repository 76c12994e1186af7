"""What a stage had is moved aside when its spec, data or parents change, and back when they change back.

    <run>/<stage>/fingerprint                  digest of what the present training is made of: spec, data,
                                               parents, files
    <run>/<stage>/made_of.json                 the same in full, to see what has changed (workflows.made_of)
    <run>/<stage>/.superseded/<fingerprint>/   another training: its bundle, checkpoints, samples and journal,
                                               with a fingerprint and a made_of.json of its own

Nothing is deleted.  A change takes four steps, and a process that is killed in any of them loses nothing:

1. The fingerprint of the training that goes is written into its directory in .superseded.
2. Its parts are moved there, one by one.
3. The new fingerprint is written into <run>/<stage>/fingerprint.
4. Parts that lie in .superseded under the new fingerprint are moved back, one by one, and the directory that
   they leave is removed.

Whichever fingerprint the stage has, each part of that training is either in <run>/<stage> or in .superseded
under the fingerprint.  The next start completes the steps that are left.
"""

import json
import logging
import shutil
from typing import Any

from dd_core import checkpoint, sealed
from workflows.journal import MARKS
from workflows.made_of import MadeOf, differences, same
from workflows.storage import Home, StorageError, said, store

log = logging.getLogger(__name__)
ASIDE = ".superseded"
FINGERPRINT, MADE_OF = "fingerprint", "made_of.json"
PARTS = ("bundle", "checkpoints", "samples", *MARKS)
REASONS = 3
"""Differences that a line names."""


def settled(stage: Home, now: MadeOf) -> str:
    """Make a stage's directory hold one training and nothing else.

    What earlier starts left of that training, here or aside, is brought together; what was here of another
    one is moved aside, and the log says where it lies.

    Args:
        stage: The directory.
        now: The training.

    Returns:
        The fingerprint of the training: the one under which it began.

    Raises:
        ValueError: There is something, and nothing says what it was made of.
        StorageError: A part lies both here and aside, which is somebody else's doing.
    """
    was, fingerprint = known(stage), now.fingerprint
    if was and same(was, now):
        fingerprint = was["fingerprint"]
    elif was:
        note(stage, was)
        moved = set_aside(stage, was)
        fingerprint = aside_of(stage, now) or fingerprint
        if moved:
            log.warning(
                "%s: %s; what was trained before lies in %s; delete it, or go back to its settings",
                stage.here.name,
                shortly(differences(was, now)),
                place_of(stage, was["fingerprint"]).address,
            )
    elif there := sorted({*PARTS} & {*stage.names()}):
        raise ValueError(
            f"{stage.address} holds {', '.join(there)}, and nothing says of which spec and data; move them "
            "elsewhere or delete them, then run the same command again"
        )
    else:
        forget_copies(stage)
    note(stage, now.facts(fingerprint))
    bring_back(stage, fingerprint)
    return fingerprint


def known(stage: Home) -> dict[str, Any]:
    """What a directory's training was made of; the fingerprint alone, if no more was noted; or nothing.

    Where the small files are lost, the bundle says it, or the newest checkpoint.
    """
    fingerprint = stage.text(FINGERPRINT)
    steps = checkpoint.steps_of(stage.at("checkpoints").names())
    sources = [MADE_OF, f"bundle/{sealed.MANIFEST}", *(f"checkpoints/{step}/state.json" for step in steps)]
    for source in sources:
        facts = stage.facts(source)
        if facts.get("fingerprint") and fingerprint in ("", facts["fingerprint"]):
            return facts
    return {"fingerprint": fingerprint} if fingerprint else {}


def note(stage: Home, facts: dict[str, Any]) -> None:
    """Write down what a directory's training is made of; the fingerprint, which decides, last."""
    wanted = ("fingerprint", "spec", "data", "parents", "named_files", "embeddings")
    kept = {name: facts[name] for name in wanted if name in facts}
    if "spec" in kept and stage.facts(MADE_OF) != kept:
        stage.write(MADE_OF, json.dumps(kept, indent=2))
    if stage.text(FINGERPRINT) != kept["fingerprint"]:
        stage.write(FINGERPRINT, kept["fingerprint"])


def place_of(stage: Home, fingerprint: str) -> Home:
    """Where a training that is not the present one lies aside."""
    return stage.at(f"{ASIDE}/{fingerprint[:12]}")


def aside_of(stage: Home, now: MadeOf) -> str:
    """The fingerprint under which this training lies aside; empty if it does not."""
    for name in stage.at(ASIDE).names():
        was = known(stage.at(f"{ASIDE}/{name}"))
        if was and same(was, now):
            return str(was["fingerprint"])
    return ""


def set_aside(stage: Home, was: dict[str, Any]) -> bool:
    """Move all parts of the present training aside; returns whether any lie there now."""
    parts = [part for part in PARTS if part in stage.names()]
    place = place_of(stage, was["fingerprint"])
    if parts:
        note(place, was)
    for part in parts:
        move(stage, part, f"{ASIDE}/{place.here.name}/{part}")
    forget_copies(stage)
    return bool(place.names())


def bring_back(stage: Home, fingerprint: str) -> None:
    """Move back what lies aside of the present training, also after a start that was cut while moving it."""
    place = place_of(stage, fingerprint)
    if not (names := place.names()):
        return
    for part in (part for part in PARTS if part in names):
        move(stage, f"{ASIDE}/{place.here.name}/{part}", part)
    stage.drop(f"{ASIDE}/{place.here.name}")
    log.info("%s: what was trained with these settings before is back", stage.here.name)


def move(stage: Home, name: str, to: str) -> None:
    """Give a file, or a directory with all in it, another place within a stage's directory.

    On a file system this is one rename.  A store copies file by file, the manifest of a sealed directory
    last, and then removes: after a move that was cut, the two places together have everything, and the same
    move, or the one back, completes it.

    Raises:
        StorageError: The store is away; or something lies there already.
    """
    if stage.stored:
        with said(stage.address):
            move_stored(store(stage.root), stage.at(name).address, stage.at(to).address)
        return
    path, target = stage.here / name, stage.here / to
    if target.exists():
        raise StorageError(f"{path} is to become {target}, which is there; move one of the two elsewhere")
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)


def move_stored(fs: Any, address: str, to: str) -> None:
    """Copy every file, then remove every one; manifests are the last to come and the first to go."""
    source, target = fs._strip_protocol(address), fs._strip_protocol(to)
    files = sorted(fs.find(address), key=lambda path: (path.endswith(f"/{sealed.MANIFEST}"), path))
    for path in files:
        fs.cp_file(path, target + path[len(source) :])
    for path in reversed(files):
        fs.rm_file(path)


def forget_copies(stage: Home) -> None:
    """Remove this machine's copies of the parts of a stage in a store, lest the next training use them."""
    for part in PARTS if stage.stored else ():
        path = stage.here / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def shortly(reasons: list[str]) -> str:
    """The first of several reasons."""
    more = len(reasons) - REASONS
    return "; ".join(reasons[:REASONS]) + (f"; and {more} more" if more > 0 else "")
