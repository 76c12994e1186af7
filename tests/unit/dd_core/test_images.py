"""Random squares of pictures."""

import torch

from dd_core import images


def test_every_crop_is_a_window_of_its_image() -> None:
    height, width, side = 9, 12, 4
    place = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    image = torch.cat([place, place + 1000]).expand(2, 3, height, width)
    found = images.crops(image, side, count=50)
    corner = found[:, :, :1, :1]
    window = torch.arange(side)[:, None] * width + torch.arange(side)
    assert torch.equal(found, corner + window)
    assert torch.equal(corner[:, 0, 0, 0] >= 1000, torch.arange(100) >= 50)
    tops = corner[:50, 0, 0, 0] // width
    assert set(tops.long().tolist()) == set(range(height - side + 1))


def test_crops_lie_on_the_grid_of_the_small_image() -> None:
    image = torch.arange(64).view(1, 1, 1, 64).expand(50, 3, 64, 64)
    left = images.crops(image, 16, grid=4)[:, 0, 0, 0]
    assert set(left.tolist()) <= set(range(0, 52, 4))
    assert len(set(left.tolist())) > 5
