"""What each guidance does for its own score: one base, steered by one guidance after another.

    ddiff run --recipe systems
    python -m tests.benchmarks.guidances runs/demo [--pictures 96] [--only classes,style] [--json FILE]

The base is told a class only by classifier-free guidance (`free`).  All weights of a guidance start from the
same noise, so its effect is a mean of paired differences, given with its 95 % interval.  Its own score, the
higher the better:

    free, classes   1 if the oracle sees a thing of the colour asked for (class i modulo eight in picture i)
    caption, image  cosine with the caption, or with the reference picture, by the run's CLIP, whose image
                    tower has no part in the guidance
    style           minus the distance of Gram matrices to those of the reference
    structure       minus the distance of feature maps to those of the reference
                    (both by the noised CLIP at its lowest noise level, over the value without guidance)
    sum             of caption and style, by the score of either

`ground` is 1 if the oracle finds the reference's background.  References are scenes of a seed of their own.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import save_image

from dd_core import bundle, scores
from dd_core.cascade import CascadeState, run
from dd_core.images import to_bytes, to_unit
from dd_core.nets.clip import Clip
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import load_hop
from dd_core.stages.clip import clip_of
from dd_core.stages.guides import CLEAN
from dd_core.stages.noised_clip import NoisedClip, noised_clip_of
from dd_core.steering import GradientSpec
from dd_core.text import tokens
from jobs.recipes import demo
from jobs.recipes.systems import GUIDING
from tests.benchmarks.systems import NAMES
from workflows.evaluation_spec import EvaluationSpec
from workflows.oracle import read
from workflows.shapes import draw_scene, drawn

BATCH = 16
WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "free": (0, 1, 1.5, 3),
    "classes": (0, 3, 10, 30),
    "caption": (0, 3, 10, 30),
    "image": (0, 3, 10, 30),
    "style": (0, 1e5, 1e6, 1e7),
    "structure": (0, 1e2, 1e3, 1e4),
    "sum": (0, 1, 3),
}
"""Of each guidance; of `free` the classifier-free scale: 0 ignores the class, 1 is the conditional base."""
SUMMED = {"caption": 10.0, "style": 1e6}
"""Weights of what `sum` adds up, at weight 1."""


class Asked(NamedTuple):
    """What the pictures are steered to, one row for each."""

    label: Tensor
    caption: Tensor
    """Tokens."""
    reference: Tensor
    """[n 3 64 64] in [-1, 1]."""


class Judges(NamedTuple):
    """The networks that score pictures."""

    clip: Clip
    noised: NoisedClip


def asked(count: int) -> Asked:
    """Eight colours in turn, captions that training never saw, scenes of a seed of their own."""
    rng = np.random.default_rng(54321)
    scenes = np.stack([drawn(draw_scene(rng), 64) for _ in range(count)])
    captions = [case.caption for case in EvaluationSpec(captions=count).cases()]
    return Asked(
        torch.arange(count) % len(NAMES),
        torch.tensor(tokens(captions, demo.CONTEXT)),
        to_unit(torch.from_numpy(scenes).permute(0, 3, 1, 2)),
    )


def way(guidance: str, weight: float, steps: int) -> SamplingSpec:
    """How the base is sampled; it is told a class only by classifier-free guidance."""
    plain = SamplingSpec(sampler="ddpm", variance="fixed_small", num_steps=steps, spacing="trailing")
    if guidance == "free":
        return plain.but(guidance_scale=weight)
    parts = SUMMED if guidance == "sum" else {guidance: 1.0}
    gradient = GradientSpec(**{name: weight * each for name, each in parts.items()}) if weight else None
    return plain.but(guidance_scale=0.0 if guidance == "classes" else 1.0, gradient=gradient)


def loaded(directory: Path, name: str) -> Trained:
    """A trained stage of the run; for noised_clip the one that knows the noise levels of a chain."""
    stage = GUIDING if name == "noised_clip" else name
    return bundle.load(directory / stage / "bundle").trained


def painted(directory: Path, wanted: Asked, guidance: str, how: SamplingSpec) -> Tensor:
    """Pictures [n 3 h w] in [-1, 1]; picture i has seed i."""
    parents = {"free": (), "classes": ("classifier",)}.get(guidance, ("noised_clip", "clip"))
    base, *guides = (loaded(directory, name) for name in ("improved_ddpm", *parents))
    hop = load_hop(base, dict(zip(parents, guides, strict=True)), device="cpu")
    found = []
    for rows in torch.arange(len(wanted.label)).split(BATCH):
        state = CascadeState(
            rows.tolist(),
            wanted.caption[rows],
            label=wanted.label[rows] if guidance in ("free", "classes") else None,
            reference=wanted.reference[rows],
        )
        picture = run(hop, state, how).image
        assert picture is not None
        found.append(picture)
    return torch.cat(found)


@torch.no_grad()
def score(guidance: str, pictures: Tensor, wanted: Asked, judges: Judges) -> Tensor:
    """The guidance's own score of each finished picture; see above."""

    def apart(seen: Callable[[Tensor], list[Tensor]]) -> Tensor:
        return -scores.distance(seen(pictures), seen(wanted.reference))

    def features(picture: Tensor) -> list[Tensor]:
        return judges.noised.features(picture, torch.full((len(picture),), CLEAN))

    match guidance:
        case "caption":
            return F.cosine_similarity(
                judges.clip.read(wanted.caption).embedding, judges.clip.embed_image(pictures)
            )
        case "image":
            return F.cosine_similarity(
                judges.clip.embed_image(wanted.reference), judges.clip.embed_image(pictures)
            )
        case "style":
            return apart(lambda picture: [scores.gram(layer) for layer in features(picture)])
        case "structure":
            return apart(features)
        case _:
            colours = [{thing.colour for thing in read(seen).things} for seen in rgb(pictures)]
            there = [NAMES[label] in colour for label, colour in zip(wanted.label, colours, strict=True)]
            return torch.tensor(there).float()


