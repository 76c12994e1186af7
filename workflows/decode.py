"""Image files of unknown origin to squares of the sizes that training needs, safely and fast.

Plain JPEGs go through libjpeg-turbo, shrunk while they are decoded where that serves; everything
else through Pillow.  Size is read and capped before a pixel is decoded, formats are JPEG, PNG and
WebP by content (whatever the name says), and what is cut, corrupt or only half there is refused.

What comes out is 8-bit RGB: the largest centred square, turned as EXIF asks, transparency on white,
16 bits scaled (not clipped), the first frame of an animation; colour profiles are not applied.
The resize is antialiased and within 2 levels of Pillow's reducing bicubic on average.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from workflows.png import check_rows

Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP")
PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
"""JPEG markers of baseline, extended and progressive frames with Huffman coding."""
ORIENTATION = 0x0112


class RejectedError(ValueError):
    """Why a sample cannot be used: a word, a colon, and the value that was at fault."""


class Jpeg(NamedTuple):
    """What the header of a plain 8-bit JPEG says."""

    height: int
    width: int
    orientation: int
    """EXIF, 1 to 8."""


def one_thread() -> None:
    """Keep OpenCV to the one core that a task has."""
    cv2.setNumThreads(1)


def squares(data: bytes, sizes: tuple[int, ...], *, min_side: int, max_pixels: int) -> dict[int, Pixels]:
    """The centred square of an image at each size, uint8 [size, size, 3] RGB.

    Raises:
        RejectedError: With the reason, whatever is wrong with the file.
    """
    return at_sizes(square_of(data, max(sizes), min_side=min_side, max_pixels=max_pixels), sizes)


def square_of(data: bytes, size: int, *, min_side: int, max_pixels: int) -> Pixels:
    """The largest centred square of an image, uint8 [side, side, 3] RGB; under `size` only if the image is.

    Args:
        data: An image file.
        size: A side in pixels; a larger image may have been shrunk while decoded, but not below it.
        min_side: The shorter side must have at least so many pixels.
        max_pixels: Width x height must not exceed this; checked before decoding.

    Raises:
        RejectedError: With the reason, whatever is wrong with the file.
    """
    if not data:
        raise RejectedError("image-broken: the file is empty")
    pixels = quickly_decoded(data, size, min_side, max_pixels)
    if pixels is None:
        pixels = carefully_decoded(data, min_side, max_pixels)
    return centred(pixels)


def at_sizes(square: Pixels, sizes: tuple[int, ...]) -> dict[int, Pixels]:
    """A square at each size, each made from the next larger one."""
    found: dict[int, Pixels] = {}
    for size in sorted(set(sizes), reverse=True):
        square = found[size] = resized(square, size)
    return found


def quickly_decoded(data: bytes, size: int, min_side: int, max_pixels: int) -> Pixels | None:
    """A plain JPEG by libjpeg-turbo, no side shrunk below `size`; None leaves the file to Pillow."""
    jpeg = plain_jpeg(data)
    if jpeg is None:
        return None
    check_size(jpeg.width, jpeg.height, min_side, max_pixels)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size, min_factor=2)
    except ValueError as error:
        if "orrupt" in str(error) or "remature" in str(error):
            raise RejectedError(f"image-broken: {error}") from None
        return None
    return turned(pixels, jpeg.orientation)


def carefully_decoded(data: bytes, min_side: int, max_pixels: int) -> Pixels:
    """Any allowed file by Pillow."""
    try:
        with warnings.catch_warnings(), by_our_limit():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            check_size(image.width, image.height, min_side, max_pixels)
            if image.format == "PNG":
                check_rows(data)
            return np.ascontiguousarray(rgb(ImageOps.exif_transpose(image)))
    except RejectedError:
        raise
    except UnidentifiedImageError:
        raise RejectedError(f"image-format: not a {', '.join(FORMATS)}; it begins {data[:12]!r}") from None
    except Exception as error:  # noqa: BLE001 a decoder may raise anything on hostile bytes; the sample carries it
        raise RejectedError(f"image-broken: {' '.join(str(error).split())[:200]}") from None


@contextlib.contextmanager
def by_our_limit() -> Iterator[None]:
    """While inside, Pillow opens images of any size: opening reads the header, then `check_size` decides."""
    theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = theirs


def check_size(width: int, height: int, min_side: int, max_pixels: int) -> None:
    """Raises RejectedError outside the bounds."""
    if width * height > max_pixels:
        raise RejectedError(f"image-large: {width}x{height} is over {max_pixels:,} pixels")
    if min(width, height) < min_side:
        raise RejectedError(f"image-small: {width}x{height} is under {min_side} pixels a side")


def rgb(image: Image.Image) -> Pixels:
    """8-bit RGB of any mode: 16 bits are scaled, transparency is put on white."""
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image))[..., :3]
    return np.asarray(image.convert("RGB"))


def centred(pixels: Pixels) -> Pixels:
    """The largest centred square."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def resized(square: Pixels, size: int) -> Pixels:
    """Antialiased when it shrinks: every pixel counts; cubic when it grows."""
    ratio = square.shape[0] / size
    if ratio == 1:
        return np.ascontiguousarray(square)
    if ratio == 4:
        return quartered(square)
    shrinking = cv2.INTER_LINEAR if ratio <= 1.5 else cv2.INTER_AREA  # linear reads 2x2 pixels, enough so far
    how = shrinking if ratio > 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(square, (size, size), interpolation=how), np.uint8)


