"""Pictures that show what a run has learned: painted prompts, a sampling step by step, reconstructions.

Everything here is made from the bundles in a run directory, on one device, without Ray or HTTP.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dd_core import bundle, images
from dd_core.bundle import Cascade
from dd_core.cascade import CascadeState, requested, run
from dd_core.denoiser import Denoiser
from dd_core.noise import SeededNoise
from dd_core.samplers import Sampling
from dd_core.sealed import MANIFEST
from dd_core.stages.autoencoder import AutoencoderSpec, autoencoder_of
from workflows.held_out import backwards, marked
from workflows.pairs import HELD_OUT
from workflows.parts import parts_of
from workflows.storage import Home

NOISE_LEVELS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
"""Of the forward strip: sigma, in units of the image's range of [-1, 1]."""
SHOWN = 16
"""Pairs of prepared data that a page shows at most."""
GAP, LETTERS, CAPTION = 4, 11, 40
"""Pixels on a sheet: gap between pictures, font size, and height of a two-line caption with its margins."""
COLUMNS = 4
"""Cells of a sheet, side by side."""


class Painted(NamedTuple):
    """A prompt and its pictures: one after each hop that ends in a picture, the smallest first."""

    prompt: str
    seed: int
    pngs: tuple[bytes, ...]


class Frame(NamedTuple):
    """One query of a sampler: the noisy image, and the clean one that the network estimated."""

    sigma: float
    noisy: bytes
    estimate: bytes


class Rebuilt(NamedTuple):
    """An image before and after the autoencoder."""

    original: bytes
    rebuilt: bytes
    psnr: float
    """Peak signal to noise, in decibels, over the range of [-1, 1]."""


@torch.no_grad()
def painted(cascade: Cascade, prompts: Sequence[str], *, seed: int = 0, classes: int = 0) -> list[Painted]:
    """Every prompt painted once, the first with `seed`, the next with `seed + 1`, ...

    Each by itself, as `ddiff sample` paints it, so that a seed gives the same picture to the bit whatever
    else is painted; the PNGs say prompt, seed and the digest of the cascade.  With classes, each seed is of
    the class with its own number, modulo `classes`.
    """
    result: list[Painted] = []
    for own, prompt in enumerate(prompts, seed):
        facts = {"prompt": prompt, "seed": str(own), "cascade": cascade.digest}
        facts |= {"label": str(own % classes)} if classes else {}
        words = f"class {own % classes}: {prompt}" if classes else prompt
        found = [state.image for state in states(cascade, prompt, own, classes) if state.image is not None]
        result.append(Painted(words, own, tuple(images.png(image, facts) for image in found)))
    return result


def sheet(cells: Sequence[tuple[str, Sequence[bytes]]]) -> Image.Image:
    """A page of cells, COLUMNS in a row, each with its PNGs at their own size and its words below them."""
    sizes = [[Image.open(io.BytesIO(png)) for png in pngs] for _, pngs in cells]
    width = max(sum(picture.width + GAP for picture in some) for some in sizes) + GAP
    height = max(picture.height for some in sizes for picture in some) + CAPTION
    rows = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (width * min(COLUMNS, len(cells)), height * rows), "white")
    draw, letters = ImageDraw.Draw(page), ImageFont.load_default(LETTERS)
    for place, ((words, _), some) in enumerate(zip(cells, sizes, strict=True)):
        left, top = place % COLUMNS * width + GAP, place // COLUMNS * height + GAP
        floor = top + max(picture.height for picture in some)
        draw.multiline_text((left, floor + GAP), wrapped(words, width - 2 * GAP, letters), "black", letters)
        for picture in some:
            page.paste(picture, (left, floor - picture.height))
            left += picture.width + GAP
    return page


