"""Prepared pairs for tests, made in a moment: coloured noise with a caption of two tokens."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(size: int, number: int) -> bytes:
    """A PNG, different for each number."""
    rng = np.random.default_rng(number)
    pixels = (rng.integers(0, 256, (1, 1, 3)) * rng.random((size, size, 1))).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_prepared(
    directory: Path, *, files: int = 2, rows: int = 40, size: int = 16, rejected: int = 3
) -> Path:
    """A finished prepared directory; the first `rejected` rows of every file are rejects."""
    directory.mkdir(parents=True)
    for file in range(files):
        numbers = range(file * rows, (file + 1) * rows)
        usable = [place >= rejected for place in range(rows)]
        table = pa.table(
            {
                "key": [f"{number:06d}" for number in numbers],
                "tokens": pa.array(
                    [[49406, 1 + number, 49407, 0, 0, 0, 0, 0] for number in numbers], pa.list_(pa.int32())
                ),
                f"image{size}": [
                    png(size, number) if good else None for number, good in zip(numbers, usable, strict=True)
                ],
                "meta": [json.dumps({"things": [{"n": number % 3}]}) for number in numbers],
                "reject": ["" if good else "image: bad" for good in usable],
            }
        )
        path = directory / f"part-{file:05d}.parquet"
        pq.write_table(table, path, row_group_size=16, write_page_checksum=True)
    facts = {"digest": "d" * 64, "kept": files * (rows - rejected)}
    (directory / "manifest.json").write_text(json.dumps(facts))
    return directory
