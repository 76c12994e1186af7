"""LPIPS is what torchmetrics computes with the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dd_core.nets.perceptual import load_lpips

lpips = pytest.importorskip("torchmetrics.functional.image.lpips")


@pytest.mark.parity
def test_the_distance_agrees_with_torchmetrics_on_a_random_vgg_and_the_published_weights(
    tmp_path: Path,
) -> None:
    """The judged weights of the five stages come with torchmetrics; those of VGG16 cannot be had offline."""
    torch.manual_seed(0)
    peer = lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True, resize=None).eval()
    state = {name: value.clone() for name, value in peer.state_dict().items()}
    save_file(state, tmp_path / "lpips.safetensors")
    ours = load_lpips(tmp_path / "lpips.safetensors")
    image, reference = torch.rand(2, 2, 3, 48, 64) * 2 - 1
    expected = peer(image, reference).flatten()
    assert (expected > 0).all()
    torch.testing.assert_close(ours(image, reference), expected, rtol=1e-5, atol=1e-7)
