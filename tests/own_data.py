"""A user's own captioned pictures, prepared in a moment and without Ray."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dd_core import sealed
from tests.conftest import write_shard
from workflows.census import totals
from workflows.pairs import PairsSpec
from workflows.parts import write_part
from workflows.storage import Home

SIZES = (8, 16)


def colour(number: int) -> tuple[int, int, int]:
    """A colour, different for each number below 729."""
    return tuple(25 + 25 * (number // 9**place % 9) for place in range(3))  # type: ignore[return-value]


def caption(number: int) -> str:
    """The caption of a picture: names its colour."""
    return "colour " + " ".join(map(str, colour(number)))


def picture(number: int) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), colour(number), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def own_data(
    directory: Path, *, pairs: int = 80, shards: int = 2, held_out: float = 0.0, twice: int = 0
) -> Home:
    """Prepared pairs; every shard has the first `twice` captions, odd shards have them in capitals."""
    spec = PairsSpec(
        shards=("raw",),
        destination=str(directory),
        sizes=SIZES,
        context_length=16,
        min_side=8,
        held_out=held_out,
    )
    home, parts = Home.of(directory), []
    for shard in range(shards):
        files = {}
        for number in (*range(twice), *range(twice + shard, pairs, shards)):
            said = caption(number)
            files[f"{number:04d}.png"] = picture(number)
            files[f"{number:04d}.json"] = json.dumps({"red": colour(number)[0]}).encode()
            files[f"{number:04d}.txt"] = (said.upper() if shard % 2 and number < twice else said).encode()
        tar = write_shard(directory.parent / f"{directory.name}-{shard}.tar", files)
        directory.mkdir(exist_ok=True)
        *_, (_, _, part) = write_part(home, shard, str(tar), spec)
        assert part is not None
        parts.append(part)
    home.drop(".unfinished")
    facts = totals(parts) | {"sizes": list(SIZES)}
    sealed.seal(directory, {part.file: part.sha256 for part in parts}, facts)
    return home