def quartered(square: Pixels) -> Pixels:
    """What `cv2.INTER_AREA` gives at a quarter of the side, to the bit, in two thirds of its time.

    OpenCV has vector code for halves alone.  Halved twice, 16 times a value is the sum of its block of
    4 x 4, without rounding; only then it is rounded, as OpenCV rounds: halves to even.
    """
    sums, side = np.multiply(square, 16, dtype=np.uint16), len(square)
    for part in (2, 4):
        sums = np.asarray(cv2.resize(sums, (side // part, side // part), interpolation=cv2.INTER_AREA))
    return ((sums + (7 + (sums >> 4 & 1))) >> 4).astype(np.uint8)


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Upright, by EXIF orientation (CIPA DC-008, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels) if orientation != 1 else pixels


def plain_jpeg(data: bytes) -> Jpeg | None:
    """The size and turn of an 8-bit grey or YCbCr JPEG; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    place, orientation = 2, 1
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in PLAIN_FRAMES:
            precision, parts = data[place + 4], data[place + 9]
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            width = int.from_bytes(data[place + 7 : place + 9], "big")
            plain = precision == 8 and parts in (1, 3) and height and width
            return Jpeg(height, width, orientation) if plain else None
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[place + 4 : place + 2 + length])
        if marker != 0xC4 and not 0xDB <= marker <= 0xFE:
            return None  # arithmetic coding, lossless frames, fill bytes: for Pillow
        place += 2 + length
    return None


def exif_orientation(block: bytes) -> int:
    """The turn that an EXIF block asks for; 1 if it asks for none or cannot be read."""
    exif = Image.Exif()
    try:
        exif.load(block)
        found = exif.get(ORIENTATION, 1)
    except Exception:  # noqa: BLE001 metadata may hold anything; without it the image is as stored
        return 1
    return found if found in range(1, 9) else 1


def png(pixels: Pixels) -> bytes:
    """uint8 [h, w, 3] RGB as a PNG file that is not compressed, but has differences of rows for pixels.

    The Parquet file around it is compressed, by zstd: as small as by the zlib of a PNG, made in a seventh of
    the time, and read in a third.
    """
    how = (cv2.IMWRITE_PNG_COMPRESSION, 0, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP)
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), how)
    assert done
    return bytes(data)
