"""The autoencoder computes what diffusers' AutoencoderKL computes with the same weights."""

import re

import pytest
import torch
from torch import Tensor

from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec

diffusers = pytest.importorskip("diffusers")
LEVELS = 3


def theirs(name: str) -> str:
    """The name that diffusers gives to one of our weights."""
    name = re.sub(r"down\.(\d)\.block\.(\d)", r"down_blocks.\1.resnets.\2", name)
    name = re.sub(r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0", name)
    name = re.sub(
        r"up\.(\d)\.block\.(\d)", lambda m: f"up_blocks.{LEVELS - 1 - int(m[1])}.resnets.{m[2]}", name
    )
    name = re.sub(r"up\.(\d)\.upsample", lambda m: f"up_blocks.{LEVELS - 1 - int(m[1])}.upsamplers.0", name)
    name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    if "mid.attn_1" in name:
        name = name.replace("mid.attn_1", "mid_block.attentions.0").replace(".norm.", ".group_norm.")
        name = name.replace("proj_out", "to_out.0")
        name = re.sub(r"\.([qkv])\.", r".to_\1.", name)
    return name


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_both_halves_agree_with_diffusers() -> None:
    torch.manual_seed(0)
    peer = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    spec = AutoencoderNetSpec(width=16, channel_mult=(1, 2, 2), blocks=2, groups=8, latent_channels=4)
    ours, given = Autoencoder(spec), peer.state_dict()
    weights: dict[str, Tensor] = {}
    for name, value in ours.state_dict().items():
        known = name in ("moments", "observed")
        weights[name] = value if known else given.pop(theirs(name)).reshape(value.shape)
    assert not given, f"weights of diffusers that have no place in ours: {sorted(given)}"
    ours.load_state_dict(weights)
    image, latent = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        posterior, expected = ours.posterior(image), peer.encode(image).latent_dist
        torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.generate(latent), peer.decode(latent).sample, rtol=1e-5, atol=1e-5)
