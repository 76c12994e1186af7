"""Whether a PNG holds all its rows: decoders fill what is missing with black and say nothing.

PNG specification, third edition: chunks (5), Adam7 passes (8), filtered rows (9).
"""

import struct
import zlib
from collections.abc import Iterator

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type -> samples in a pixel."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Left, top, step right, step down of each pass."""


def check_rows(data: bytes) -> None:
    """Unpack the image data, in pieces that are thrown away, and count its bytes.

    Raises:
        ValueError: If there is less than the header promises, or a chunk is cut.
    """
    unpack, have, need = zlib.decompressobj(), 0, -1
    for kind, content in chunks(data):
        if kind == b"IHDR":
            need = row_bytes(content)
        elif kind == b"IDAT":
            packed = content
            while packed and have <= need and not unpack.eof:
                have += len(unpack.decompress(packed, 2**20))
                packed = unpack.unconsumed_tail
        elif kind == b"IEND":
            break
    if have < need:
        raise ValueError(f"the PNG has {have:,} of its {need:,} bytes of rows")


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of every chunk up to the last whole one."""
    place = 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        yield kind, data[place + 8 : place + 8 + length]
        place += 12 + length


def row_bytes(header: bytes) -> int:
    """Bytes of all filtered rows of the image that an IHDR describes."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * CHANNELS[colour]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, right, down in passes:
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total
