"""Laws of the layers: blocks that start as identities, attention, the embedding of a level."""

import copy

import pytest
import torch
from torch import nn

from dd_core.denoiser import Conditioning
from dd_core.devices import imagined
from dd_core.nets import layers
from dd_core.nets.layers import Attention, ResBlock, Shared, Together, Told, apart, read_by, sinusoids
from dd_core.nets.unet import UNet, UNetSpec

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


def linears(frozen: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, wide).requires_grad_(not frozen) for wide in (3, 5, 4)]


@torch.no_grad()
def test_layers_asked_together_say_what_each_says_alone_and_hear_of_changed_weights() -> None:
    layers, x = linears(frozen=True), torch.randn(2, 6)
    together = Together(layers)
    for _ in range(2):
        made = together(x)
        assert list(made) == layers
        for layer in layers:
            torch.testing.assert_close(made[layer], layer(x), atol=1e-6, rtol=1e-6)
        layers[1].bias.add_(1)
        layers[2].load_state_dict({name: 2 * part for name, part in layers[2].state_dict().items()})


def test_layers_are_asked_one_by_one_where_they_learn_or_another_device_computes() -> None:
    x = torch.randn(2, 6)
    assert Together(linears(frozen=True))(x) == {}  # with gradients
    with torch.no_grad():
        assert Together(linears(frozen=False))(x) == {}
        with imagined("cuda"):
            assert Together(linears(frozen=True))(x) == {}


@torch.no_grad()
def test_what_was_asked_together_is_copied_without_its_copies_of_weights() -> None:
    layers, x = linears(frozen=True), torch.randn(2, 6)
    together = Together(layers)
    made = together(x)
    assert together.side_by_side
    other = copy.deepcopy(together)
    assert not other.side_by_side
    for one, two in zip(made.values(), other(x).values(), strict=True):
        assert torch.equal(one, two)


@torch.no_grad()
def test_a_network_paints_the_same_with_its_levels_told_together_and_one_by_one() -> None:
    torch.manual_seed(0)
    spec = UNetSpec(width=16, channel_mult=(1, 2), blocks_per_level=1, attention_at=(), groups=4)
    network = UNet(spec.but(attention_in_middle=False), in_channels=3, out_channels=3)
    for weight in network.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    x, level = torch.randn(2, 3, 8, 8), torch.randn(2)
    alone = network(x, level, Conditioning())
    assert network.levels(network.hearing(level, Conditioning())) == {}
    network.requires_grad_(False)
    made = network.levels(network.hearing(level, Conditioning()))
    assert list(made) == [block.level for block in network.modules() if isinstance(block, ResBlock)]
    torch.testing.assert_close(network(x, level, Conditioning()), alone, atol=1e-4, rtol=1e-4)
