"""Laws of the layers: blocks that start as identities, attention, the embedding of a level."""

import pytest
import torch

from dd_core.nets import layers
from dd_core.nets.layers import Attention, ResBlock, Shared, Told, apart, read_by, sinusoids

SHARED = Shared(level_width=12, groups=4, head_width=8, text_width=6)


@pytest.mark.parametrize("resample", ["same", "down", "up"])
def test_a_new_block_passes_its_input_on_resampled(resample: layers.Resample) -> None:
    x = torch.randn(2, 16, 8, 8)
    block = ResBlock(16, 16, SHARED, resample=resample)
    out = block(x, Told(torch.randn(2, 12)))
    torch.testing.assert_close(out, layers.resampled(x, resample))


def test_halving_undoes_doubling() -> None:
    x = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(layers.resampled(layers.resampled(x, "up"), "down"), x)


def test_new_attention_passes_its_input_on() -> None:
    x = torch.randn(2, 16, 4, 4)
    attention = Attention(16, SHARED)
    assert attention.text is not None
    out = attention(x, Told(torch.randn(2, 12), {attention.text: attention.text(torch.randn(2, 5, 6))}))
    torch.testing.assert_close(out, x)


def test_attention_does_not_care_about_the_order_of_the_tokens_of_a_caption() -> None:
    torch.manual_seed(0)
    attention = Attention(16, SHARED)
    assert attention.text is not None
    torch.nn.init.normal_(attention.out.weight)
    x, text, level = torch.randn(2, 16, 4, 4), torch.randn(2, 5, 6), torch.randn(2, 12)
    seen, turned = (
        attention(x, Told(level, {attention.text: attention.text(of)})) for of in (text, text.flip(1))
    )
    torch.testing.assert_close(seen, turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_what_layers_have_read_is_what_each_makes_of_the_caption(bias: bool) -> None:
    torch.manual_seed(0)
    asked = [torch.nn.Linear(6, width, bias=bias) for width in (4, 8, 2)]
    x = torch.randn(2, 5, 6)
    for layer, answer in apart(asked, read_by(asked, x)).items():
        torch.testing.assert_close(answer, layer(x))


def test_sinusoids_turn_a_shift_of_the_level_into_a_rotation() -> None:
    half = sinusoids(torch.tensor([3.0, 3.7]), 8).double()
    cos, sin = half.chunk(2, dim=1)
    frequency = torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    torch.testing.assert_close(
        cos[0] * cos[1] + sin[0] * sin[1], torch.cos(0.7 * frequency), atol=1e-6, rtol=0
    )
