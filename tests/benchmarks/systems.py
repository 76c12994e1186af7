"""What every system of the field paints after a demo's worth of training, sampled in several ways.

    ddiff run --recipe systems
    python -m tests.benchmarks.systems runs/demo [--only glide,latent] [--captions 96] [--json FILE]

Each system paints captions that training never saw, with the same seeds, in this process.  `all`, `one`,
`two`, `unseen` and the attributes are as in an evaluation.  For networks that are told no caption there
are `things` (share of pictures of one to three things, each of a shape and a colour that have a name) and,
where classes are asked for (class i modulo eight in picture i), `class` (share with a thing of that colour).
`clip` is the cosine of picture and caption by the run's own CLIP, if it has one.  Of `re-ranking` several
pictures of a caption are painted, and the one is judged whose `clip` is highest.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import save_image

from dd_core import bundle
from dd_core.cascade import CascadeState, Hop, HopSpec, run
from dd_core.images import to_bytes, to_unit
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import load_hop
from dd_core.stages.clip import clip_of
from dd_core.steering import GradientSpec
from dd_core.text import tokens
from jobs.recipes import (
    autoregressive,
    consistency,
    ddpm,
    demo,
    glide,
    guided,
    improved_ddpm,
    latent,
    systems,
    unclip,
)
from workflows.evaluation import ATTRIBUTES, Verdict, scores
from workflows.evaluation_spec import EvaluationSpec
from workflows.grammar import Case
from workflows.oracle import judged, read
from workflows.pictures import reconstructions
from workflows.shapes import COLOURS, draw_scene, drawn

BATCH = 16
NAMES = tuple(COLOURS)
COLUMNS = ("all", "one_object", "two_object", "unseen", *ATTRIBUTES, "things", "class", "clip", "image_s")
Ways = Mapping[str, Mapping[str, Any]]


class System(NamedTuple):
    """A system of the table: its hops, and the ways to sample one of them, a row each."""

    hops: tuple[HopSpec, ...]
    changes: str
    """The hop that `ways` change."""
    ways: Ways
    labels: bool = False
    candidates: int = 1
    """Pictures of each caption; the nearest to it by CLIP is kept."""


def renamed(hops: Sequence[HopSpec], **names: str) -> tuple[HopSpec, ...]:
    """The hops of a recipe under the names that recipe `systems` gives their stages."""
    return tuple(hop.but(stage=names.get(hop.stage, hop.stage)) for hop in hops)


def scaled(*scales: float) -> Ways:
    """Classifier-free guidance at these scales."""
    return {f"guidance {scale:g}": {"guidance_scale": scale} for scale in scales}


def led(score: str, *weights: float) -> Ways:
    """No guidance, and guidance by gradient of a score at these weights."""
    some = {f"{score} {weight:g}": {"gradient": GradientSpec(**{score: weight})} for weight in weights}
    return {"no guidance": {"gradient": None}} | some


def all_systems() -> dict[str, System]:
    """Every system of the table."""
    teacher = renamed(improved_ddpm.run().cascade.hops, base="improved_ddpm")
    plain = HopSpec(
        stage="improved_ddpm", how=SamplingSpec(spacing="trailing", num_steps=25, guidance_scale=3.0)
    )
    latents = latent.run().cascade.hops
    written = autoregressive.cascade().hops
    one_draw = {"one draw": {"draws": 1}}
    classes = guided.classes().cascade.hops
    (led_hop,) = renamed(guided.run().cascade.hops, base="untold")
    glide_led, _ = renamed(glide.clip_guided().cascade.hops, base="glide_base")
    glide_led = glide_led.but(guides=glide_led.guides | {"noised_clip": "glide_guide"})
    led_hop = led_hop.but(guides=led_hop.guides | {"noised_clip": systems.GUIDING})
    return {
        "demo": System(demo.cascade().hops, "base", {"15 steps": {}}),
        "consistency": System(
            consistency.cascade().hops, "consistency", {f"{n} steps": {"num_steps": n} for n in (1, 2, 4)}
        ),
        "autoregressive": System(written, "autoregressive_prior", {"8 draws": {}} | one_draw),
        "re-ranking": System(written, "autoregressive_prior", one_draw, candidates=8),
        "unclip": System(unclip.small().cascade.hops, "decoder", scaled(1, 2, 4)),
        "glide": System(
            renamed(glide.run().cascade.hops, guided="glide", upsampler="glide_upsampler"),
            "glide",
            scaled(1, 3),
        ),
        "glide.clip_guided": System(
            (glide_led, *renamed(glide.run().cascade.hops[1:], upsampler="glide_upsampler")),
            "glide_base",
            led("caption", 3, 10, 30),
        ),
        "latent": System(renamed(latents, base="latent"), "latent", scaled(1, 3)),
        "latent.vq": System(renamed(latents, base="latent_vq"), "latent_vq", scaled(1, 3)),
        "latent.joint": System(renamed(latents, base="latent_joint"), "latent_joint", scaled(1, 3)),
        "guided": System((led_hop,), "untold", led("caption", 3, 30)),
        "guided.classes": System(
            renamed(classes, base="untold"), "untold", led("classes", 3, 10), labels=True
        ),
        "improved_ddpm": System(
            teacher,
            "improved_ddpm",
            scaled(1, 3)
            | {
                f"guidance 3, variance {variance}": {"guidance_scale": 3.0, "variance": variance}
                for variance in ("fixed_small", "learned")
            },
            labels=True,
        ),
        "solvers": System(
            (plain,),
            "improved_ddpm",
            {
                "DDIM, 25 steps": {"sampler": "ddim"},
                "DPM-Solver++, 25 steps": {"sampler": "dpmpp_2m", "spacing": "karras"},
                "Heun, 13 steps": {"sampler": "heun", "spacing": "karras", "num_steps": 13},
            },
            labels=True,
        ),
        "consistency.classes": System(
            renamed(consistency.classes().cascade.hops, consistency="class_student"),
            "class_student",
            {"4 steps": {"num_steps": 4}},
            labels=True,
        ),
        "ddpm": System(renamed(ddpm.run().cascade.hops, base="ddpm"), "ddpm", {"100 steps": {}}),
    }


def opened(run_directory: Path, system: System) -> list[Hop]:
    """The hops of a system, ready to paint."""
    whole = systems.run()

    def trained(stage: str) -> Trained:
        return bundle.load(run_directory / stage / "bundle").trained

    hops = []
    for hop in system.hops:
        parents = {role: name for role, name in whole.stage(hop.stage).parents.items() if role != "start"}
        known = {role: trained(name) for role, name in {**parents, **hop.guides}.items()}
        hops.append(load_hop(trained(hop.stage), known, device="cpu"))
    return hops


def paint(
    run_directory: Path, system: System, how: Mapping[str, Any], cases: Sequence[Case], first_seed: int = 0
) -> tuple[Tensor, float]:
    """Pictures [n 3 h w] in [-1, 1], and seconds for each."""
    hops = opened(run_directory, system)
    plan = [hop.how.but(**how) if hop.stage == system.changes else hop.how for hop in system.hops]
    caption = torch.tensor(tokens([case.caption for case in cases], demo.CONTEXT))
    asked = torch.arange(len(cases)) % len(NAMES)
    found, began = [], time.perf_counter()
    for first in range(0, len(cases), BATCH):
        part = slice(first, min(first + BATCH, len(cases)))
        seeds = [first_seed + number for number in range(part.start, part.stop)]
        state = CascadeState(seeds, caption[part], label=asked[part] if system.labels else None)
        for hop, chosen in zip(hops, plan, strict=True):
            state = run(hop, state, chosen)
        assert state.image is not None
        found.append(state.image)
    return torch.cat(found), (time.perf_counter() - began) / len(cases)


def named(picture: NDArray[np.uint8]) -> bool:
    """Whether it is a scene: one to three things, all of a shape and a colour with a name."""
    things = read(picture).things
    return 0 < len(things) < 4 and all(thing.shape and thing.colour for thing in things)


def told(cases: Sequence[Case], pictures: Tensor) -> dict[str, float]:
    """What the oracle says of the pictures of one way."""
    seen = [picture.permute(1, 2, 0).numpy() for picture in to_bytes(pictures)]
    verdicts = [
        Verdict(case.group, case.caption, judged(picture, case.says), "")
        for case, picture in zip(cases, seen, strict=True)
    ]
    colours = [{thing.colour for thing in read(picture).things} for picture in seen]
    return scores(verdicts) | {
        "things": sum(map(named, seen)) / len(seen),
        "class": sum(NAMES[i % len(NAMES)] in there for i, there in enumerate(colours)) / len(seen),
    }


def best(
    run_directory: Path, system: System, how: Mapping[str, Any], cases: Sequence[Case], clip: Trained | None
) -> tuple[Tensor, float]:
    """As `paint`: of the candidates of each caption the nearest to it by CLIP (DALL-E 1's re-ranking)."""
    found, seconds = paint(run_directory, system, how, cases)
    if system.candidates == 1:
        return found, seconds
    assert clip is not None, "re-ranking needs the run's CLIP"
    every, near = [found], [nearness(cases, found, clip)]
    for draw in range(1, system.candidates):
        pictures, more = paint(run_directory, system, how, cases, draw * len(cases))
        every, near, seconds = [*every, pictures], [*near, nearness(cases, pictures, clip)], seconds + more
    chosen = torch.stack(near).argmax(0)
    return torch.stack(every)[chosen, torch.arange(len(cases))], seconds


@torch.no_grad()
def nearness(cases: Sequence[Case], pictures: Tensor, clip: Trained) -> Tensor:
    """Cosine of each picture with its caption, [n]."""
    towers = clip_of(clip)
    wanted = towers.read(torch.tensor(tokens([case.caption for case in cases], demo.CONTEXT))).embedding
    return F.cosine_similarity(wanted, towers.embed_image(pictures))


def rebuilt(run_directory: Path, count: int) -> dict[str, float]:
    """Mean PSNR in dB of new scenes through each autoencoder and back."""
    rng = np.random.default_rng(12345)
    scenes = torch.from_numpy(np.stack([drawn(draw_scene(rng)) for _ in range(count)])).permute(0, 3, 1, 2)
    return {
        name: float(
            np.mean([one.psnr for one in reconstructions(run_directory / name / "bundle", to_unit(scenes))])
        )
        for name in ("autoencoder", "vq_autoencoder")
    }


def main() -> None:
    """Paint with every system in every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", help="these systems, joined by commas")
    parser.add_argument("--captions", type=int, default=96)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="directory for the first pictures of each way")
    options = parser.parse_args()
    cases = EvaluationSpec(captions=options.captions).cases()
    known = [*all_systems(), "autoencoders"]
    only = options.only.split(",") if options.only else known
    if odd := set(only) - set(known):
        parser.error(f"--only: there is no {', '.join(sorted(odd))}; there are {', '.join(known)}")
    clip = bundle.load(options.run / "clip" / "bundle").trained if (options.run / "clip").exists() else None
    table: dict[str, dict[str, float]] = {}
    for name, system in all_systems().items():
        for way, how in system.ways.items() if name in only else ():
            pictures, seconds = best(options.run, system, how, cases, clip)
            row = told(cases, pictures) | {"image_s": seconds}
            if clip is not None:
                row["clip"] = nearness(cases, pictures, clip).mean().item()
            table[f"{name}, {way}"] = row
            words = "  ".join(f"{key} {row[key]:.3g}" for key in COLUMNS if row.get(key) is not None)
            sys.stdout.write(f"{name}, {way}: {words}\n")
            sys.stdout.flush()
            if options.pictures:
                options.pictures.mkdir(parents=True, exist_ok=True)
                sheet = options.pictures / f"{name}_{way}.png".replace(" ", "_")
                save_image(pictures[:32], sheet, nrow=8, normalize=True, value_range=(-1, 1))
    if "autoencoders" in only:
        table["autoencoders"] = rebuilt(options.run, options.captions)
        sys.stdout.write(f"PSNR: {table['autoencoders']}\n")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
