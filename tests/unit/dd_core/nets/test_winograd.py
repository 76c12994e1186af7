"""Winograd's algorithm is the convolution, forwards and backwards, to the rounding of its points."""

import inspect
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dd_core.devices import imagined
from dd_core.nets import winograd
from dd_core.nets.conv import Conv

looped = pytest.mark.skipif(
    not winograd.runs(), reason="winograd.c wants gcc, AVX512-BF16 and no AMX: oneDNN's convolution is used"
)
SIZES = [(16, 16, 2, 2), (48, 96, 6, 10), (64, 16, 8, 4), (32, 80, 4, 6), (112, 64, 16, 16), (96, 48, 64, 64)]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(into: int, out: int, *, bias: bool = True) -> Conv:
    torch.manual_seed(0)
    return Conv(into, out, 3, padding=1, bias=bias)


def features(batch: int, channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    return drawn(batch, channels, height, width, seed=seed).to(memory_format=torch.channels_last)


def error(found: Tensor | None, true: Tensor) -> float:
    """Deviation, as a share of the deviation of what is true."""
    assert found is not None
    return ((found.double() - true).std() / true.std()).item()


@looped
@pytest.mark.parametrize("how", ["half", "autocast"])
@pytest.mark.parametrize(("into", "out", "height", "width"), SIZES)
def test_it_is_the_convolution_and_has_its_gradients(
    into: int, out: int, height: int, width: int, how: str
) -> None:
    conv, x, onto = layer(into, out), features(3, into, height, width), drawn(3, out, height, width, seed=2)
    wanted = drawn(3, out, height, width, seed=3)
    if how == "half":
        conv, x, onto, wanted = conv.bfloat16(), x.bfloat16(), onto.bfloat16(), wanted.bfloat16()
    x, onto = x.requires_grad_(), onto.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert winograd.suits(conv, x)
        found = conv(x, onto)
    (found.double() * wanted.double()).sum().backward()
    parts = (x, conv.weight, conv.bias, onto)
    exact = [part.detach().double().requires_grad_() for part in parts]
    true = F.conv2d(*exact[:3], padding=1) + exact[3]
    (true * wanted.double()).sum().backward()
    assert found.dtype == onto.dtype
    assert error(found.detach(), true.detach()) < 0.006
    for part, other in zip(parts, exact, strict=True):
        assert other.grad is not None
        assert part.grad is not None
        assert part.grad.dtype == part.dtype
        assert error(part.grad, other.grad) < 0.008


@looped
def test_exact_numbers_come_out_exactly() -> None:
    """Small whole numbers, and kernels whose halves and quarters bfloat16 has too, meet no rounding."""
    conv, x = layer(16, 32).bfloat16(), (drawn(2, 16, 8, 6) * 2).round().bfloat16()
    with torch.no_grad():
        conv.weight.copy_((drawn(32, 16, 3, 3) * 2).round().clamp(-3, 3))
        conv.bias.copy_(drawn(32).round())  # type: ignore[union-attr]
        assert winograd.suits(conv, x)
        found = conv(x)
    true = F.conv2d(x.float(), conv.weight.float(), conv.bias.float(), padding=1)  # type: ignore[union-attr]
    assert torch.equal(found, true.bfloat16())


@looped
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_depends_neither_on_the_batch_nor_on_threads_nor_on_how_tensors_lie(bias: bool) -> None:
    conv, x = layer(48, 64, bias=bias).bfloat16(), features(5, 48, 6, 34).bfloat16()
    onto = drawn(5, 64, 6, 34).bfloat16()
    torch.set_num_threads(1)
    whole = conv(x, onto)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    torch.set_num_threads(4)
    assert torch.equal(conv(x, onto), whole)
    assert torch.equal(conv(x.contiguous(), onto.to(memory_format=torch.channels_last)), whole)
    for row in range(5):
        assert torch.equal(conv(x[row : row + 1], onto[row : row + 1]), whole[row : row + 1])
    conv.requires_grad_(False).to(memory_format=torch.channels_last)
    assert torch.equal(conv(x, onto), whole)
    with torch.enable_grad():
        assert torch.equal(conv(x, onto), whole)


@looped
@torch.no_grad()
def test_changed_weights_are_heard_whichever_algorithm_ran_before() -> None:
    conv, x = layer(16, 16).requires_grad_(False), features(1, 16, 8, 8)
    for _ in range(2):
        plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(x), plain, atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(conv(x), plain.double()) < 0.006
        conv.weight.mul_(-2)


@looped
def test_frozen_kernels_hand_gradients_on() -> None:
    conv, x = (
        layer(16, 32).bfloat16().requires_grad_(False),
        features(2, 16, 4, 4).bfloat16().requires_grad_(),
    )
    wanted = features(2, 32, 4, 4, seed=3).bfloat16()
    (found,) = torch.autograd.grad(conv(x), [x], wanted)
    true = F.conv_transpose2d(wanted.double(), conv.weight.double(), padding=1)
    assert error(found, true) < 0.008


@looped
@torch.no_grad()
def test_the_edge_of_memory_is_neither_read_nor_written() -> None:
    """What lies beside the tensors is no number, and stays as it is."""
    conv, size = layer(16, 48).bfloat16(), 2 * 6 * 4
    around = torch.full((size * (16 + 48) + 128,), torch.nan, dtype=torch.bfloat16)
    x = around[64 : 64 + size * 16].view(2, 6, 4, 16).permute(0, 3, 1, 2)
    x.copy_(drawn(2, 16, 6, 4))
    found = conv(x)
    assert found.isfinite().all()
    assert torch.equal(found, conv(x.clone(memory_format=torch.channels_last)))


@looped
@torch.no_grad()
def test_what_is_no_number_spoils_its_own_surroundings_only() -> None:
    conv, x = layer(16, 16).bfloat16(), features(2, 16, 8, 8).bfloat16()
    whole = conv(x)
    x[0, 3, 0, 0] = torch.nan
    found = conv(x)
    assert found[0, :, :2, :2].isnan().all()
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[0, :, 2:, 2:], whole[0, :, 2:, 2:])


