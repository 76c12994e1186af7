"""Laws of the layers: blocks that start as identities, attention, the embedding of a level."""

import pytest
import torch

from dd_core.nets import layers
from dd_core.nets.layers import Attention, ResBlock, Shared, Told, sinusoids

SHARED = Shared(level_width=12, groups=4, head_width=8, text_width=6)


@pytest.mark.parametrize("resample", ["same", "down", "up"])
def test_a_new_block_passes_its_input_on_resampled(resample: layers.Resample) -> None:
    x = torch.randn(2, 16, 8, 8)
    out = ResBlock(16, 16, SHARED, resample=resample)(x, Told(torch.randn(2, 12)))
    torch.testing.assert_close(out, layers.resampled(x, resample))


def test_halving_undoes_doubling() -> None:
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(layers.resampled(layers.resampled(x, "up"), "down"), x)


def test_new_attention_passes_its_input_on() -> None:
    x = torch.randn(2, 16, 4, 4)
    out = Attention(16, SHARED)(x, Told(torch.randn(2, 12), torch.randn(2, 5, 6)))
    torch.testing.assert_close(out, x)


def test_attention_does_not_care_about_the_order_of_the_tokens_of_a_caption() -> None:
    torch.manual_seed(0)
    attention = Attention(16, SHARED)
    torch.nn.init.normal_(attention.out.weight)
    x, text = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 6)
    level = torch.randn(2, 12)
    turned = attention(x, Told(level, text.flip(1)))
    torch.testing.assert_close(attention(x, Told(level, text)), turned, rtol=1e-5, atol=1e-5)


def test_sinusoids_turn_a_shift_of_the_level_into_a_rotation() -> None:
    half = sinusoids(torch.tensor([3.0, 3.7]), 8).double()
    cos, sin = half.chunk(2, dim=1)
    frequency = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    torch.testing.assert_close(
        cos[0] * cos[1] + sin[0] * sin[1], torch.cos(0.7 * frequency), atol=1e-6, rtol=0
    )
