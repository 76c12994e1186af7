"""The autoencoder and its codebook against the published code of latent diffusion and taming transformers."""

import pytest
import torch
from torch import nn

from dd_core.layouts.ldm import autoencoder_moves
from dd_core.nets.autoencoder import Autoencoder, AutoencoderNetSpec
from dd_core.nets.quantiser import Quantiser
from tests.parity.reference import checkout, differences, importing, randomised

pytestmark = pytest.mark.parity


class Theirs(nn.Module):
    """Their two halves and what lies between, as their class of another framework holds them."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, encoded: int, channels: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv = nn.Conv2d(encoded, encoded, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        latent = self.quant_conv(self.encoder(image))
        mean = latent[:, : self.post_quant_conv.in_channels]
        return self.decoder(self.post_quant_conv(mean))


@pytest.mark.parametrize(
    "spec",
    [
        AutoencoderNetSpec(width=32, channel_mult=(1, 2, 2), latent_channels=3),
        AutoencoderNetSpec(width=32, channel_mult=(1, 1, 2), latent_channels=4, attention_levels=(1, 2)),
        AutoencoderNetSpec(width=32, channel_mult=(1, 2), latent_channels=3, codes=16, mid_attention=False),
    ],
)
def test_both_halves(spec: AutoencoderNetSpec) -> None:
    pytest.importorskip("einops", reason="latent diffusion needs einops")
    path = checkout("CompVis/latent-diffusion", "ldm/modules/diffusionmodules/model.py")
    options = {
        "ch": spec.width,
        "out_ch": 3,
        "ch_mult": spec.channel_mult,
        "num_res_blocks": spec.blocks,
        "attn_resolutions": [16 // 2**level for level in spec.attention_levels],
        "attn_type": "vanilla" if spec.mid_attention else "none",
        "in_channels": 3,
        "resolution": 16,
        "z_channels": spec.latent_channels,
        "double_z": not spec.codes,
    }
    shims = {"ldm.util": {"instantiate_from_config": None}}
    with importing(path, shims=shims) as load:
        module = load("ldm.modules.diffusionmodules.model")
        halves = module.Encoder(**options), module.Decoder(**options)
        theirs = randomised(Theirs(*halves, spec.encoded_channels, spec.latent_channels))
        ours = Autoencoder(spec)
        image = torch.rand(2, 3, 16, 16) * 2 - 1

        def ask(ours: Autoencoder) -> torch.Tensor:
            latent = ours.quant_conv(ours.encoder(image))[:, : spec.latent_channels]
            return ours.generate(latent, quantise=False)

        moves = [move for move in autoencoder_moves(ours) if "quantiser" not in move.ours]
        ours.quantiser = None  # it learns by a loss of its own
        found = differences(theirs, ours, moves, lambda theirs: theirs(image), ask)
    assert max(found) <= 1e-5


def test_the_codebook() -> None:
    pytest.importorskip("einops", reason="taming transformers needs einops")
    path = checkout("CompVis/taming-transformers", "taming/modules/vqvae/quantize.py")
    latent = torch.randn(3, 4, 6, 5)
    with importing(path) as load:
        theirs = load("taming.modules.vqvae.quantize").VectorQuantizer2(32, 4, beta=0.25)
        nn.init.normal_(theirs.embedding.weight)
        vectors, _, (_, _, codes) = theirs(latent)
    ours = Quantiser(32, 4)
    ours.vectors.load_state_dict(theirs.embedding.state_dict())
    assert torch.equal(ours(latent).codes.flatten(), codes)
    torch.testing.assert_close(ours(latent).vectors, vectors, rtol=0, atol=1e-6)
