"""Prepared images in, their embeddings by a frozen CLIP out: a Ray Data job between CLIP and its children.

    <run>/<clip>/embeddings/64/part-00000.parquet      for each prepared file one of the same name, row
                                                       groups and rows: `embedding`, zeros if rejected
    <run>/<clip>/embeddings/64/manifest.json           written last: of which data, by which CLIP, sha256
    <run>/.embeddings/<digest of the CLIP>/64/         the same, by a CLIP that is no stage of the run

64 is the side of the images.  A row group is embedded as one batch, by one thread (or one GPU), in float32
whatever precision the children train in; a cascade embeds pictures that are edited in float32, too.  So the
bytes depend on data, CLIP and kind of device alone, not on how many tasks share the work.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch
from numpy.typing import NDArray

from dd_core import bundle, images, sealed
from dd_core.nets.clip import Clip
from dd_core.precision import round_products
from dd_core.stages.clip import ClipSpec, clip_of
from workflows import feed
from workflows.feed import EMBEDDING
from workflows.files import one_line
from workflows.parts import (
    SOURCE,
    UNFINISHED,
    Part,
    finish,
    parts_of,
    plain_writer,
    refusal,
    resumed,
    whole,
    write_json,
)
from workflows.progress import LINE_EVERY_S, clock
from workflows.reading import ahead
from workflows.row_groups import PREPARE, DataError, first_line, parquet_of, patiently, row_group
from workflows.storage import Home, StorageError

log = logging.getLogger(__name__)
PROCESS_BYTES = 1_500_000_000
"""Memory of a task before it loads a model: Python, torch, Ray."""
PROCESS_IMAGES = 1_000
"""A process takes some ten seconds to start; fewer images than this are embedded in less time."""
AHEAD = 4
"""Row groups that are read and decoded while one is embedded: a GPU would wait for each."""
SMALL = 100_000_000
"""A CLIP of fewer bytes may be loaded in this process: no process has to end to free its memory."""


class Embeddings(NamedTuple):
    """All images of one size in prepared data, embedded by one CLIP."""

    home: Home
    """Where they are, or are to be."""
    files: tuple[str, ...]
    """Addresses of the prepared files."""
    data: str
    """Digest of the prepared data."""
    images: int
    """Number of images; it decides among how many processes the work is split."""
    clip: Home
    """The bundle."""
    clip_digest: str
    image_size: int

    @property
    def source(self) -> str:
        """Digest of everything that the content of the files depends on."""
        names = [url.rpartition("/")[2] for url in self.files]
        shaping = [feed.EMBEDDINGS, self.data, names, self.clip_digest, self.image_size]
        return hashlib.sha256(json.dumps(shaping).encode()).hexdigest()


def home_of(run: Home, named: str, clip: Home, digest: str, image_size: int) -> Home:
    """Where the embeddings by a CLIP lie: beside its bundle if it is a stage of the run.

    No stage's name begins with a dot, so the directory for other CLIPs (`.embeddings`) collides with none.
    """
    if clip == run.at(f"{named}/bundle"):
        return run.at(f"{named}/embeddings/{image_size}")
    return run.at(f".embeddings/{digest[:16]}/{image_size}")


def embed(what: Embeddings, *, told_to_stop: Callable[[], bool] = lambda: False) -> None:
    """Make the embeddings that are missing; an interrupted job continues, a finished one is not repeated.

    Ray must have been started, or is started with its defaults.

    Args:
        what: The job.
        told_to_stop: Asked after every file; if it is true, the job returns unfinished.

    Raises:
        ValueError: The parent is no CLIP.
        DataError: A prepared file is damaged, or was prepared without this size.
        DestinationError: The directory cannot be written to, or holds other files.
        StorageError: A store, of the data or of the embeddings, is away; finished files stay.
    """
    if not is_finished(what):
        made(what, told_to_stop)


def require(what: Embeddings) -> None:
    """Refuse embeddings that are not finished; their pages are verified only when they are read.

    Raises:
        DataError: The embeddings were not finished, or are of other data, or by another CLIP.
    """
    facts = facts_of(what)
    if facts.get("source") != what.source:
        raise DataError(
            f"{what.home.address} holds no finished embeddings of this data by this CLIP; run `ddiff run` or "
            "`ddiff train`, which makes them"
        )


def facts_of(what: Embeddings) -> dict[str, Any]:
    """What the manifest says; empty if there is none or it is damaged."""
    body = what.home.facts(sealed.MANIFEST)
    digest = body.pop("digest", None)
    return body if digest == sealed.digest_of(body) else {}


def is_finished(what: Embeddings) -> bool:
    """True if every file is there as it was written, of the same data and CLIP."""
    facts = facts_of(what)
    parts = parts_of(facts)
    return facts.get("source") == what.source and len(whole(what.home, parts)) == len(parts)


def made(what: Embeddings, told_to_stop: Callable[[], bool]) -> None:
    """Embed the files that are missing and seal them all."""
    spec = bundle.checked(bundle.SPEC, what.clip.fetched() / "spec.json")
    if not isinstance(spec, ClipSpec):
        raise ValueError(f"{what.clip.address} is a {type(spec).__name__}, the parent 'clip' must be a CLIP")
    parts, began = reopened(what), time.monotonic()
    before, said = len(parts), began
    for part in written(what, parts):
        parts[part.shard] = part
        if told_to_stop():
            return
        if time.monotonic() - said > LINE_EVERY_S:
            said = time.monotonic()
            log.info("embeddings: %d of %d files", len(parts), len(what.files))
    seconds = time.monotonic() - began
    every = [parts[number] for number in range(len(what.files))]
    facts = {
        "source": what.source,
        "data": what.data,
        "clip": what.clip_digest,
        "image_size": what.image_size,
        "width": spec.net.embedding_width,
        "rows": sum(part.rows for part in every),
        "embedded": sum(part.kept for part in every),
        "parts": [part.model_dump(mode="json") for part in every],
    }
    home = what.home
    home.here.mkdir(parents=True, exist_ok=True)
    sealed.seal(home.here, {part.file: part.sha256 for part in every}, facts)
    home.send(sealed.MANIFEST)
    home.drop(UNFINISHED)
    done = sum(part.kept for part in list(parts.values())[before:])
    rate = f"{done / max(seconds, 1e-6):,.0f} images/s"
    log.info("embeddings: %s images in %s, %s: %s", f"{done:,}", clock(seconds), rate, home.address)


def reopened(what: Embeddings) -> dict[int, Part]:
    """The good files of an earlier job, cut or finished; the directory is ready for the others."""
    home, facts = what.home, facts_of(what)
    if facts.get("source") == what.source:  # finished, but has lost a file since
        home.drop(UNFINISHED)  # of another source, whose job was cut before it removed this manifest
        for part in parts_of(facts):
            write_json(home, f"{UNFINISHED}/part-{part.shard:05d}.json", part.model_dump(mode="json"))
        write_json(home, SOURCE, {"source": what.source})
    return resumed(home, what.source)


def written(what: Embeddings, known: dict[int, Part]) -> Iterator[Part]:
    """Write the files that are missing and hand out each as it is done."""
    todo = [number for number in range(len(what.files)) if number not in known]
    if not todo:
        return
    gpus = int(ray.cluster_resources().get("GPU", 0))
    few = what.images < PROCESS_IMAGES and weight_of(what) < SMALL
    if few and not gpus:
        reports = reported_here(what, todo)
    else:
        reports = reported_by_tasks(what, todo, gpus, "cuda" if gpus else "cpu")
    for report in reports:
        if report["damage"]:
            raise DataError(report["damage"])
        if report["error"]:
            raise refusal(what.home, report["errno"], report["error"])
        if report["away"]:
            raise StorageError(report["away"])
        yield Part.model_validate_json(report["part"])


def reported_here(what: Embeddings, todo: list[int]) -> Iterator[dict[str, Any]]:
    """The reports, made in this process: that is done before another one would have started."""
    threads = torch.get_num_threads()
    try:
        for report in reported({"files": np.array([todo])}, what=what, device="cpu"):
            yield {name: column.item() for name, column in report.items()}
    finally:
        torch.set_num_threads(threads)


def reported_by_tasks(what: Embeddings, todo: list[int], gpus: int, device: str) -> Iterator[dict[str, Any]]:
    """The reports of many tasks.

    Tasks, not actors: when one ends, the CLIP leaves memory and the process is free for the next task.
    """
    most = at_once(what, gpus)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every report comes at once, not when there are 128 MiB of them
    tasks = np.array_split(todo, min(len(todo), 4 * most))  # each does several files, since it reads the CLIP
    with ray.data.DataContext.current(context):
        items = [{"files": files.tolist()} for files in tasks]
        reports = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            partial(reported, what=what, device=device),
            batch_size=1,  # all files of a task: of batches of any size Ray makes none on GPUs
            num_cpus=0.5,  # each keeps one busy; the rest is left to read tasks beside it
            num_gpus=1 if gpus else None,
            compute=ray.data.TaskPoolStrategy(size=min(len(items), most)),
        )
    yield from reports.iter_rows()


def weight_of(what: Embeddings) -> int:
    """Bytes of the CLIP's weights."""
    return (what.clip.fetched() / "weights.safetensors").stat().st_size


