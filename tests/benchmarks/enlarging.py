"""Enlarging: true scenes made four times smaller, cleanly or not, and enlarged again by every upsampler.

    ddiff run --recipe systems
    python -m tests.benchmarks.enlarging runs/demo [--pictures 32] [--sheets DIR] [--json FILE]

The small picture is the mean of 4 x 4 pixels (`clean`), that mean blurred as in unCLIP's first upsampler
(`blur`), or degraded by blind super-resolution (`bsr`), the same for all upsamplers.  `psnr` is to the true
256 px, in dB over the range of the pixels; `all` is the share of pictures in which the oracle finds all that
the caption says; `bicubic` enlarges without a network.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image

from dd_core import degradations
from dd_core.cascade import HopSpec, requested, run
from dd_core.images import to_bytes, to_unit
from jobs.recipes import demo, glide, unclip
from tests.benchmarks.systems import System, opened
from workflows.grammar import Case, described
from workflows.oracle import judged
from workflows.pictures import psnr
from workflows.shapes import draw_scene, drawn

FACTOR = 4


def scenes(count: int) -> tuple[list[Case], Tensor]:
    """Captions, and pictures [n 3 256 256] in [-1, 1], of a seed of their own."""
    rng, cases, pictures = np.random.default_rng(4242), [], []
    for _ in range(count):
        scene = draw_scene(rng)
        caption, says = described(rng, scene)
        cases.append(Case("any", caption, says))
        pictures.append(drawn(scene, 256))
    return cases, to_unit(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def smaller(pictures: Tensor) -> dict[str, Tensor]:
    """The small pictures [n 3 64 64] in each state; blurs and noises are those of one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clean = F.avg_pool2d(pictures, FACTOR)
        std = torch.full((len(clean),), max(degradations.BLUR_STD))
        kernels = degradations.gaussians(std, std, torch.zeros_like(std), side=3)
        return {
            "clean": clean,
            "blur": degradations.filtered(clean, kernels),
            "bsr": torch.cat([degradations.bsr(one[None], FACTOR) for one in pictures]),
        }


def upsamplers() -> dict[str, HopSpec]:
    """Every hop from 64 to 256 px that the recipe trains."""
    blurred = unclip.small_causal().cascade.hops[-1]
    return {
        "demo": demo.cascade().hops[-1],
        "glide": HopSpec(stage="glide_upsampler", how=glide.FAST27),
        "unclip, blur": blurred.but(stage="blurred_upsampler"),
        "unclip, bsr": blurred.but(stage="bsr_upsampler"),
    }


def row(cases: list[Case], true: Tensor, found: Tensor, seconds: float) -> dict[str, float]:
    """How near to the truth, and how often right."""
    seen = [picture.permute(1, 2, 0).numpy() for picture in to_bytes(found)]
    right = [judged(one, case.says)["all"] for one, case in zip(seen, cases, strict=True)]
    near = [psnr(one, other) for one, other in zip(true, found, strict=True)]
    return {"psnr": float(np.mean(near)), "all": float(np.mean(right)), "image_s": seconds / len(cases)}


def main() -> None:
    """Shrink, enlarge, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--sheets", type=Path, help="directory for the first eight of each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases, true = scenes(options.pictures)
    table: dict[str, dict[str, float]] = {}
    for state, small in smaller(true).items():
        flat = F.interpolate(small, scale_factor=FACTOR, mode="bicubic").clamp(-1, 1)
        shown = {"bicubic": flat}
        table[f"{state}, bicubic"] = row(cases, true, flat, 0.0)
        for name, link in upsamplers().items():
            (hop,) = opened(options.run, System((link,), link.stage, {}))
            began, found = time.perf_counter(), []
            for number, case in enumerate(cases):
                asked = requested([case.caption], [number], demo.CONTEXT)
                picture = run(hop, asked._replace(image=small[number : number + 1]), link.how).image
                assert picture is not None
                found.append(picture)
            shown[name] = torch.cat(found)
            table[f"{state}, {name}"] = row(cases, true, shown[name], time.perf_counter() - began)
        for name in shown:
            words = "  ".join(f"{key} {value:.3g}" for key, value in table[f"{state}, {name}"].items())
            sys.stdout.write(f"{state}, {name}: {words}\n")
            sys.stdout.flush()
        if options.sheets:
            options.sheets.mkdir(parents=True, exist_ok=True)
            rows = torch.cat([pictures[:8] for pictures in (true, *shown.values())])
            save_image(rows, options.sheets / f"{state}.png", nrow=8, normalize=True, value_range=(-1, 1))
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
