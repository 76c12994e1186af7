"""Inpainting: scenes of two things, one of them hidden, which is painted back from the caption of both.

    ddiff run --recipe demo
    python -m tests.benchmarks.holes runs/demo/cascade [--pictures 48] [--steps N] [--by-colour] [--json FILE]

The hole is a square around one thing, its edges a tenth of the picture's side beyond those of the thing.  The
cascade is told the picture outside, the hole, and a caption that names both things; networks without mask
channels fill it without training (`inpainting: projection`).  `all` and the attributes are the oracle's, as
in an evaluation; `filled` is the share of pictures with a thing of the hidden one's shape and colour in the
hole; `another` the same for the hidden thing of the scene before, which the caption does not name: chance.
`outside` is the largest difference from the picture outside the hole, of 255.  With --by-colour a cascade
that is told classes, such as that of improved_ddpm, is asked for the hidden thing's colour, and only the
colour is compared.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import save_image

from dd_core import bundle
from dd_core.bundle import Cascade
from dd_core.cascade import CascadeState, requested, run
from dd_core.images import to_bytes, to_unit
from tests.benchmarks.systems import NAMES
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


def filled(cascade: Cascade, riddle: Riddle, seed: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The filled picture and the original, [3 h w] in [-1, 1]."""
    spec = cascade.spec
    before = torch.from_numpy(drawn(riddle.scene, spec.image_size)).permute(2, 0, 1)[None]
    hole = torch.from_numpy(riddle.hole)[None, None]
    state: CascadeState = requested([riddle.case.caption], [seed], spec.context_length)
    state = state._replace(known=to_unit(before), hole=hole)
    if options.by_colour:
        state = state._replace(label=torch.tensor([NAMES.index(riddle.hidden.colour)]))
    for link, hop in zip(spec.hops, cascade.hops, strict=True):
        how = link.how.but(inpainting="projection")
        if options.steps and link.how.sampler != "consistency":
            how = how.but(num_steps=options.steps, spacing="trailing")
        state = run(hop, state, how)
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


def main() -> None:
    """Hide, fill, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cascade", type=Path)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, help="of every hop, all of them chains, at trailing timesteps")
    parser.add_argument("--by-colour", action="store_true", help="ask by class: the hidden thing's colour")
    parser.add_argument("--sheet", type=Path, help="file for the first, each below what was known of it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cascade = bundle.load_cascade(options.cascade, device="cpu")
    asked = riddles(options.pictures, cascade.spec.image_size)
    verdicts, in_hole, by_chance, outside, shown = [], [], [], 0.0, []
    for seed, riddle in enumerate(asked):
        image, before = filled(cascade, riddle, seed, options)
        hole = torch.from_numpy(riddle.hole)
        outside = max(outside, (image - before).masked_fill(hole, 0).abs().max().item() * 127.5)
        picture = to_bytes(image[None])[0].permute(1, 2, 0).numpy()
        verdicts.append(Verdict("two_object", riddle.case.caption, judged(picture, riddle.case.says), ""))
        things = read(picture).things
        in_hole.append(there(things, riddle.hidden, riddle, by_colour=options.by_colour))
        by_chance.append(there(things, asked[seed - 1].hidden, riddle, by_colour=options.by_colour))
        shown += [before.masked_fill(hole, 0), image] if seed < 16 else []
    row = {"n": len(asked), "filled": float(np.mean(in_hole)), "another": float(np.mean(by_chance))}
    told = scores(verdicts)
    row |= {name: told[name] for name in ("all", *ATTRIBUTES) if told.get(name) is not None}
    row["outside"] = outside
    sys.stdout.write("  ".join(f"{name} {value:.3g}" for name, value in row.items()) + "\n")
    if options.sheet:
        rows = [torch.stack(shown[i : i + 16]) for i in range(0, len(shown), 16)]
        pictures = torch.cat([torch.cat([row[::2], row[1::2]]) for row in rows])
        save_image(pictures, options.sheet, nrow=8, normalize=True, value_range=(-1, 1))
    if options.json:
        options.json.write_text(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