def wrapped(words: str, width: int, letters: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Words in at most two lines of `width` pixels; what does not fit is replaced by dots."""
    lines = [""]
    for word in words.split():
        if letters.getlength(f"{lines[-1]} {word}".strip()) > width and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:2]) + " ..." * (len(lines) > 2)


def asked_for(cascade: Cascade, prompt: str, seed: int, classes: int) -> CascadeState:
    """What enters the cascade; with classes, the one of the seed's number modulo `classes`."""
    state = requested([prompt], [seed], cascade.spec.context_length)
    return state._replace(label=torch.tensor([seed % classes])) if classes else state


def states(cascade: Cascade, prompt: str, seed: int, classes: int) -> Iterator[CascadeState]:
    """What travels down the cascade, after each hop."""
    state = asked_for(cascade, prompt, seed, classes)
    for hop, link in zip(cascade.hops, cascade.spec.hops, strict=True):
        state = run(hop, state, link.how)
        yield state


@torch.no_grad()
def trajectory(cascade: Cascade, prompt: str, *, seed: int, classes: int = 0, frames: int = 9) -> list[Frame]:
    """Evenly spaced queries, first and last included, of the first hop that makes an image (see `painted`).

    The noisy image is shown as x / sqrt(1 + sigma**2), as the network sees it.
    """
    state = asked_for(cascade, prompt, seed, classes)
    for hop, link in zip(cascade.hops, cascade.spec.hops, strict=True):
        draw = hop.start(state, link.how)
        asked, x0 = answered(draw.sampling, hop.denoiser(draw.rows))
        state = hop.finish(state, x0)
        if state.image is not None:
            break
    picked = np.unique(np.linspace(0, len(asked) - 1, min(frames, len(asked))).round().astype(int))
    return [shown(*asked[index]) for index in picked]


def answered(sampling: Sampling, denoise: Denoiser) -> tuple[list[tuple[float, Tensor, Tensor]], Tensor]:
    """Drive a sampler: every query (sigma, noisy image, estimate), and the result."""
    asked: list[tuple[float, Tensor, Tensor]] = []
    try:
        query = next(sampling)
        while True:
            answer = denoise(query.x, query.levels())
            asked.append((float(query.levels()[0]), query.x, answer.x0))
            query = sampling.send(answer)
    except StopIteration as end:
        return asked, end.value


def shown(sigma: float, x: Float[Tensor, " 1 3 h w"], x0: Float[Tensor, " 1 3 h w"]) -> Frame:
    """One query as two pictures."""
    return Frame(sigma, images.png((x / (1 + sigma**2) ** 0.5).float().cpu()), images.png(x0.float().cpu()))


def noising(image: Float[Tensor, " 1 3 h w"], *, seed: int = 0) -> list[tuple[float, bytes]]:
    """The forward process: one image under more and more noise, as the network sees it."""
    eps = SeededNoise([seed])(image)
    return [(sigma, images.png((image + sigma * eps) / (1 + sigma**2) ** 0.5)) for sigma in NOISE_LEVELS]


@torch.no_grad()
def reconstructions(autoencoder: Path, originals: Float[Tensor, " b 3 h w"]) -> list[Rebuilt]:
    """Images through the autoencoder and back."""
    trained = bundle.load(autoencoder).trained
    assert isinstance(trained.spec, AutoencoderSpec)
    model = autoencoder_of(trained)
    back = torch.cat([model.reconstruct(one[None]).float().clamp(-1, 1) for one in originals])
    return [
        Rebuilt(images.png(was[None]), images.png(now[None]), psnr(was, now))
        for was, now in zip(originals, back, strict=True)
    ]


def psnr(one: Float[Tensor, " *s"], other: Float[Tensor, " *s"]) -> float:
    """Peak signal to noise in decibels, for values in [-1, 1], whose peak is 2."""
    mse = (one - other).square().mean().clamp(min=1e-10)
    return float(10 * torch.log10(4 / mse))


def last_parts(data: Home | Path, pairs: int, mark: str = "") -> list[str]:
    """The last files of prepared data, in reverse, that together have so many pairs by the manifest.

    Files without any are passed over: a downloader leaves an empty tar where every link is dead.

    Args:
        data: Where it lies.
        pairs: How many to find.
        mark: Empty: pairs to train on; HELD_OUT: held-out ones.
    """
    files, found = list[str](), 0
    for part in reversed(parts_of(Home.of(data).facts(MANIFEST))):
        held_out = sum(part.held_out)
        usable = held_out if mark == HELD_OUT else part.kept - held_out
        if usable and found < pairs:
            files.append(part.file)
            found += usable
    return files


def last_rows(data: Path, columns: Sequence[str], pairs: int, mark: str = "") -> list[dict[str, Any]]:
    """The last rows of `last_parts` whose column `reject` is `mark`, in their order.

    Raises:
        DataError: A file is gone or damaged.
    """
    tables: list[pa.Table] = []
    for url, group, _ in backwards(str(data / file) for file in last_parts(data, pairs, mark)):
        tables.insert(0, marked(url, group, [*columns], mark))
        if sum(map(len, tables)) >= pairs:
            break
    return [row for table in tables for row in table.to_pylist()][-pairs:]


def prepared_images(data: Path, size: int, count: int) -> tuple[Float[Tensor, " b 3 h w"], list[str]]:
    """The last usable images of prepared data in [-1, 1], with their captions; fewer if there are no more."""
    column = f"image{size}"
    rows = last_rows(data, (column, "caption"), count)
    pixels = [np.asarray(Image.open(io.BytesIO(row[column])).convert("RGB")) for row in rows]
    stacked = torch.from_numpy(np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8))
    return images.to_unit(stacked.permute(0, 3, 1, 2)), [row["caption"] for row in rows]


def prepared_captions(data: Path, count: int) -> list[str]:
    """Held-out captions of the last files of prepared data, preceded by others if they are too few.

    Empty before data are prepared.
    """
    marks = ("", HELD_OUT) if Home.of(data).facts(MANIFEST).get("held_out") else ("",)
    return [row["caption"] for mark in marks for row in last_rows(data, ("caption",), count, mark)][-count:]


def prepared_sizes(data: Path) -> list[int]:
    """Sides of the images in prepared data; none where no pair is usable."""
    names = [name for file in last_parts(data, 1) for name in pq.read_schema(data / file).names]
    return sorted(int(name.removeprefix("image")) for name in names if name.startswith("image"))