def at_once(what: Embeddings, gpus: int) -> int:
    """How many tasks to run at once: as CPUs or GPUs, memory and the number of images allow."""
    there = ray.cluster_resources()
    worthwhile = -(-what.images // PROCESS_IMAGES)
    each = PROCESS_BYTES + 3 * weight_of(what)
    room = int(there.get("memory", each) // each)
    return max(1, min(gpus or int(there.get("CPU", 1)), room, worthwhile))


def reported(
    batch: dict[str, NDArray[Any]], *, what: Embeddings, device: str
) -> Iterator[dict[str, NDArray[Any]]]:
    """A report for each file of the one row of a batch."""
    torch.set_num_threads(1)
    round_products(torch.device(device))
    clip = clip_of(bundle.load(what.clip.fetched(), digest=what.clip_digest).trained).to(device)
    for number in batch["files"][0].tolist():
        part, damage, error, number_of, away = "", "", "", 0, ""
        try:
            found = write_sidecar(what, number, clip.spec.embedding_width, partial(told, clip, device))
            part = found.model_dump_json()
        except DataError as failure:
            damage = one_line(failure)
        except OSError as failure:
            error, number_of = one_line(failure), failure.errno or 0
        except StorageError as failure:
            away = one_line(failure)
        told_of = {"part": part, "damage": damage, "error": error, "errno": number_of, "away": away}
        yield {name: np.array([value]) for name, value in told_of.items()}


@torch.inference_mode()
def told(clip: Clip, device: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[b, 3, s, s] images -> [b, d] embeddings."""
    unit = images.to_unit(torch.from_numpy(pixels).to(device))
    found: NDArray[np.float32] = clip.embed_image(unit).cpu().numpy()
    return found


def write_sidecar(
    what: Embeddings,
    number: int,
    width: int,
    told: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
) -> Part:
    """Embed one prepared file, row group by row group; the sidecar is whole or not there.

    Args:
        what: The job.
        number: Of the file.
        width: Length of an embedding.
        told: Images, uint8 [b, 3, s, s] -> embeddings [b, width].

    Raises:
        DataError: The file is damaged or was prepared without this size.
    """
    url, home, here = what.files[number], what.home, what.home.here
    here.mkdir(parents=True, exist_ok=True)
    name = url.rpartition("/")[2]
    draft = here / f".part-{number:05d}-{uuid.uuid4().hex}.draft"
    schema = pa.schema([pa.field(EMBEDDING, pa.list_(pa.float32(), width), nullable=False)])
    rows = kept = 0
    try:
        with plain_writer(draft, schema) as writer:
            for pixels, usable in images_of(url, what.image_size):
                values = np.zeros((len(usable), width), np.float32)
                if usable.any():
                    values[usable] = told(pixels)
                column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), width)
                writer.write_table(pa.table([column], schema=schema), row_group_size=len(usable))
                rows, kept = rows + len(usable), kept + int(usable.sum())
        part = Part(
            shard=number,
            url=url,
            file=name,
            rows=rows,
            kept=kept,
            rejects={},
            bytes=draft.stat().st_size,
            sha256=sealed.sha256(draft),
        )
        finish(home, draft, part)
    finally:
        draft.unlink(missing_ok=True)
    return part


def images_of(url: str, image_size: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """For each row group, read and decoded ahead: its usable images, uint8 [b, 3, s, s], and their mask."""
    column = f"image{image_size}"

    def look() -> int:
        with parquet_of(url) as parquet:
            feed.check_columns(url, parquet, (column, "reject"))
            return int(parquet.num_row_groups)

    try:
        groups = patiently(look, url)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{url}: {first_line(error)}; {PREPARE}") from None

    def read(group: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        table = row_group(url, group, [column, "reject"], PREPARE)
        usable = pc.equal(table["reject"], "").combine_chunks().to_numpy(zero_copy_only=False)
        data = table[column].filter(pa.array(usable)).to_pylist()
        return feed.decoded(data, image_size), usable

    yield from ahead((partial(read, group) for group in range(groups)), "row-group", AHEAD)
