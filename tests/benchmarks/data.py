"""Images per second from tars to batches: Ray Data with our reader against webdataset with DataLoader.

    python -m tests.benchmarks.data [--pairs 9000] [--rounds 5] [--json FILE]

Photo-like JPEGs (long side 512, quality 90, 4:2:0) with captions in tars; every method delivers
batches of 64 pairs: an image of 256 px, one of 64 px and 77 tokens; those named after a size an image of
that size alone, which is what a stage trains on: ours from data that were prepared once, theirs from the
tars in every epoch.  Each measurement is a process of its own on the same two cores; the methods
alternate, and medians of their rounds are compared.
Rates are over the last three quarters of the images, when every process has started (of prepared data,
which are read far ahead, over all but the first batch); the time to the first batch has its own column.
CPU time is that of all processes and, unlike the rates, hardly depends on what else runs on the box.
Peak memory is the sum over all processes of their own pages and their share of common ones (PSS).
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.conftest import file_of, photo, write_shard

SIZES, CONTEXT, BATCH, CORES = (256, 64), 77, 64, 2
METHODS = {
    "pillow": "webdataset + DataLoader, Pillow",
    "best": "webdataset + DataLoader, simplejpeg + OpenCV",
    "best_tokens": "the same, with our tokenizer",
    "usual": "the same with open_clip's, written as webdataset's documentation does",
    "ray": "Ray Data, workflows.pairs",
    "floor": "our reader in two processes, nothing handed over",
    "best64": "webdataset + DataLoader, simplejpeg + OpenCV, 64 px",
    "stage64": "prepared data, workflows.reading, 64 px",
    "best256": "webdataset + DataLoader, simplejpeg + OpenCV, 256 px",
    "stage256": "prepared data, workflows.reading, 256 px",
}
AGAINST = {"stage64": "best64", "stage256": "best256"}
"""What a method of ours is compared with; `ray` with all others that deliver what it does."""
SHAPES = ((512, 384), (384, 512), (512, 341), (512, 512), (512, 288))
WORDS = (
    "red blue old small bright wooden street river market dog bridge window evening portrait mountain harbour"
)


def make(directory: Path, pairs: int) -> None:
    """Tars of 500 pairs; 200 different pictures, every caption different."""
    random = np.random.default_rng(0)
    words = WORDS.split()
    pictures = [file_of(photo(*SHAPES[i % len(SHAPES)], seed=i, grain=10), "JPEG") for i in range(200)]
    for first in range(0, pairs, 500):
        files = {}
        for i in range(first, min(first + 500, pairs)):
            caption = f"photo {i}: " + " ".join(random.choice(words, random.integers(6, 16)))
            files |= {f"{i:07d}.jpg": pictures[i % 200], f"{i:07d}.txt": caption.encode()}
            files[f"{i:07d}.json"] = json.dumps({"id": i, "caption": caption}).encode()
        write_shard(directory / f"{first // 500:05d}.tar", files)
    (directory / "pairs.txt").write_text(str(pairs))


def by_pillow(data: bytes) -> dict[int, np.ndarray]:
    """What a torchvision user writes: both sizes from the full picture, bicubic."""
    import io  # noqa: PLC0415

    from PIL import Image  # noqa: PLC0415

    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return {size: np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box)) for size in SIZES}


def by_simplejpeg(data: bytes, sizes: tuple[int, ...] = SIZES) -> dict[int, np.ndarray]:
    """The fastest that gives the same pixels as ours: shrunk while decoding, then OpenCV; no checks."""
    import simplejpeg  # noqa: PLC0415

    most = max(sizes)
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=most, min_width=most, min_factor=2)
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image, found = pixels[top : top + side, left : left + side], {}
    for size in sizes:
        how = cv2.INTER_LINEAR if len(image) <= 1.5 * size else cv2.INTER_AREA
        image = image if len(image) == size else cv2.resize(image, (size, size), interpolation=how)
        found[size] = image
    return found


def webdataset_batches(directory: Path, method: str) -> Iterator[dict[str, Any]]:
    """webdataset 0.2 in a DataLoader with two workers that decode and build whole batches."""
    import torch  # noqa: PLC0415
    import webdataset  # noqa: PLC0415
    from open_clip.tokenizer import SimpleTokenizer  # noqa: PLC0415

    from dd_core import text  # noqa: PLC0415

    cv2.setNumThreads(1)
    alone = method.removeprefix("best")
    sizes = (int(alone),) if alone.isdigit() else SIZES
    tokenizer = SimpleTokenizer()
    decode = by_pillow if method == "pillow" else partial(by_simplejpeg, sizes=sizes)

    def batch(samples: list[dict[str, bytes]]) -> dict[str, torch.Tensor]:
        images = [decode(sample["jpg"]) for sample in samples]
        captions = [sample["txt"].decode() for sample in samples]
        found = {
            f"image{size}": torch.from_numpy(np.stack([image[size] for image in images])) for size in sizes
        }
        if method == "best_tokens":
            return found | {"tokens": torch.tensor(text.tokens(captions, CONTEXT))}
        return found | {"tokens": tokenizer(captions, context_length=CONTEXT)}

    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    if method == "usual":

        def tokens(caption: bytes) -> torch.Tensor:
            return tokenizer(caption.decode(), context_length=CONTEXT)[0]

        def pair(sample: tuple[dict[int, np.ndarray], torch.Tensor]) -> tuple[Any, ...]:
            return *sample[0].values(), sample[1]

        dataset = dataset.to_tuple("jpg", "txt").map_tuple(decode, tokens).map(pair).batched(BATCH)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=CORES, prefetch_factor=4)
        return ({"image256": large, "image64": small, "tokens": ids} for large, small, ids in loader)
    dataset = dataset.batched(BATCH, collation_fn=batch, partial=True)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=CORES, prefetch_factor=4))


def our_batches(url: str) -> Iterator[dict[str, Any]]:
    """One tar by the product's own reader, checks, decoding and tokens."""
    from dd_core import text  # noqa: PLC0415
    from workflows.decode import one_thread  # noqa: PLC0415
    from workflows.pairs import PairsSpec, pair_of  # noqa: PLC0415
    from workflows.shards import samples  # noqa: PLC0415

    one_thread()
    spec = PairsSpec(shards=(url,), destination="-", sizes=SIZES, context_length=CONTEXT)
    pairs = (pair_of(sample, spec) for sample in samples(url, spec.limits))
    while batch := list(itertools.islice(pairs, BATCH)):
        columns = {f"image{size}": np.stack([pair.images[size] for pair in batch]) for size in SIZES}
        yield columns | {"tokens": np.array(text.tokens([pair.caption for pair in batch], CONTEXT), np.int32)}


