"""The commands of ddiff that make, prepare and look at training data; jobs/cli.py adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from jobs.shell import DIRECTORY, FILE, Directory, Group, Manner, answer, given, verbose

SHARDS = click.option("--shards", multiple=True, help="Tars: paths, globs, {000..099}, s3://, http://.")
MAX_REJECTED = click.option("--max-rejected", default=0.05, show_default=True, type=click.FloatRange(0, 1))
CAPTION = click.option("--caption", default="txt", show_default=True, help="txt, or json:KEY.")
CONFIG = click.option(
    "--config", "file", type=FILE, help="YAML of pairs or of a run, in place of all others."
)
MIN_SIDE = click.option(
    "--min-side", default=32, show_default=True, type=click.IntRange(1), help="Smaller is rejected."
)


@click.group(cls=Group)
def data() -> None:
    """Make, prepare and look at training data."""


@data.command(short_help="Write tars of the embedded world of shapes.")
@click.option("--out", required=True, type=DIRECTORY, help="Where the tars go.")
@click.option("--pairs", default=10_000, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--format", "image_format", default="png", type=click.Choice(["png", "jpg"]), show_default=True)
def shapes(out: Path, pairs: int, seed: int, image_format: Literal["png", "jpg"]) -> None:
    """Write tars of the embedded world: captioned scenes of coloured shapes."""
    from jobs.prepare import write_shapes

    answer(write_shapes(out, pairs=pairs, seed=seed, image_format=image_format))


@data.command(short_help="Write tars of a folder of pictures and captions.")
@click.argument("folder", type=Directory(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=DIRECTORY, help="Where the tars go.")
@click.option(
    "--captions", "table", type=FILE, help="A .jsonl or .csv.  [default: every metadata.jsonl or .csv]"
)
@click.option("--caption-column", default="text", show_default=True, help="Of the table.")
@click.option("--samples-per-shard", default=1000, show_default=True, type=click.IntRange(1))
def pack(folder: Path, out: Path, table: Path | None, caption_column: str, samples_per_shard: int) -> None:
    """Write tars of the pictures in FOLDER and its subfolders.

    Captions are cat.txt beside cat.jpg, or the rows of a table whose `file_name` names the picture, as in
    Hugging Face's imagefolder: relative to the table or, if that lies elsewhere, to FOLDER.  Pictures without
    a caption are packed too: `ddiff data prepare` counts them.
    """
    from workflows.packing import pack as packed

    answer(packed(folder, out, table=table, column=caption_column, samples_per_shard=samples_per_shard))


@data.command(short_help="Verify, crop, resize and tokenise image-text tars.")
@SHARDS
@click.option("--out", help="Where the prepared data goes: a directory, or s3://.")
@CONFIG
@MAX_REJECTED
@click.option("--sizes", default="64,256", show_default=True, help="Sides of the images, in pixels.")
@CAPTION
@click.option("--context-length", default=32, show_default=True, type=click.IntRange(2), help="Tokens.")
@MIN_SIDE
@click.option(
    "--held-out",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of captions that nothing trains on, to judge by.",
)
def prepare(
    shards: tuple[str, ...],
    out: str | None,
    file: Path | None,
    max_rejected: float,
    sizes: str,
    caption: str,
    context_length: int,
    min_side: int,
    held_out: float,
) -> None:
    """Verify, crop, resize and tokenise image-text tars; every sample is kept or has its reason."""
    from jobs.config import pairs_spec
    from jobs.prepare import prepare_shards, sides, told
    from workflows.pairs import PairsSpec

    if file is not None:
        refuse_beside_config()
        facts = prepare_shards(pairs_spec(file), verbose=verbose())
        answer(facts, told(facts))
        return
    if not shards or not out:
        raise click.UsageError("name --shards and --out, or a --config")
    spec = PairsSpec(
        shards=shards,
        destination=out,
        sizes=sides(sizes),
        caption=caption,
        context_length=context_length,
        min_side=min_side,
        max_reject_fraction=max_rejected,
        held_out=held_out,
    )
    facts = prepare_shards(spec, verbose=verbose())
    answer(facts, told(facts))


def refuse_beside_config() -> None:
    """Refuse options that --config would silently overrule."""
    own = {option.name or "" for option in click.get_current_context().command.params}
    if others := given(*own - {"file", *Manner._fields}):
        raise click.UsageError(f"the file of --config says all; leave out {', '.join(others)}")


@data.command(short_help="Read tars without writing: what is usable, and why not.")
@SHARDS
@CONFIG
@MAX_REJECTED
@CAPTION
@MIN_SIDE
def check(
    shards: tuple[str, ...], file: Path | None, max_rejected: float, caption: str, min_side: int
) -> None:
    """Read tars without writing anything: what is usable, what is not, why.

    What passes here, `ddiff data prepare` with the same options prepares.  How many images would be enlarged
    and captions cut is counted for the sizes and the context of --config, else for those of the demo.
    """
    from jobs.config import pairs_spec
    from jobs.prepare import check_shards, checked, told

    if file is not None:
        refuse_beside_config()
        facts = checked(pairs_spec(file))
        return answer(facts, told(facts))
    if not shards:
        raise click.UsageError("name --shards")
    facts = check_shards(shards, max_rejected=max_rejected, caption=caption, min_side=min_side)
    return answer(facts, told(facts))


@data.command(short_help="Counts of prepared data.")
@click.argument("directory")
def stats(directory: str) -> None:
    """Counts of prepared data, in a DIRECTORY or at an address: rows, bytes, captions, rejects."""
    from jobs.prepare import stats_of

    answer(stats_of(directory))
