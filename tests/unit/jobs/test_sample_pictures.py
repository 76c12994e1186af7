"""Pictures given to `ddiff sample`: taken as they are, or refused with what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dd_core.cascade import HopSpec
from dd_core.samplers import SamplingSpec
from jobs.given_pictures import hole, rgb
from jobs.order import Order
from jobs.sample import how_of


def test_a_picture_is_in_the_range_of_models_and_a_mask_is_open_where_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "m.png")
    picture = rgb(tmp_path / "a.png", 8)
    assert picture.shape == (1, 3, 8, 8)
    assert torch.equal(picture[0, 0, :, 0], torch.tensor([1.0] * 4 + [-1.0] * 4))
    assert torch.equal(hole(tmp_path / "m.png", 8)[0, 0, :, 0], torch.tensor([True] * 4 + [False] * 4))


def test_a_photograph_is_taken_as_it_is_shown(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was on its side
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    picture = rgb(tmp_path / "a.png", None)
    assert picture.shape == (1, 3, 16, 8)
    assert torch.equal(picture[0, 0, :, 0], torch.tensor([1.0] * 8 + [-1.0] * 8))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_an_image_that_is_not_rgb_is_refused(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"its mode is {mode}; convert it to RGB"):
        rgb(tmp_path / "a.png", 8)


def test_a_mask_of_the_wrong_size_or_in_colours_is_refused(tmp_path: Path) -> None:
    Image.new("L", (8, 4)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="8 x 4, but the cascade paints 8 x 8; resize it"):
        hole(tmp_path / "m.png", 8)
    Image.new("RGB", (8, 8)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="convert it to greyscale"):
        hole(tmp_path / "m.png", 8)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="no PNG, JPEG or WebP that can be read"):
        rgb(tmp_path / "a.png", 8)
    with pytest.raises(ValueError, match="no PNG, JPEG or WebP that can be read"):
        rgb(tmp_path / "absent.png", 8)


def test_an_order_changes_the_hop_that_follows_requests_and_an_edit_all() -> None:
    base = HopSpec(stage="base", how=SamplingSpec(num_steps=20), follows_request=True)
    upsampler = HopSpec(stage="upsampler", how=SamplingSpec(num_steps=4))
    order = Order("x", steps=10, strength=0.5, training_free=True)
    assert how_of(base, order) == SamplingSpec(num_steps=10, strength=0.5, inpainting="projection")
    assert how_of(upsampler, order) == SamplingSpec(num_steps=4, strength=0.5, inpainting="projection")