def floor_batches(directory: Path) -> Iterator[dict[str, Any]]:
    """What no framework can beat with this decoding: two processes that throw their batches away."""
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    fork = multiprocessing.get_context("fork")
    left: multiprocessing.Queue[str] = fork.Queue()
    made: multiprocessing.Queue[int] = fork.Queue()
    for url in [*urls, *[""] * CORES]:
        left.put(url)

    def work() -> None:
        for url in iter(left.get, ""):
            for batch in our_batches(url):
                made.put(len(batch["tokens"]))

    workers = [fork.Process(target=work) for _ in range(CORES)]
    for worker in workers:
        worker.start()
    left_over = pairs_in(directory)
    while left_over:
        left_over -= (count := made.get())
        yield {"tokens": range(count)}
    for worker in workers:
        worker.join()


def ray_batches(directory: Path) -> Iterator[dict[str, Any]]:
    """The same reader, one task a tar, streamed by Ray Data."""
    import ray.data  # noqa: PLC0415
    from ray.data.block import BlockAccessor, BlockMetadata  # noqa: PLC0415

    urls = [str(path) for path in sorted(directory.glob("*.tar"))]

    def read(url: str) -> Iterator[Any]:
        yield from map(BlockAccessor.batch_to_arrow_block, our_batches(url))

    class Tars(ray.data.Datasource):
        def estimate_inmemory_data_size(self) -> None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
        ) -> list[Any]:
            about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ray.data.ReadTask(partial(read, url), about) for url in urls]

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    # a block over this leaves its task at once; merging and cutting blocks would copy every image
    context.target_max_block_size = int(
        0.9 * BATCH * (3 * sum(size**2 for size in SIZES) + 4 * (CONTEXT + 3))
    )
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(Tars(), override_num_blocks=len(urls))
    return iter(dataset.iter_batches(batch_size=BATCH, batch_format="numpy", prefetch_batches=2))


