"""Score over calls of the network: every solver on one base, and the consistency model distilled from it.

    ddiff run --recipe systems
    python -m tests.benchmarks.solvers runs/demo [--pictures 32] [--plot FILE] [--json FILE]
        [--only DDPM,Heun] [--add FILE ...]

For every solver picture i has seed i and class i modulo eight, a colour.  It is right if the oracle reads a
scene in it, one to three things, all of a shape and a colour that have a name, and one of them has the colour
asked for; `colour` counts the last condition alone.  DDPM and DDIM visit trailing timesteps, DPM-Solver++ and
Heun the levels of Karras et al., since a Heun step from the chain's own highest level to the next, hundreds
of times lower, is all error.  Heun makes two calls a step, one in the last.  A call is one answer of the
network for one picture; guidance, where there is any, evaluates it twice in a call.  With --only and --add
curves are measured in parts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dd_core import bundle
from dd_core.cascade import CascadeState, Hop, run
from dd_core.images import to_bytes
from dd_core.samplers import SamplingSpec
from dd_core.stages import load_hop
from dd_core.stages.consistency_hop import ConsistencyHop, possible_jumps
from jobs.recipes import demo
from tests.benchmarks.systems import NAMES, named
from workflows.oracle import read

STUDENT = "consistency (distilled)"
CALLS = (2, 4, 8, 16, 32, 64, 250)
JUMPS = (1, 2, 4, 8)
BATCH = 16


class Score(NamedTuple):
    """Shares of the pictures of one solver with this number of calls."""

    calls: int
    right: float
    colour: float


def solvers(scale: float) -> dict[str, Callable[[int], SamplingSpec]]:
    """For each solver, how it spends a number of calls."""
    common = SamplingSpec(spacing="trailing", guidance_scale=scale)
    karras = common.but(spacing="karras")
    return {
        "DDPM": lambda calls: common.but(sampler="ddpm", variance="fixed_small", num_steps=calls),
        "DDIM": lambda calls: common.but(sampler="ddim", num_steps=calls),
        "DPM-Solver++(2M)": lambda calls: karras.but(sampler="dpmpp_2m", num_steps=calls),
        "Heun": lambda calls: karras.but(sampler="heun", num_steps=(calls + 1) // 2),
    }


def painted(hop: Hop, how: SamplingSpec, count: int) -> Tensor:
    """Pictures [count 3 h w] in [-1, 1]; seed and class follow from the picture's number."""
    found = []
    for first in range(0, count, BATCH):
        numbers = torch.arange(first, min(first + BATCH, count))
        caption = torch.zeros(len(numbers), demo.CONTEXT, dtype=torch.long)
        state = run(hop, CascadeState(numbers.tolist(), caption, label=numbers % len(NAMES)), how)
        assert state.image is not None
        found.append(state.image)
    return torch.cat(found)


def score(pictures: Tensor, calls: int) -> Score:
    """What the oracle says of pictures."""
    seen = [picture.permute(1, 2, 0).numpy() for picture in to_bytes(pictures)]
    there = [
        NAMES[number % len(NAMES)] in {thing.colour for thing in read(one).things}
        for number, one in enumerate(seen)
    ]
    right = [colour and named(one) for colour, one in zip(there, seen, strict=True)]
    return Score(calls, sum(right) / len(right), sum(there) / len(there))


def chart(curves: dict[str, list[Score]], count: int) -> Figure:
    """Share of right pictures over calls."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(
            [one.calls for one in points], [100 * one.right for one in points], "o-", label=name, markersize=4
        )
    axes.set_xscale("log", base=2)
    ticks = (1, *CALLS)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("calls of the network for a picture")
    axes.set_ylabel(f"right, % of {count} pictures")
    axes.grid(visible=True, linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def measured(
    name: str, hop: Hop, ways: Sequence[tuple[int, SamplingSpec]], options: argparse.Namespace
) -> list[Score]:
    """The curve of one solver, printed as it grows."""
    found = []
    for calls, how in ways:
        found.append(score(painted(hop, how, options.pictures), calls))
        sys.stdout.write(
            f"{name}, {calls} calls: right {found[-1].right:.3g}  colour {found[-1].colour:.3g}\n"
        )
        sys.stdout.flush()
    return found


def opened(run_directory: Path, stage: str) -> Hop:
    """A stage of the run, ready to paint."""
    return load_hop(bundle.load(run_directory / stage / "bundle").trained, {}, device="cpu")


def main() -> None:
    """Paint with every solver in every number of calls, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument(
        "--scale", type=float, default=1.5, help="of guidance; the student has learned its own"
    )
    parser.add_argument("--most", type=int, default=max(CALLS), help="calls")
    parser.add_argument("--only", help="these curves, joined by commas")
    parser.add_argument("--add", type=Path, nargs="*", default=(), help="--json files of curves to draw too")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known = [STUDENT, *solvers(options.scale)]
    only = options.only.split(",") if options.only else known
    if odd := set(only) - set(known):
        parser.error(f"--only: there is no {', '.join(sorted(odd))}; there are {', '.join(known)}")
    curves = {}
    for path in options.add:
        told = json.loads(path.read_text())
        curves |= {name: [Score(**point) for point in points] for name, points in told.items()}
    if STUDENT in only:
        hop = opened(options.run, "class_student")
        assert isinstance(hop, ConsistencyHop)
        few, jumps = possible_jumps(hop.spec), SamplingSpec(sampler="consistency", guidance_scale=1.0)
        ways = [(calls, jumps.but(num_steps=calls)) for calls in few or JUMPS]
        name = STUDENT + (f", in {hop.spec.segments} segments" if few else "")
        curves[name] = measured(name, hop, ways, options)
    for name, how in solvers(options.scale).items():
        if name in only:
            ways = [
                (2 * how(calls).num_steps - 1 if name == "Heun" else calls, how(calls))
                for calls in CALLS
                if calls <= options.most
            ]
            curves[name] = measured(name, opened(options.run, "improved_ddpm"), ways, options)
    if options.plot:
        chart(curves, options.pictures).savefig(options.plot, dpi=110, metadata={"Software": None})
    if options.json:
        told = {name: [point._asdict() for point in points] for name, points in curves.items()}
        options.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
