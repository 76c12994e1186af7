"""The commands of ddiff that ask networks in this process: paint, and measure; jobs/cli.py adds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from jobs.shell import DIRECTORY, FILE, PRECISION, SEALED, Group, answer, fetched

if TYPE_CHECKING:
    from dd_core.precision import Precision

painting = Group("painting")
CASCADE = click.option("--cascade", required=True, type=SEALED, help="A cascade, such as runs/demo/cascade.")


@painting.command()
@click.argument("prompt", default="")
@CASCADE
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed of the first image.")
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(1), help="How many images.")
@click.option("--keep", type=click.IntRange(1), help="Keep so many: those nearest to PROMPT by CLIP.")
@click.option("--steps", type=click.IntRange(1, 4000), help="Denoising steps of the base.")
@click.option("--guidance", type=click.FloatRange(0, 50), help="Guidance scale of the base; 1 is none.")
@click.option("--negative", default="", help="What not to paint: guidance leads away from this caption.")
@click.option("--label", type=click.IntRange(0), help="Class, where the cascade paints by class.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="HOP.FIELD=VALUE",
    help="Change how a hop is sampled, such as base.sampler=heun; may be repeated.",
)
@click.option(
    "--image",
    "pictures",
    type=FILE,
    multiple=True,
    help="RGB picture to vary, or to fill where --mask is white.",
)
@click.option("--mask", type=FILE, help="Greyscale picture; white is made anew.")
@click.option(
    "--strength", type=click.FloatRange(0, 1, min_open=True), help="How far to vary: share of steps."
)
@click.option("--training-free", is_flag=True, help="Fill holes with models that were not trained to.")
@click.option("--colourise", is_flag=True, help="--image is greyscale: keep its brightness, add colours.")
@click.option("--enlarge", is_flag=True, help="--image is small: keep its pixels, make what is between them.")
@click.option("--reference", type=FILE, help="RGB picture to take content, style or structure from.")
@click.option(
    "--vary", type=click.FloatRange(0, 1), help="Remake --image from its own code; 0 repaints it, 1 is free."
)
@click.option(
    "--between", type=click.FloatRange(0, 1), help="Paint what lies between two --image, from 0 to 1."
)
@click.option("--fresh-noise", is_flag=True, help="Of --between: begin with the noise of --seed.")
@click.option("--instead-of", help="What --image shows; it is turned to PROMPT.")
@click.option(
    "--by", default=0.35, show_default=True, type=click.FloatRange(0, 1), help="How far --instead-of turns."
)
@PRECISION
@click.option("--out", default=Path("samples"), show_default=True, type=DIRECTORY, help="Where the PNGs go.")
def sample(
    prompt: str,
    cascade: Path | str,
    seed: int,
    count: int,
    keep: int | None,
    steps: int | None,
    guidance: float | None,
    negative: str,
    label: int | None,
    changes: tuple[str, ...],
    pictures: tuple[Path, ...],
    mask: Path | None,
    strength: float | None,
    training_free: bool,
    colourise: bool,
    enlarge: bool,
    reference: Path | None,
    vary: float | None,
    between: float | None,
    fresh_noise: bool,
    instead_of: str | None,
    by: float,
    precision: Precision,
    out: Path,
) -> None:
    """Paint PROMPT without a server.  The same seed gives the same picture, on one machine to the bit.

    Another kind of CPU or GPU may compute in other numbers (--precision says in which), or add in another
    order.

    PROMPT may be left out where no hop reads captions, and with --vary and --between, whose pictures say what
    to paint.  --colourise and --enlarge are for cascades whose base is a consistency model.
    """
    from jobs.order import Order
    from jobs.sample import paint

    image, other = two_of(pictures)
    order = Order(
        prompt=prompt,
        seed=seed,
        images=count,
        steps=steps,
        guidance=guidance,
        keep=keep,
        label=label,
        image=image,
        mask=mask,
        strength=strength,
        training_free=training_free,
        reference=reference,
        other=other,
        vary=vary,
        between=between,
        fresh_noise=fresh_noise,
        instead_of=instead_of,
        by=by,
        negative=negative,
        colourise=colourise,
        enlarge=enlarge,
        changes=changes,
        precision=precision,
    )
    made = paint(order, fetched(cascade), out)
    lines = [f"{one.path}" if one.score is None else f"{one.path}  {one.score:.4f}" for one in made]
    scores = {} if keep is None else {"scores": [one.score for one in made]}
    facts = {"images": [one.path for one in made], "truncated": made[0].cut} | scores
    answer(facts, "\n".join(lines))


@painting.command(short_help="Paint PICTURE again from the text inside it, and compare.")
@click.argument("picture", type=FILE)
@CASCADE
@click.option("--image", "pictures", type=FILE, multiple=True, help="As it was given then.")
@click.option("--mask", type=FILE, help="As it was given then.")
@click.option("--reference", type=FILE, help="As it was given then.")
def reproduce(
    picture: Path,
    cascade: Path | str,
    pictures: tuple[Path, ...],
    mask: Path | None,
    reference: Path | None,
) -> None:
    """Paint PICTURE again from the text inside it, and say whether it is the same to the bit."""
    from jobs.reproduce import reproduce as painted_again

    image, other = two_of(pictures)
    given = {"image": image, "other": other, "mask": mask, "reference": reference}
    facts = painted_again(picture, fetched(cascade), {name: path for name, path in given.items() if path})
    answer(facts, f"{picture}: the same to the bit, painted again with seed {facts['seed']}")


@painting.command(short_help="Bits per dim of pictures under a chain.")
@click.argument("path", type=DIRECTORY)
@click.option("--data", required=True, help="Prepared pairs that were not trained on: a directory, or s3://.")
@click.option(
    "-n", "count", default=64, show_default=True, type=click.IntRange(1), help="Pictures, from the end."
)
@click.option("--steps", type=click.IntRange(2), help="Sum over so many timesteps instead of all.")
@click.option(
    "--variance",
    type=click.Choice(["learned", "fixed_small", "fixed_large"]),
    help="Variance of each step; learned, or fixed_large if the model has not learned it.",
)
@click.option("--stage", help="Which chain of a cascade that has several.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the noise.")
def bits(
    path: Path,
    data: str,
    count: int,
    steps: int | None,
    variance: Literal["learned", "fixed_small", "fixed_large"] | None,
    stage: str | None,
    seed: int,
) -> None:
    """Bits per dim of pictures under the chain in PATH: a bundle, a cascade, or a run.

    The variational bound and its terms, each with the 95 % interval of its mean over pictures.  A chain that
    is told captions or classes is told those of the pictures.  It asks the network once for each timestep:
    1,000 times for eight pictures.
    """
    from jobs.bits import Asked, measured, table

    facts = measured(path, data, Asked(count, steps, variance, stage, seed))
    answer(facts, table(facts, data))


def two_of(pictures: tuple[Path, ...]) -> tuple[Path | None, Path | None]:
    """The pictures of a command that takes two at most."""
    if len(pictures) > 2:
        raise click.UsageError("--image is given once, or twice with --between")
    image, other = (*pictures, None, None)[:2]
    return image, other