@looped
def test_sizes_that_do_not_match_are_refused_before_the_loop_reads_beyond_its_tensors() -> None:
    x, kernels = features(2, 16, 4, 4).bfloat16(), winograd.laid(drawn(32, 16, 3, 3))
    bias, onto = drawn(32), drawn(2, 32, 4, 4).bfloat16()
    for wrong in (
        (x.float(), kernels, 32, bias, onto),
        (x[:, :8], kernels[: 16 * 8 * 32], 32, bias, onto),
        (x[:, :, :3], kernels, 32, bias, onto[:, :, :3]),
        (x, kernels[:-1], 32, bias, onto),
        (x, kernels.float(), 32, bias, onto),
        (x, kernels, 16, bias[:16], onto[:, :16]),
        (x, kernels, 32, bias[:16], onto),
        (x, kernels, 32, bias, onto[:1]),
        (x, kernels, 32, bias, onto.float()),
    ):
        with pytest.raises(ValueError, match="numbers of kernels"):
            torch.ops.ddiff.convolution(*wrong)
    for pair in ((x.float(), onto), (x[:1], onto), (x[:, :8], onto), (x, onto[:, :24]), (x, onto[:, :, :2])):
        with pytest.raises(ValueError, match="features and gradients"):
            torch.ops.ddiff.convolution_gradients(*pair)


@looped
@torch.no_grad()
def test_the_size_of_the_result_is_known_without_data() -> None:
    x, kernels = features(2, 16, 4, 4).bfloat16(), winograd.laid(drawn(32, 16, 3, 3))
    found = torch.ops.ddiff.convolution(x, kernels, 32, None, None)
    grads = torch.ops.ddiff.convolution_gradients(x, found)
    with FakeTensorMode() as mode:
        inside = [mode.from_tensor(part) for part in (x, kernels)]
        planned = torch.ops.ddiff.convolution(*inside, 32, None, None)
        planned_grads = torch.ops.ddiff.convolution_gradients(inside[0], planned)
    for one, other in zip((planned, *planned_grads), (found, *grads), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@looped
def test_gradients_of_a_batch_are_the_sums_of_those_of_its_samples_whatever_the_threads() -> None:
    x, grad = features(5, 48, 18, 22).bfloat16(), features(5, 64, 18, 22, seed=2).bfloat16()
    torch.set_num_threads(1)
    each = [torch.ops.ddiff.convolution_gradients(x[i : i + 1], grad[i : i + 1]) for i in range(5)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        whole = torch.ops.ddiff.convolution_gradients(x, grad)
        for found, *parts in zip(whole, *each, strict=True):
            torch.testing.assert_close(found, torch.stack(parts).sum(0), atol=2e-3, rtol=1e-5)
        again = torch.ops.ddiff.convolution_gradients(x, grad)
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@looped
@torch.no_grad()
def test_a_compiled_layer_is_one_graph() -> None:
    conv, x = layer(16, 16).bfloat16(), features(1, 16, 4, 4).bfloat16()
    conv.forward = inspect.unwrap(type(conv).forward).__get__(conv)  # type: ignore[method-assign]
    found = torch.compile(conv, backend="eager", fullgraph=True)(x)
    assert error(found, conv(x).double()) < 0.01


def test_everything_else_is_left_to_others() -> None:
    x, conv = features(1, 16, 4, 4).bfloat16(), layer(16, 16).bfloat16()
    suits = winograd.suits
    assert suits(conv, x) == winograd.runs()
    assert not suits(conv, x.float())
    assert not suits(layer(16, 16), x.float())
    assert not suits(conv, x[:, :, :3])
    assert not suits(conv, x[:, :, :, :3])
    assert not suits(conv, x[:0])
    assert not suits(conv, x.to("meta"))
    assert not suits(layer(16, 24).bfloat16(), x)
    assert not suits(layer(24, 16).bfloat16(), features(1, 24, 4, 4).bfloat16())
    for other in (
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 16},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 1},
        {"kernel_size": 5, "padding": 2},
    ):
        assert not suits(Conv(16, 16, **other).bfloat16(), x)  # type: ignore[arg-type]
    with imagined("cuda"):
        assert not suits(conv, x)
    with torch.autocast("cpu", torch.float16):
        assert not suits(conv, x)
