"""The embedded world as WebDataset tars: pictures, captions and scenes, a function of the seed.

<directory>/shapes.json        the spec that the tars are made from, written before them
<directory>/shapes-00000.tar   written under another name, on the disk, and renamed (or sent) when whole
<directory>/.shapes.lock       held by the process that writes (workflows.claim)
"""

import contextlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
from pydantic import Field

from dd_core.spec import Spec
from workflows import cpus
from workflows.claim import TakenError, claim
from workflows.grammar import training_caption
from workflows.shapes import drawn, facts_of, scene_rng
from workflows.shard_writing import write_tar
from workflows.storage import Home

WORLD = 2
"""Changes when the same spec would give other tars."""
ABOUT, LOCK = "shapes.json", ".shapes.lock"
PROCESS_PAIRS = 1_000
"""Pairs that are drawn while a process starts."""
QUICK_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP]
"""Takes a third of the time of OpenCV's default, at the same size for scenes that are mostly flat."""


class ShapesSpec(Spec):
    """How much of the world to write."""

    kind: Literal["shapes"] = "shapes"
    pairs: int = Field(10_000, ge=1)
    """Pictures, each with its caption."""
    seed: int = Field(0, ge=0)
    pairs_per_shard: int = Field(500, ge=1)
    image_size: int = Field(256, ge=32)
    """Side in pixels."""
    image_format: Literal["png", "jpg"] = "png"


def pair(spec: ShapesSpec, number: int) -> tuple[str, dict[str, bytes]]:
    """The key and the members of one training pair."""
    scene, caption, says = training_caption(scene_rng(spec.seed, number))
    picture = cv2.cvtColor(drawn(scene, spec.image_size), cv2.COLOR_RGB2BGR)
    quality = QUICK_PNG if spec.image_format == "png" else [cv2.IMWRITE_JPEG_QUALITY, 95]
    _, data = cv2.imencode(f".{spec.image_format}", picture, quality)
    about = facts_of(scene) | {"caption": caption, "says": says}
    members = {spec.image_format: data.tobytes(), "txt": caption.encode(), "json": json.dumps(about).encode()}
    return f"{number:08d}", members


def write_shards(spec: ShapesSpec, directory: Home | Path) -> list[str]:
    """Write the world as WebDataset tars, a process for each CPU; whole ones of this spec stay as they are.

    Returns:
        The addresses of the shards, shapes-00000.tar and on.

    Raises:
        TakenError: Another process writes there.
        OSError: There is no room; what is whole stays.
    """
    home = Home.of(directory)
    home.here.mkdir(parents=True, exist_ok=True)
    names = [name_of(shard) for shard in range(-(-spec.pairs // spec.pairs_per_shard))]
    if home.facts(ABOUT) != facts_of_spec(spec) or names_missing(names, home):
        with claimed(home):
            drop_others(spec, home)
            for path in written(spec, home.here, names_missing(names, home)):
                home.send(path.name)
                if home.stored:
                    path.unlink()
    return [home.at(name).address for name in names]


def names_missing(names: Sequence[str], home: Home) -> list[int]:
    """Numbers of the shards that are not there."""
    there = home.sizes()
    return [number for number, name in enumerate(names) if name not in there]


@contextlib.contextmanager
def claimed(home: Home) -> Iterator[None]:
    """While inside, be the only process that writes shards there; drafts of killed ones are removed.

    Raises:
        TakenError: Another does.
    """
    with contextlib.ExitStack() as inside:
        try:
            inside.enter_context(claim(home, LOCK))
        except TakenError as error:
            raise TakenError(
                f"{home.address} is being written by {error}; wait until that has ended, or stop it, and run "
                "the same command again"
            ) from None
        for draft in home.here.glob(".shapes-*.tmp"):
            draft.unlink()
        yield


def name_of(shard: int) -> str:
    """The file of a shard."""
    return f"shapes-{shard:05d}.tar"


def drop_others(spec: ShapesSpec, home: Home) -> None:
    """Remove the tars of another spec, then note this one.

    If only the number of pairs differs, shards that are full under both numbers stay.  Those of older
    versions, which noted no spec, stay too.
    """
    was, now = home.facts(ABOUT), facts_of_spec(spec)
    if was == now:
        return
    more_or_fewer = was | {"pairs": spec.pairs} == now
    full = min(was["pairs"], spec.pairs) // spec.pairs_per_shard if more_or_fewer else 0
    keep = {name_of(shard) for shard in range(full)}
    for name in home.names() if was else ():
        if fnmatch(name, "shapes-*.tar") and name not in keep:
            home.drop(name)
    home.write(ABOUT, json.dumps(now, indent=2))


def facts_of_spec(spec: ShapesSpec) -> dict[str, Any]:
    """What ABOUT says."""
    return {"world": WORLD, **spec.model_dump(mode="json")}


def written(spec: ShapesSpec, directory: Path, shards: Sequence[int]) -> Iterator[Path]:
    """Each of these tars, as soon as it and those before it are whole."""
    pairs = sum(len(numbers(spec, shard)) for shard in shards)
    processes = min(len(shards), cpus.available(), pairs // PROCESS_PAIRS)
    write = partial(write_shard, spec, directory)
    if processes < 2:
        yield from map(write, shards)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["webdataset", __name__])  # they import torch: once, not for each process
    with ProcessPoolExecutor(processes, context) as pool:
        yield from pool.map(write, shards)


def write_shard(spec: ShapesSpec, directory: Path, shard: int) -> Path:
    """One tar of the world, made under another name and renamed when whole."""
    path = directory / name_of(shard)
    write_tar(path, (pair(spec, number) for number in numbers(spec, shard)))
    return path


def numbers(spec: ShapesSpec, shard: int) -> range:
    """The pairs of a shard."""
    start = shard * spec.pairs_per_shard
    return range(start, min(start + spec.pairs_per_shard, spec.pairs))
