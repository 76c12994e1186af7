"""The commands of ddiff that bring weights in and write them for others; jobs/cli.py adds them."""

from __future__ import annotations

from pathlib import Path

import click

from jobs.shell import DIRECTORY, Group, answer

exchanged = Group("exchanged")


@exchanged.command("import")
@click.argument("source")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=DIRECTORY, help="Where the bundle goes.")
@click.option(
    "--averaged/--raw", default=True, show_default=True, help="Weights to take from a file with both."
)
@click.option(
    "--tokenizer",
    nargs=2,
    type=click.Path(path_type=Path),
    help="Of glide: its encoder.json and vocab.bpe, plain or .gz.",
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    help="Of an autoencoder by itself: one over the deviation of its latents, where no file says it.",
)
@click.option(
    "--classifier", type=click.Path(path_type=Path), help="Of a base of ADM: it leads it to a class."
)
@click.option(
    "--upsampler", type=click.Path(path_type=Path), help="Of a base of ADM: it enlarges its pictures."
)
@click.option(
    "--clip",
    nargs=2,
    type=click.Path(path_type=Path),
    help="Of glide: image and text tower of its noised CLIP, which leads the base.",
)
@click.option(
    "--reads-for",
    metavar="SOURCE",
    help="Of a CLIP: it reads captions as that network hears them, such as sd1 or sd2.",
)
def bring_in(
    source: str,
    paths: tuple[Path, ...],
    out: Path,
    averaged: bool,
    tokenizer: tuple[Path, Path] | None,
    scale: float | None,
    classifier: Path | None,
    upsampler: Path | None,
    clip: tuple[Path, Path] | None,
    reads_for: str | None,
) -> None:
    """Make a bundle of published weights, or a cascade that paints.

    SOURCE says what they are, such as adm-imagenet256, glide-base, sd1, sd-x4-upscaler, ldm-kl-f8,
    karlo-prior, openai-clip:ViT-L-14 or diffusers; a wrong one is refused, with the names of the others.
    PATHS are its files, or the folder of a pipeline or of one component of diffusers.

    What paints from noise, told no more than a class (DDPM, Improved DDPM, ADM, EDM, consistency models,
    latent diffusion of faces, bedrooms and churches), becomes a cascade; so does Stable Diffusion (sd1,
    sd2-base, sd2, and to fill holes sd1-inpaint, sd2-inpaint: the one file of UNet, autoencoder and text
    tower), and a pipeline of diffusers with these parts; sources glide and glide-inpaint, base and upsampler,
    too, with their --tokenizer.
    """
    from jobs.exchange import More, import_weights

    more = More(tokenizer, scale, classifier, upsampler, clip, reads_for)
    answer(import_weights(source, paths, out, averaged=averaged, more=more))


@exchanged.command()
@click.argument("bundle", type=DIRECTORY)
@click.option("--format", "kind", required=True, type=click.Choice(["diffusers"]))
@click.option("--out", required=True, type=DIRECTORY, help="Where the folders go.")
def export(bundle: Path, kind: str, out: Path) -> None:
    """Write a BUNDLE in the format of somebody else."""
    from jobs.export import export_diffusers

    answer({"format": kind} | export_diffusers(bundle, out))
