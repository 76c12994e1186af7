"""What a trained cascade paints when it is sampled in several ways: the oracle's scores, seconds an image.

    python -m tests.benchmarks.systems CASCADE --stage base \
        --way 'scale 1={"guidance_scale": 1}' --way 'scale 3={"guidance_scale": 3}' \
        [--captions 64] [--clip BUNDLE] [--labels] [--pictures DIR] [--json FILE]

Each way changes how one hop is sampled and paints the same captions (none of which training saw) with the
same seeds, in this process.  `all`, `one`, `two`, `unseen` and the attributes are as in an evaluation; for
cascades that hear no caption there are `things` (pictures of one to three things, each of a shape and a
colour that have a name) and, with --labels (class i of six is asked for in picture i), `class` (a thing of
that shape is there).  `clip` is the cosine of picture and caption by the CLIP that the cascade stands on, or
by that of --clip.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import save_image

from dd_core import bundle
from dd_core.cascade import CascadeState, HopSpec, run
from dd_core.images import to_bytes
from dd_core.stages.clip import clip_of
from dd_core.text import tokens
from workflows.evaluation import ATTRIBUTES, EvaluationSpec, Verdict, scores
from workflows.grammar import Case
from workflows.oracle import judged, read
from workflows.shapes import SHAPES

BATCH = 16
COLUMNS = ("all", "one_object", "two_object", "unseen", *ATTRIBUTES, "things", "class", "clip", "image_s")


def paint(
    cascade: bundle.Cascade, hops: Sequence[HopSpec], cases: Sequence[Case], *, labels: bool
) -> tuple[Tensor, float]:
    """Pictures [n 3 h w] in [-1, 1], and seconds for each."""
    caption = torch.tensor(tokens([case.caption for case in cases], cascade.spec.context_length))
    asked = torch.arange(len(cases)) % len(SHAPES)
    found, began = [], time.perf_counter()
    for first in range(0, len(cases), BATCH):
        part = slice(first, min(first + BATCH, len(cases)))
        seeds = list(range(part.start, part.stop))
        state = CascadeState(seeds, caption[part], label=asked[part] if labels else None)
        for hop, spec in zip(cascade.hops, hops, strict=True):
            state = run(hop, state, spec.how)
        assert state.image is not None
        found.append(state.image)
    return torch.cat(found), (time.perf_counter() - began) / len(cases)


def named(picture: NDArray[np.uint8]) -> bool:
    """Whether it is a scene: one to three things, all of a shape and a colour with a name."""
    things = read(picture).things
    return 0 < len(things) < 4 and all(thing.shape and thing.colour for thing in things)


def row(
    cases: Sequence[Case], pictures: Tensor, seconds: float, clip: bundle.Trained | None
) -> dict[str, float | None]:
    """Everything that is said of the pictures of one way."""
    seen = [picture.permute(1, 2, 0).numpy() for picture in to_bytes(pictures)]
    judgements = [judged(picture, case.says) for picture, case in zip(seen, cases, strict=True)]
    verdicts = [
        Verdict(case.group, case.caption, truth, "") for case, truth in zip(cases, judgements, strict=True)
    ]
    shapes = [{thing.shape for thing in read(picture).things} for picture in seen]
    told = scores(verdicts) | {
        "things": sum(map(named, seen)) / len(seen),
        "class": sum(SHAPES[i % len(SHAPES)] in there for i, there in enumerate(shapes)) / len(seen),
        "image_s": seconds,
    }
    if clip is not None:
        towers = clip_of(clip)
        ids = torch.tensor(tokens([case.caption for case in cases], towers.spec.context_length))
        with torch.no_grad():
            wanted, shown = towers.read(ids).embedding, towers.embed_image(pictures)
        told["clip"] = F.cosine_similarity(wanted, shown).mean().item()
    return {name: told.get(name) for name in COLUMNS}


def main() -> None:
    """Paint every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", type=Path)
    parser.add_argument("--stage", help="the hop whose sampling changes; the first unless given")
    parser.add_argument("--way", action="append", default=[], help="name=JSON of sampling, more than once")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--clip", type=Path, help="bundle of the CLIP that tells the cosine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="directory for the first pictures of each way")
    options = parser.parse_args()
    cascade, cases = bundle.load_cascade(options.cascade), EvaluationSpec(captions=options.captions).cases()
    stage = options.stage or cascade.spec.hops[0].stage
    clip = bundle.parent_of_hops(options.cascade, cascade.spec, "clip")
    if options.clip:
        clip = bundle.load(options.clip).trained
    table: dict[str, Any] = {}
    for words in options.way or ["as it is={}"]:
        name, _, changes = words.partition("=")
        hops = [
            hop.but(how=hop.how.but(**json.loads(changes))) if hop.stage == stage else hop
            for hop in cascade.spec.hops
        ]
        pictures, seconds = paint(cascade, hops, cases, labels=options.labels)
        table[name] = row(cases, pictures, seconds, clip)
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
            sheet = options.pictures / f"{name.replace(' ', '_')}.png"
            save_image(pictures[:32], sheet, nrow=8, normalize=True, value_range=(-1, 1))
        told = "  ".join(f"{key} {value:.3g}" for key, value in table[name].items() if value is not None)
        sys.stdout.write(f"{name}: {told}\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