def same_ground(pictures: Tensor, wanted: Asked) -> float:
    """Share of pictures that have the reference's background."""
    pairs = zip(rgb(pictures), rgb(wanted.reference), strict=True)
    return float(np.mean([read(one).background == read(other).background for one, other in pairs]))


def rgb(pictures: Tensor) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    """Pictures as the oracle reads them."""
    return [picture.permute(1, 2, 0).numpy() for picture in to_bytes(pictures)]


def raised(now: Tensor, before: Tensor) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its 95 % interval."""
    change = now - before
    return change.mean().item(), 1.96 * change.std().item() / math.sqrt(len(change))


def measured(guidance: str, options: argparse.Namespace, judges: Judges) -> list[dict[str, float]]:
    """One guidance at all its weights, printed as it goes."""
    wanted, rows, before = asked(options.pictures), [], dict[str, Tensor]()
    for weight in WEIGHTS[guidance]:
        pictures = painted(options.run, wanted, guidance, way(guidance, weight, options.steps))
        ground = same_ground(pictures, wanted)
        for judged in SUMMED if guidance == "sum" else (guidance,):
            now = score(judged, pictures, wanted, judges)
            first = before.setdefault(judged, now)
            unit = first.mean().abs().item() if judged in ("style", "structure") else 1.0
            change, give = raised(now / unit, first / unit)
            row = {"weight": weight, "score": now.mean().item() / unit, "change": change, "give": give}
            rows.append(row | {"ground": ground})
            words = "  ".join(f"{key} {value:.3g}" for key, value in rows[-1].items())
            sys.stdout.write(f"{guidance}, by {judged}: {words}\n")
            sys.stdout.flush()
        if options.sheets:
            options.sheets.mkdir(parents=True, exist_ok=True)
            shown = torch.cat([wanted.reference[:8], pictures[:16]])
            sheet = options.sheets / f"{guidance}_{weight:g}.png"
            save_image(shown, sheet, nrow=8, normalize=True, value_range=(-1, 1))
    return rows


def main() -> None:
    """Lead, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", help="these guidances, joined by commas")
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--steps", type=int, default=25, help="of ancestral sampling")
    parser.add_argument("--sheets", type=Path, help="directory for references and what was painted")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    only = options.only.split(",") if options.only else list(WEIGHTS)
    if odd := set(only) - set(WEIGHTS):
        parser.error(f"--only: there is no {', '.join(sorted(odd))}; there are {', '.join(WEIGHTS)}")
    clip, noised = (loaded(options.run, name) for name in ("clip", "noised_clip"))
    judges = Judges(clip_of(clip), noised_clip_of(noised))
    table = {guidance: measured(guidance, options, judges) for guidance in only}
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