def prepared(directory: Path) -> Path:
    """The tars, prepared as `ddiff data prepare` does; at once where that has been done before."""
    from workflows.pairs import PairsSpec  # noqa: PLC0415
    from workflows.prepare import prepare_pairs  # noqa: PLC0415

    destination = directory / "prepared"
    shards = (str(directory),)
    prepare_pairs(
        PairsSpec(shards=shards, destination=str(destination), sizes=SIZES, context_length=CONTEXT),
        progress=False,
    )
    return destination


def stage_batches(directory: Path, size: int) -> Iterator[dict[str, Any]]:
    """What the one worker of a stage reads, in the order of its training: four epochs."""
    import torch  # noqa: PLC0415

    from jobs.recipes.demo import base  # noqa: PLC0415
    from workflows import feed  # noqa: PLC0415
    from workflows.reading import Reader, batches  # noqa: PLC0415

    wanted = feed.Wanted(size)
    spec = base()
    spec = spec.but(batch_size=BATCH, budget=spec.budget.but(steps=4 * pairs_in(directory) // BATCH))
    pieces = feed.survey(feed.prepared_files(directory / "prepared"), wanted)
    reader = Reader(spec, feed.Order(pieces, spec.seed, wanted), wanted, rank=0)
    for pair in batches(reader, first_step=0, device=torch.device("cpu")):
        yield {f"image{size}": pair.image, "tokens": pair.tokens}


OURS = {
    "ray": ray_batches,
    "floor": floor_batches,
    "stage64": partial(stage_batches, size=64),
    "stage256": partial(stage_batches, size=256),
}


def pairs_in(directory: Path) -> int:
    """How many pairs `make` wrote."""
    return int((directory / "pairs.txt").read_text())


def measure(directory: Path, method: str) -> dict[str, float]:
    """One method once, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    temporary = ""
    if on_ray := method == "ray" or method in AGAINST:
        os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"})
        import ray  # noqa: PLC0415

        temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        ray.init(num_cpus=CORES, include_dashboard=False, _temp_dir=temporary, logging_level="error")
    memory = PeakMemory()
    start = time.perf_counter()
    batches = OURS[method](directory) if method in OURS else webdataset_batches(directory, method)
    warm = 1 if method in AGAINST else pairs_in(directory) // 4
    count, first, since, cpu = 0, 0.0, 0.0, 0.0
    for batch in batches:
        first = first or time.perf_counter() - start
        count += len(batch["tokens"])
        if not since and count >= warm:
            warm, since, cpu = count, time.perf_counter(), cpu_s()
    end = time.perf_counter()
    steady = count - warm
    found = {"images_per_s": steady / (end - since), "cpu_ms": 1000 * (cpu_s() - cpu) / steady}
    found |= {"first_batch_s": first, "images": float(count), "peak_mb": memory.stop()}
    if on_ray:
        import ray  # noqa: PLC0415

        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
    return found


class PeakMemory:
    """The most memory that a process and its descendants held together, sampled in a thread.

    Args:
        pid: The process; None: this one.
        every_s: Shortest pause between two samples; longer where sampling, which reads every page table,
            would take more than a hundredth of a core's time.
    """

    def __init__(self, pid: int | None = None, *, every_s: float = 2.0) -> None:
        self.pid, self.every_s = pid or os.getpid(), every_s
        self.peak, self.over = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        pause = self.every_s
        while not self.over.wait(pause):
            began = time.thread_time()
            self.peak = max(self.peak, sum(held_mb(pid) for pid in family(self.pid)))
            pause = max(self.every_s, 100 * (time.thread_time() - began))

    def stop(self) -> float:
        """The peak in MB."""
        self.over.set()
        self.thread.join()
        return self.peak


def cpu_s() -> float:
    """CPU seconds of this process and its descendants, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    tick, total = os.sysconf("SC_CLK_TCK"), ended.ru_utime + ended.ru_stime
    for pid in family(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        below = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(found for child in below for found in family(child))]


def held_mb(pid: int) -> float:
    """The PSS of a process: its own pages and its proportional share of shared ones."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def same_pixels(directory: Path) -> None:
    """The peer's best decode and ours must give the same images, or the comparison means nothing."""
    from workflows.decode import squares  # noqa: PLC0415
    from workflows.shards import Limits, samples  # noqa: PLC0415

    for _, sample in zip(range(20), samples(str(directory / "00000.tar"), Limits()), strict=False):
        ours = squares(sample.parts["jpg"], SIZES, min_side=32, max_pixels=32_000_000)
        theirs = by_simplejpeg(sample.parts["jpg"])
        assert all(np.array_equal(ours[size], theirs[size]) for size in SIZES)


def report(rounds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, spread and ratios."""
    table = {
        method: {name: statistics.median(found[name] for found in all_rounds) for name in all_rounds[0]}
        | {"rates": [round(found["images_per_s"], 1) for found in all_rounds]}
        for method, all_rounds in rounds.items()
    }
    pairs = [("ray", peer) for peer in table if peer not in {"ray", *AGAINST, *AGAINST.values()}]
    pairs = [*pairs, *AGAINST.items()]
    ratios = {
        f"{one} / {peer}": table[one]["images_per_s"] / table[peer]["images_per_s"]
        for one, peer in pairs
        if one in table and peer in table
    }
    return {"methods": table, "ratios": ratios, "load": os.getloadavg(), "cores": CORES}


def main() -> None:
    """Make the data, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--data", type=Path, help="directory of tars to use, or to make and keep")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.stdout.write(json.dumps(measure(options.data, options.measure)) + "\n")
        return
    directory = options.data or Path(tempfile.mkdtemp(prefix="ddiff-bench-"))
    directory.mkdir(parents=True, exist_ok=True)
    if not any(directory.glob("*.tar")):
        make(directory, options.pairs)
    same_pixels(directory)
    if AGAINST.keys() & options.methods.split(","):
        prepared(directory)
    rounds: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods.split(",")}
    for number in range(options.rounds):
        for method, done_rounds in rounds.items():
            command = [
                sys.executable,
                "-m",
                "tests.benchmarks.data",
                "--measure",
                method,
                "--data",
                str(directory),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            done_rounds.append(json.loads(done.stdout.splitlines()[-1]))
            sys.stdout.write(
                f"round {number + 1} {method:12} {done_rounds[-1]['images_per_s']:8.0f} images/s\n"
            )
            sys.stdout.flush()
    found = report(rounds)
    for method, row in found["methods"].items():
        sys.stdout.write(
            f"{METHODS[method]:46} {row['images_per_s']:6.0f} images/s   "
            f"{row['cpu_ms']:5.2f} CPU ms   first {row['first_batch_s']:4.1f} s   "
            f"peak {row['peak_mb']:5.0f} MB\n"
        )
    for name, ratio in found["ratios"].items():
        sys.stdout.write(f"{name:50} {ratio:8.2f} x\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    if not options.data:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
