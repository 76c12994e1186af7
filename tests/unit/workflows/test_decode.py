"""Every kind of image file gives the pixels it means, or the reason why not."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import file_of, photo
from workflows.decode import RejectedError, centred, png, resized, squares

SMALL = {"min_side": 8, "max_pixels": 400_000}


def square(data: bytes, size: int = 64) -> NDArray[np.int64]:
    return squares(data, (size,), **SMALL)[size].astype(np.int64)


def reason(data: bytes, **limits: int) -> str:
    with pytest.raises(RejectedError) as caught:
        squares(data, (16,), **SMALL | limits)
    return str(caught.value)


def pillow(image: Image.Image, size: int) -> NDArray[np.int64]:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box), np.int64)


@pytest.mark.parametrize(("side", "ties"), [(256, False), (1024, False), (32, False), (32, True)])
def test_a_quarter_is_to_the_bit_the_mean_of_each_block(side: int, ties: bool) -> None:
    random = np.random.default_rng(side)
    pixels = random.integers(0, 256, (side, side, 3), np.uint8)
    if ties:  # the mean of every block is a number and a half
        pixels = (
            random.integers(0, 255, (side // 4, side // 4, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        )
        pixels[:, ::2] += 1
    small = (side // 4, side // 4)
    assert np.array_equal(resized(pixels, side // 4), cv2.resize(pixels, small, interpolation=cv2.INTER_AREA))
    means = pixels.reshape(side // 4, 4, side // 4, 4, 3).mean(axis=(1, 3))
    assert np.array_equal(resized(pixels, side // 4), means.round())  # half to even


@pytest.mark.parametrize("shape", [(512, 384), (512, 512), (341, 512), (300, 280), (640, 480)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_shrinking_is_within_two_levels_of_pillow(shape: tuple[int, int], kind: str) -> None:
    data = file_of(photo(*shape, seed=sum(shape)), kind)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    found = squares(data, (64, 256), **SMALL)
    assert list(found) == [256, 64]
    for size, pixels in found.items():
        assert np.abs(pixels - pillow(image, size)).mean() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [16, 64, 249])
def test_stripes_too_fine_to_show_become_grey(kind: str, size: int) -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # every second column dropped would be white or black
    assert np.abs(square(file_of(stripes, kind), size) - 127.5).max() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_come_upright(orientation: int, kind: str) -> None:
    upright = np.zeros((48, 48, 3), np.uint8)
    upright[:24, :24], upright[:24, 24:], upright[24:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {2: "rl", 3: "180", 4: "ud", 5: "t", 6: "6", 7: "7", 8: "8"}.get(orientation, "")
    turns = {
        "": upright,
        "rl": upright[:, ::-1],
        "180": upright[::-1, ::-1],
        "ud": upright[::-1],
        "t": upright.transpose(1, 0, 2),
        "6": np.rot90(upright, 1),
        "7": upright.transpose(1, 0, 2)[::-1, ::-1],
        "8": np.rot90(upright, -1),
    }
    turned = np.ascontiguousarray(turns[stored])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(turned, kind, exif=exif.tobytes())
    assert np.abs(square(data, 48) - upright).mean() < 8


GREY = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


def sixteen_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((GREY.astype(np.uint32) * 257).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def rgb48() -> bytes:
    done, data = cv2.imencode(".png", np.repeat(GREY[..., None].astype(np.uint16) * 257, 3, axis=2))
    assert done
    return bytes(data)


def moded(mode: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    grey = Image.fromarray(GREY)
    image = grey.convert("P") if mode == "P" else grey.convert("RGB").convert(mode)
    image.save(buffer, kind, **{"quality": 95} if kind == "JPEG" else {})
    return buffer.getvalue()


GREYS = {mode: moded(mode) for mode in ("L", "RGB", "RGBA", "LA", "P")}
GREYS |= {f"{mode} jpg": moded(mode, "JPEG") for mode in ("L", "RGB", "CMYK")}
GREYS |= {"I;16": sixteen_bit(), "RGB48": rgb48(), "webp": moded("RGB", "WEBP")}


@pytest.mark.parametrize("data", GREYS.values(), ids=GREYS)
def test_every_mode_means_the_same_grey(data: bytes) -> None:
    assert np.abs(square(data) - GREY[..., None]).max() <= 6


def test_what_shows_through_is_white() -> None:
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:16] = (255, 0, 0, 255)
    clear[16:] = (0, 255, 0, 0)  # a colour that nobody sees
    want = np.full((32, 32, 3), 255)
    want[:16] = (255, 0, 0)
    image = Image.fromarray(clear)
    assert np.array_equal(square(file_of(clear, "PNG"), 32), want)
    buffer = io.BytesIO()
    palette = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = palette.getpixel((0, 31))
    palette.save(buffer, "PNG", transparency=palette.getpixel((0, 31)))
    assert np.array_equal(square(buffer.getvalue(), 32), want)
    one_bit = Image.fromarray(GREY > 127)
    buffer = io.BytesIO()
    one_bit.save(buffer, "PNG")
    assert np.array_equal(square(buffer.getvalue()), np.repeat((GREY > 127)[..., None] * 255, 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, kind, save_all=True, append_images=frames[1:], **{"lossless": True} if kind == "WEBP" else {}
    )
    assert np.abs(square(buffer.getvalue(), 32) - (255, 0, 0)).max() <= 3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_files_that_are_not_what_they_seem_say_why() -> None:
    jpeg, lossless = file_of(photo(64, 64, 1), "JPEG"), file_of(photo(64, 64, 1), "PNG")
    flipped = bytearray(lossless)
    flipped[len(lossless) // 2] ^= 1
    assert reason(b"") == "image-broken: the file is empty"
    assert reason(b"<!DOCTYPE html><html>").startswith(
        "image-format: not a JPEG, PNG, WEBP; it begins b'<!DOCTYPE"
    )
    assert reason(file_of(photo(64, 64, 1), "GIF")).startswith("image-format")
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0").startswith("image-format")
    assert reason(b'<svg xmlns="http://www.w3.org/2000/svg"/>').startswith("image-format")
    for cut in (3, 100, len(jpeg) // 2, len(jpeg) - 30):
        assert reason(jpeg[:cut]).startswith(("image-broken", "image-format")), cut
    for cut in (30, 100, len(lossless) // 2, len(lossless) - 30):
        assert reason(lossless[:cut]).startswith(("image-broken", "image-format")), cut
    assert reason(bytes(flipped)).startswith("image-broken")
    assert (
        reason(raw_png(20, 20, bytes(10 * 61))) == "image-broken: the PNG has 610 of its 1,220 bytes of rows"
    )
    assert reason(jpeg, min_side=65) == "image-small: 64x64 is under 65 pixels a side"
    assert reason(lossless, max_pixels=4000) == "image-large: 64x64 is over 4,000 pixels"
    assert reason(raw_png(1, 100_000_000, b"\0")).startswith("image-large")


def test_the_name_of_a_format_does_not_matter_its_content_does() -> None:
    pixels = photo(64, 64, 2)
    assert np.array_equal(square(file_of(pixels, "PNG")), pixels)
    assert np.array_equal(square(file_of(pixels, "WEBP", lossless=True)), pixels)
    interlaced = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
    assert np.array_equal(square(interlaced), pixels)


def test_our_own_png_gives_back_every_pixel() -> None:
    pixels = photo(40, 40, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_limit_is_that_of_the_spec_whatever_pillow_thinks_too_large(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = file_of(np.full((64, 64, 3), 90, np.uint8), kind)
    assert np.abs(square(data) - 90).max() <= 2
    assert reason(data, max_pixels=4000) == "image-large: 64x64 is over 4,000 pixels"
    assert Image.MAX_IMAGE_PIXELS == 1000  # for whoever else opens images


def test_bombs_take_no_memory() -> None:
    code = """
import resource, struct, zlib
from tests.unit.workflows.test_decode import raw_png
from workflows.decode import RejectedError, squares
bombs = [raw_png(1, 100_000_000, b"\\0"), raw_png(9400, 9400, b"\\0"), raw_png(100, 100, bytes(2**28))]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in bombs * 3:
    try:
        squares(bomb, (64,), min_side=1, max_pixels=32_000_000)
    except RejectedError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(grown.stdout) < 100  # MB; Pillow alone takes over a thousand


@settings(max_examples=150, deadline=None, database=None)
@given(st.data())
def test_no_damage_ends_in_anything_but_a_square_or_a_reason(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))
    file = bytearray(file_of(photo(48, 40, 5), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(file[: data.draw(st.integers(1, len(file)))])
    try:
        assert squares(damaged, (16,), **SMALL)[16].shape == (16, 16, 3)
    except RejectedError as error:
        word, colon, detail = str(error).partition(": ")
        assert (word.startswith("image-"), colon, bool(detail)) == (True, ": ", True)


def test_the_square_is_centred() -> None:
    wide = np.arange(30, dtype=np.uint8).reshape(1, 10, 3).repeat(4, axis=0)
    assert centred(wide)[0, :, 0].tolist() == [9, 12, 15, 18]
