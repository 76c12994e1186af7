"""Degradations: kernels keep brightness, our JPEG is Pillow's, and what is shown is worse but of the size."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dd_core import degradations as rough
from dd_core import images


def smooth(count: int = 2, side: int = 64, waves: tuple[int, ...] = (2, 5, 9)) -> Tensor:
    """So many waves from side to side, different in each channel."""
    at = torch.arange(side) / side * math.tau
    channels = [torch.sin(k * at)[:, None] * torch.cos((k + 2) * at)[None] for k in waves]
    return 0.8 * torch.stack(channels).expand(count, 3, side, side).contiguous()


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean())


@pytest.mark.parametrize("quality", [30, 49, 50, 75, 95])
def test_jpeg_is_that_of_pillow(quality: int) -> None:
    torch.manual_seed(0)
    picture = images.quantised((smooth(1) + 0.2 * torch.randn(1, 3, 64, 64)).clamp(-1, 1))
    buffer = io.BytesIO()
    images.picture(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None]
    ours = images.to_bytes(rough.jpeg(picture, torch.tensor([float(quality)])))
    unlike = error(images.to_unit(ours), images.to_unit(theirs))
    assert unlike < 0.2 * error(images.to_unit(theirs), picture)  # theirs transforms in integers
    assert float((ours == theirs).float().mean()) > 0.3


def test_worse_quality_is_worse_and_a_side_need_not_divide_by_eight() -> None:
    picture = smooth(1, 64)[:, :, :50, :43]
    errors = [error(rough.jpeg(picture, torch.tensor([q])), picture) for q in (10.0, 50.0, 95.0)]
    assert errors == sorted(errors, reverse=True)
    together = rough.jpeg(picture.repeat(2, 1, 1, 1), torch.tensor([10.0, 95.0]))
    torch.testing.assert_close(together[1:], rough.jpeg(picture, torch.tensor([95.0])))


def test_a_blur_keeps_flat_pictures_and_has_the_deviation_that_it_says() -> None:
    long, thin, angle = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.5])
    kernel = rough.gaussians(long, thin, angle, side=41)[0].double()
    at = torch.arange(41) - 20.0
    assert float(kernel.sum()) == pytest.approx(1)
    spread_x, spread_y = (float((kernel * axis.square()).sum()) for axis in (at[None, :], at[:, None]))
    assert spread_x == pytest.approx(9 * math.cos(0.5) ** 2 + math.sin(0.5) ** 2, rel=1e-3)
    assert spread_y == pytest.approx(9 * math.sin(0.5) ** 2 + math.cos(0.5) ** 2, rel=1e-3)
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(rough.filtered(flat, kernel.float()[None]), flat)


def test_each_picture_is_filtered_by_its_own_kernel_alone() -> None:
    picture, stds = smooth(3), torch.tensor([0.2, 1.0, 2.5])
    kernels = rough.gaussians(stds, stds, torch.zeros(3))
    together = rough.filtered(picture, kernels)
    for at in range(3):
        alone = rough.filtered(picture[at : at + 1], kernels[at : at + 1])
        torch.testing.assert_close(together[at : at + 1], alone)
    assert error(together[2], picture[2]) > error(together[1], picture[1]) > error(together[0], picture[0])


def test_half_of_the_small_pictures_are_blurred() -> None:
    torch.manual_seed(0)
    small = torch.rand(400, 3, 8, 8) * 2 - 1
    found = rough.blurred(small)
    same = (found == small).flatten(1).all(1)
    assert 160 < int(same.sum()) < 240
    assert (found[~same].std((1, 2, 3)) < small[~same].std((1, 2, 3))).all()


def test_what_blind_super_resolution_shows_is_small_in_range_worse_and_repeatable() -> None:
    picture = smooth(2, 256, waves=(0, 1, 2))
    clean = torch.nn.functional.avg_pool2d(picture, 4)
    seen = []
    for seed in range(30):
        torch.manual_seed(seed)
        found = rough.bsr(picture, 4)
        assert found.shape == (2, 3, 64, 64)
        assert float(found.abs().max()) <= 1
        assert found.isfinite().all()
        torch.manual_seed(seed)
        assert torch.equal(rough.bsr(picture, 4), found)
        seen.append(error(found, clean))
    assert min(seen) > 1e-4
    assert max(seen) > 2 * min(seen)
    assert max(seen) < float(clean.var())  # still that picture
    assert rough.bsr(picture.to("meta"), 4).shape == (2, 3, 64, 64)


def linear(image: Tensor) -> Tensor:
    return ((image + 1) / 2) ** 2.2


def test_a_sensor_is_noisier_in_the_light_before_gamma_and_noise_is_of_the_stated_size() -> None:
    torch.manual_seed(0)
    flat = torch.zeros(200, 3, 16, 16)
    std = rough.noised(flat).std((1, 2, 3)) / 2
    assert float(std.min()) > 0.8 / 255
    assert float(std.max()) < 30 / 255
    dark, bright = (linear(rough.sensed(flat + at)).std((1, 2, 3)) for at in (-0.4, 0.4))
    assert float(bright.square().mean()) > 2 * float(dark.square().mean())  # light .07 and .46: five times it
    assert rough.sensed(flat).isfinite().all()


@pytest.mark.parametrize("how", ["blur", "bsr"])
def test_half_precision_around_it_changes_nothing(how: str) -> None:
    """Training runs under autocast; a blur in bfloat16 would be noise of its own."""
    found: list[Tensor] = []
    for enabled in (False, True):
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(rough.blurred(smooth()) if how == "blur" else rough.bsr(smooth(), 4))
    assert torch.equal(*found)
