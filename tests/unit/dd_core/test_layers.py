"""Laws of the layers: the fused norm against its formula, blocks that start as identities, attention."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dd_core.nets import layers
from dd_core.nets.layers import Attention, ResBlock, Shared, Told, modulated_norm, sinusoids

SHARED = Shared(level_width=12, groups=4, head_width=8, text_width=6)


def by_formula(x: Tensor, gain: Tensor, offset: Tensor, groups: int, *, silu: bool) -> Tensor:
    """GroupNorm, gain, offset and SiLU, written out."""
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    variance = (parts - mean).square().mean((2, 3, 4), keepdim=True)
    unit = ((parts - mean) / (variance + layers.EPSILON).sqrt()).flatten(1, 2)
    z = unit * gain[:, :, None, None] + offset[:, :, None, None]
    return z * torch.sigmoid(z) if silu else z


def inputs(side: int, dtype: torch.dtype, *, mean: float = 0.5) -> list[Tensor]:
    """x, gain and offset, with channels innermost as in the network."""
    x = (mean + torch.randn(3, 24, side, side)).to(dtype).contiguous(memory_format=torch.channels_last)
    return [x, 1 + torch.randn(3, 24) / 2, torch.randn(3, 24)]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("side", [1, 6, 40])
def test_the_fused_norm_and_its_gradients_are_those_of_the_formula(side: int, silu: bool) -> None:
    torch.manual_seed(side)
    leaves = [leaf.requires_grad_() for leaf in inputs(side, torch.float32)]
    ours = modulated_norm(*leaves, groups=4, silu=silu)
    formula = by_formula(*leaves, groups=4, silu=silu)
    torch.testing.assert_close(ours, formula, rtol=0, atol=1e-5)
    grad = torch.randn_like(ours) / side
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(formula, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [6, 40])
def test_the_library_calls_used_off_the_cpu_give_what_the_fused_norm_gives(side: int) -> None:
    torch.manual_seed(0)
    x, gain, offset = inputs(side, torch.float32)
    expected = modulated_norm(x, gain, offset, groups=4, silu=True)
    found = layers.plain_modulated_norm(x, gain, offset, groups=4, silu=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [6, 40])
def test_in_bfloat16_only_reading_normalising_and_writing_round(side: int) -> None:
    torch.manual_seed(0)
    leaves = [leaf.requires_grad_() for leaf in inputs(side, torch.bfloat16, mean=3.0)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = modulated_norm(*leaves, groups=4, silu=True)
    formula = by_formula(*exact, groups=4, silu=True)
    grad = torch.randn_like(ours) / side
    assert ours.dtype == torch.bfloat16
    assert (ours - formula).abs().max() <= 3 * 2**-8 * formula.abs().max()
    found = torch.autograd.grad(ours, leaves, grad)
    expected = torch.autograd.grad(formula, exact, grad.double())
    for ours_grad, exact_grad in zip(found, expected, strict=True):
        assert (ours_grad - exact_grad).norm() <= 0.01 * exact_grad.norm()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_on_one_thread_the_norm_of_a_sample_does_not_depend_on_its_batch(one_thread: None) -> None:
    torch.manual_seed(
        0
    )  # several threads share the sums of a small batch otherwise than those of a large one
    x = torch.randn(9, 32, 64, 64).contiguous(memory_format=torch.channels_last)  # more than fit at a time
    gain, offset = torch.randn(9, 32), torch.randn(9, 32)
    together = modulated_norm(x, gain, offset, groups=4, silu=True)
    alone = modulated_norm(x[7:8], gain[7:8], offset[7:8], groups=4, silu=True)
    torch.testing.assert_close(together[7:8], alone, rtol=0, atol=0)


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
