"""Winograd's algorithm is the convolution, forwards and backwards, to the rounding of its points."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dd_core.devices import imagined
from dd_core.nets import winograd
from dd_core.nets.conv import Conv
from tests.unit.dd_core.nets.built import BFLOAT16, built_for, runs_bfloat16

looped = pytest.mark.skipif(
    not winograd.runs(torch.float32), reason="winograd.c wants gcc and AVX2: oneDNN's convolution is used"
)
ERROR = {torch.float32: 2e-6, torch.bfloat16: 0.008}
"""Of an output or a gradient, as a share of its deviation."""
SIZES = [(16, 16, 2, 2), (48, 96, 6, 10), (64, 16, 8, 4), (32, 80, 4, 6), (112, 64, 16, 16), (96, 48, 64, 64)]


@pytest.fixture(params=winograd.DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Both, bfloat16 also where AMX is why winograd.c is not used for it."""
    if not winograd.runs(request.param) and not runs_bfloat16():
        pytest.skip("winograd.c in bfloat16 wants AVX512-BF16: oneDNN's convolution is used")
    if not winograd.runs(request.param):
        halves, ours = built_for(BFLOAT16, winograd.SOURCE, "HALF"), winograd.loops
        monkeypatch.setattr(winograd, "loops", lambda of: halves if of == torch.bfloat16 else ours(of))
    assert winograd.runs(request.param)
    return request.param  # type: ignore[no-any-return]


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
@pytest.mark.parametrize(("into", "out", "height", "width"), SIZES)
def test_it_is_the_convolution_and_has_its_gradients(
    into: int, out: int, height: int, width: int, dtype: torch.dtype
) -> None:
    conv, x, onto = layer(into, out), features(3, into, height, width), drawn(3, out, height, width, seed=2)
    wanted = drawn(3, out, height, width, seed=3)
    parts = (conv.to(dtype), x.to(dtype), onto.to(dtype), wanted.to(dtype))
    has_gradients(*parts, cast=False)
    if dtype == torch.bfloat16:
        has_gradients(conv.float(), x, onto, wanted, cast=True)


def has_gradients(conv: Conv, x: Tensor, onto: Tensor, wanted: Tensor, *, cast: bool) -> None:
    """The layer's output and all gradients are those of float64."""
    dtype = torch.bfloat16 if cast else x.dtype
    x, onto = x.requires_grad_(), onto.requires_grad_()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        assert winograd.suited(conv, x) == dtype
        found = conv(x, onto)
    (found.double() * wanted.double()).sum().backward()
    parts = (x, conv.weight, conv.bias, onto)
    exact = [part.detach().double().requires_grad_() for part in parts]
    true = F.conv2d(*exact[:3], padding=1) + exact[3]
    (true * wanted.double()).sum().backward()
    assert found.dtype == onto.dtype
    assert error(found.detach(), true.detach()) < ERROR[dtype]
    for part, other in zip(parts, exact, strict=True):
        assert other.grad is not None
        assert part.grad is not None
        assert part.grad.dtype == part.dtype
        assert error(part.grad, other.grad) < ERROR[dtype]


@looped
@pytest.mark.parametrize(("into", "out", "height", "width"), SIZES[:-1])
def test_processors_of_eight_lanes_compute_the_same(
    into: int, out: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = built_for("x86-64-v3", winograd.SOURCE)
    monkeypatch.setattr(winograd, "loops", lambda _: narrow)
    sizes = (3, out, height, width)
    parts = features(3, into, height, width), drawn(*sizes, seed=2), drawn(*sizes, seed=3)
    has_gradients(layer(into, out), *parts, cast=False)


@looped
def test_exact_numbers_come_out_exactly(dtype: torch.dtype) -> None:
    """Small whole numbers, and kernels whose halves and quarters bfloat16 has too, meet no rounding."""
    conv, x = layer(16, 32).to(dtype), (drawn(2, 16, 8, 6) * 2).round().to(dtype)
    with torch.no_grad():
        conv.weight.copy_((drawn(32, 16, 3, 3) * 2).round().clamp(-3, 3))
        conv.bias.copy_(drawn(32).round())  # type: ignore[union-attr]
        assert winograd.suited(conv, x)
        found = conv(x)
    true = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)  # type: ignore[union-attr]
    assert torch.equal(found, true.to(dtype))


@looped
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_an_output_depends_neither_on_the_batch_nor_on_threads_nor_on_how_tensors_lie(
    bias: bool, dtype: torch.dtype
) -> None:
    conv, x = layer(48, 64, bias=bias).to(dtype), features(5, 48, 6, 34).to(dtype)
    onto = drawn(5, 64, 6, 34).to(dtype)
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
            assert error(conv(x), plain.double()) < ERROR[torch.bfloat16]
        conv.weight.mul_(-2)


@looped
def test_frozen_kernels_hand_gradients_on(dtype: torch.dtype) -> None:
    conv, x = (
        layer(16, 32).to(dtype).requires_grad_(False),
        features(2, 16, 4, 4).to(dtype).requires_grad_(),
    )
    wanted = features(2, 32, 4, 4, seed=3).to(dtype)
    (found,) = torch.autograd.grad(conv(x), [x], wanted)
    true = F.conv_transpose2d(wanted.double(), conv.weight.double(), padding=1)
    assert error(found, true) < ERROR[dtype]


