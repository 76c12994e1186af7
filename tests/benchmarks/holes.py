"""Inpainting: scenes of two things, one of them hidden, which is painted back from the caption of both.

    ddiff run --recipe systems
    python -m tests.benchmarks.holes runs/demo [--only glide] [--pictures 48] [--json FILE]

The hole is a square around one thing, its edges a tenth of the picture's side beyond those of the thing. A
system is told the picture outside, the hole, and a caption that names both things; networks without mask
channels fill it without training (`inpainting: projection`; a consistency model by its algorithm 4). `all`
and the attributes are the oracle's, as in an evaluation; `filled` is the share of pictures with a thing of
the hidden one's shape and colour in the hole; `another` the same for the hidden thing of the scene before,
which the caption does not name: chance. `outside` is the largest difference from the picture outside the
hole, of 255. Systems that are told classes are asked for the hidden thing's colour, and only the colour is
compared.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import save_image

from dd_core.cascade import CascadeState, Hop, HopSpec, requested, run
from dd_core.images import to_bytes, to_unit
from jobs.recipes import consistency, demo, glide, improved_ddpm, latent
from tests.benchmarks.systems import NAMES, System, opened, renamed
from workflows.evaluation import ATTRIBUTES, Verdict, scores
from workflows.grammar import Case, described
from workflows.oracle import Seen, judged, read
from workflows.shapes import Scene, Thing, draw_scene, drawn

MARGIN = 0.1
"""Between the edge of the hidden thing and that of the hole, as a share of the side."""


class Riddle(NamedTuple):
    """A scene with a hole."""

    scene: Scene
    case: Case
    hidden: Thing
    hole: NDArray[np.bool_]
    """[h w]."""


def riddles(count: int, side: int, seed: int = 777) -> list[Riddle]:
    """Scenes of a seed of their own, the first or the second thing hidden in turn."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        scene = draw_scene(rng, count=2)
        caption, says = described(rng, scene)
        hidden = scene.things[number % 2]
        found.append(Riddle(scene, Case("two_object", caption, says), hidden, around(hidden, side)))
    return found


def around(thing: Thing, side: int) -> NDArray[np.bool_]:
    """Mask [h w] of the square that hides a thing."""
    reach = thing.radius + MARGIN
    at = (np.arange(side) + 0.5) / side
    inside_x, inside_y = np.abs(at - thing.x) < reach, np.abs(at - thing.y) < reach
    return inside_y[:, None] & inside_x[None, :]


def fillers() -> dict[str, tuple[System, int]]:
    """Every system that fills holes, and the side of its pictures."""
    classes = improved_ddpm.SAMPLED.but(num_steps=16, spacing="trailing", guidance_scale=4.0)

    def of_classes(stage: str) -> System:
        return System((HopSpec(stage=stage, how=classes),), stage, {}, labels=True)

    jumping = renamed(consistency.classes().cascade.hops, consistency="class_student")
    names = {"filling": "glide_filling", "filling_upsampler": "glide_filling_upsampler"}
    return {
        "demo, untrained": (System(demo.cascade().hops, "base", {}), 256),
        "improved_ddpm, untrained": (of_classes("improved_ddpm"), 64),
        "improved_ddpm": (of_classes("class_filling"), 64),
        "consistency, untrained": (System(jumping, "class_student", {}, labels=True), 64),
        "glide": (System(renamed(glide.inpainting().cascade.hops, **names), "glide_filling", {}), 256),
        "latent": (
            System(renamed(latent.inpainting().cascade.hops, filling="latent_filling"), "latent_filling", {}),
            256,
        ),
    }


def filled(hops: list[Hop], system: System, riddle: Riddle, seed: int) -> tuple[Tensor, Tensor]:
    """The filled picture and the original, [3 h w] in [-1, 1]."""
    before = torch.from_numpy(drawn(riddle.scene, len(riddle.hole))).permute(2, 0, 1)[None]
    hole = torch.from_numpy(riddle.hole)[None, None]
    state: CascadeState = requested([riddle.case.caption], [seed], demo.CONTEXT)
    state = state._replace(known=to_unit(before), hole=hole)
    if system.labels:
        state = state._replace(label=torch.tensor([NAMES.index(riddle.hidden.colour)]))
    for link, hop in zip(system.hops, hops, strict=True):
        state = run(hop, state, link.how.but(inpainting="projection"))
    assert state.image is not None
    return state.image[0], to_unit(before)[0]


def there(things: tuple[Seen, ...], wanted: Thing, riddle: Riddle, *, by_colour: bool) -> bool:
    """Whether a thing like `wanted` has its middle in the hole."""
    side = len(riddle.hole)
    return any(
        thing.colour == wanted.colour
        and (by_colour or thing.shape == wanted.shape)
        and bool(riddle.hole[int(thing.y * side), int(thing.x * side)])
        for thing in things
    )


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One system's row."""
    system, side = fillers()[name]
    hops, asked = opened(options.run, system), riddles(options.pictures, side)
    verdicts, in_hole, by_chance, outside, shown = [], [], [], 0.0, []
    began = time.perf_counter()
    for seed, riddle in enumerate(asked):
        image, before = filled(hops, system, riddle, seed)
        hole = torch.from_numpy(riddle.hole)
        outside = max(outside, (image - before).masked_fill(hole, 0).abs().max().item() * 127.5)
        picture = to_bytes(image[None])[0].permute(1, 2, 0).numpy()
        verdicts.append(Verdict("two_object", riddle.case.caption, judged(picture, riddle.case.says), ""))
        things = read(picture).things
        in_hole.append(there(things, riddle.hidden, riddle, by_colour=system.labels))
        by_chance.append(there(things, asked[seed - 1].hidden, riddle, by_colour=system.labels))
        shown += [before.masked_fill(hole, 0), image] if seed < 16 else []
    row = {"n": len(asked), "filled": float(np.mean(in_hole)), "another": float(np.mean(by_chance))}
    told = scores(verdicts)
    row |= {name: told[name] for name in ("all", *ATTRIBUTES) if told.get(name) is not None}
    row |= {"outside": outside, "image_s": (time.perf_counter() - began) / len(asked)}
    if options.sheets:
        options.sheets.mkdir(parents=True, exist_ok=True)
        rows = [torch.stack(shown[i : i + 16]) for i in range(0, len(shown), 16)]
        pictures = torch.cat([torch.cat([row[::2], row[1::2]]) for row in rows])
        sheet = options.sheets / f"{name}.png".replace(", ", "_")
        save_image(pictures, sheet, nrow=8, normalize=True, value_range=(-1, 1))
    return row


def main() -> None:
    """Hide, fill, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", action="append", help="this system; may be repeated")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument(
        "--sheets", type=Path, help="directory for the first, each below what was known of it"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    only = options.only or list(fillers())
    if odd := set(only) - set(fillers()):
        parser.error(f"--only: there is no {', '.join(sorted(odd))}; there are {'; '.join(fillers())}")
    table = {}
    for name in only:
        table[name] = measured(name, options)
        words = "  ".join(f"{key} {value:.3g}" for key, value in table[name].items())
        sys.stdout.write(f"{name}: {words}\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