@looped
@torch.no_grad()
def test_what_lies_beside_a_tensor_is_not_read(dtype: torch.dtype) -> None:
    conv, size = layer(16, 48).to(dtype), 2 * 6 * 4
    around = torch.full((size * 16 + 128,), torch.nan, dtype=dtype)
    x = around[64 : 64 + size * 16].view(2, 6, 4, 16).permute(0, 3, 1, 2)
    x.copy_(drawn(2, 16, 6, 4))
    found = conv(x)
    assert found.isfinite().all()
    assert torch.equal(found, conv(x.clone(memory_format=torch.channels_last)))


@looped
@torch.no_grad()
def test_what_is_no_number_spoils_its_own_surroundings_only(dtype: torch.dtype) -> None:
    conv, x = layer(16, 16).to(dtype), features(2, 16, 8, 8).to(dtype)
    whole = conv(x)
    x[0, 3, 0, 0] = torch.nan
    found = conv(x)
    assert found[0, :, :2, :2].isnan().all()
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[0, :, 2:, 2:], whole[0, :, 2:, 2:])


@looped
def test_sizes_that_do_not_match_are_refused_before_the_loop_reads_beyond_its_tensors(
    dtype: torch.dtype,
) -> None:
    x, kernels = features(2, 16, 4, 4).to(dtype), winograd.laid(drawn(32, 16, 3, 3), dtype)
    bias, onto = drawn(32), drawn(2, 32, 4, 4).to(dtype)
    for wrong in (
        (x.double(), kernels, 32, bias, onto),
        (x[:, :8], kernels[: 16 * 8 * 32], 32, bias, onto),
        (x[:, :, :3], kernels, 32, bias, onto[:, :, :3]),
        (x, kernels[:-1], 32, bias, onto),
        (x, kernels.double(), 32, bias, onto),
        (x, kernels, 16, bias[:16], onto[:, :16]),
        (x, kernels, 32, bias[:16], onto),
        (x, kernels, 32, bias, onto[:1]),
        (x, kernels, 32, bias, onto.double()),
    ):
        with pytest.raises(ValueError, match="numbers of kernels"):
            torch.ops.ddiff.convolution(*wrong)
    assert not torch.ops.ddiff.convolution(x[:0], kernels, 32, None, None).numel()
    apart = torch.stack([kernels, kernels], 1)[:, 0]
    whole = torch.ops.ddiff.convolution(x, kernels, 32, bias, onto)
    assert torch.equal(torch.ops.ddiff.convolution(x, apart, 32, bias, onto), whole)
    for weight in (drawn(32, 16, 1, 1), drawn(32, 8, 3, 3), drawn(24, 16, 3, 3)):
        with pytest.raises(ValueError, match="kernels of 3 x 3"):
            torch.ops.ddiff.winograd_kernels(weight, dtype, False)
    for pair in ((x.double(), onto), (x[:1], onto), (x[:, :8], onto), (x, onto[:, :24]), (x, onto[:, :, :2])):
        with pytest.raises(ValueError, match="features and gradients"):
            torch.ops.ddiff.convolution_gradients(*pair)


@looped
@torch.no_grad()
def test_the_size_of_the_result_is_known_without_data(dtype: torch.dtype) -> None:
    x, kernels = features(2, 16, 4, 4).to(dtype), winograd.laid(drawn(32, 16, 3, 3), dtype)
    found = torch.ops.ddiff.convolution(x, kernels, 32, None, None)
    grads = torch.ops.ddiff.convolution_gradients(x, found)
    with FakeTensorMode() as mode:
        inside = [mode.from_tensor(part) for part in (x, kernels)]
        planned = torch.ops.ddiff.convolution(*inside, 32, None, None)
        planned_grads = torch.ops.ddiff.convolution_gradients(inside[0], planned)
    for one, other in zip((planned, *planned_grads), (found, *grads), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@looped
def test_gradients_of_a_batch_are_the_sums_of_those_of_its_samples_whatever_the_threads(
    dtype: torch.dtype,
) -> None:
    x, grad = features(5, 48, 18, 22).to(dtype), features(5, 64, 18, 22, seed=2).to(dtype)
    torch.set_num_threads(1)
    each = [torch.ops.ddiff.convolution_gradients(x[i : i + 1], grad[i : i + 1]) for i in range(5)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        whole = torch.ops.ddiff.convolution_gradients(x, grad)
        for found, *parts in zip(whole, *each, strict=True):
            torch.testing.assert_close(found, torch.stack(parts).sum(0), atol=2e-3, rtol=1e-5)
        again = torch.ops.ddiff.convolution_gradients(x, grad)
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_everything_else_is_left_to_others() -> None:
    x, conv, suited = features(1, 16, 4, 4), layer(16, 16), winograd.suited
    assert suited(conv, x) == (torch.float32 if winograd.runs(torch.float32) else None)
    assert suited(conv, x.bfloat16()) is None
    assert suited(conv.to(torch.float64), x.double()) is None
    conv.float()
    for other in (x[:, :, :3], x[:, :, :, :3], x[:0], x.to("meta"), x[0]):
        assert suited(conv, other) is None
    assert suited(layer(16, 16).to("meta"), x) is None
    assert suited(layer(16, 24), x) is None
    assert suited(layer(24, 16), features(1, 24, 4, 4)) is None
    for how in (
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 16},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 1},
        {"kernel_size": 5, "padding": 2},
    ):
        assert suited(Conv(16, 16, **how), x) is None  # type: ignore[arg-type]
    with imagined("cuda"):
        assert suited(conv, x) is None
    with torch.autocast("cpu", torch.float16):
        assert suited(conv, x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert suited(conv, x.double()) is None
