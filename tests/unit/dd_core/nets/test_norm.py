"""The norm that is told things: loops in C, passes of PyTorch's, library calls and the formula are one."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dd_core import compiled as compiling
from dd_core.nets import norm
from dd_core.nets.norm import modulated_norm

WAYS = ("loops", "passes")


def by_formula(
    x: Tensor, weight: Tensor, bias: Tensor, told: Tensor | None = None, *, groups: int, silu: bool
) -> Tensor:
    """GroupNorm, its affine map, that of what a sample is told, and SiLU, written out."""
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    variance = (parts - mean).square().mean((2, 3, 4), keepdim=True)
    unit = ((parts - mean) / (variance + norm.EPSILON).sqrt()).flatten(1, 2)
    z = unit * weight[:, None, None] + bias[:, None, None]
    if told is not None:
        scale, shift = told[:, :, None, None].chunk(2, dim=1)
        z = z * (1 + scale) + shift
    return z * torch.sigmoid(z) if silu else z


def inputs(side: int, dtype: torch.dtype, *, channels: int = 24, mean: float = 0.5) -> list[Tensor]:
    """x, weight, bias and what is told, with channels innermost as in the network."""
    x = (mean + torch.randn(3, channels, side, side)).to(dtype).contiguous(memory_format=torch.channels_last)
    told = torch.randn(3, 2 * channels).to(dtype) / 2
    return [x, 1 + torch.randn(channels) / 2, torch.randn(channels), told]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a CPU; where there is no gcc the loops are skipped by name."""
    if request.param == "passes":
        monkeypatch.setattr(norm, "compiled", lambda source: None)
    elif norm.compiled(norm.SOURCE) is None:
        pytest.skip("no gcc here: norm.c is not compiled")
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("side", "channels"), [(1, 24), (6, 24), (40, 24), (12, 64), (5, 20)])
def test_the_norm_and_its_gradients_are_those_of_the_formula(
    way: str, side: int, channels: int, silu: bool, told: bool
) -> None:
    torch.manual_seed(side)
    leaves = [leaf.requires_grad_() for leaf in inputs(side, torch.float32, channels=channels)]
    leaves = leaves if told else leaves[:3]
    ours = modulated_norm(*leaves, *[None] * (not told), groups=4, silu=silu)
    formula = by_formula(*leaves, groups=4, silu=silu)
    torch.testing.assert_close(ours, formula, rtol=0, atol=1e-5)
    grad = torch.randn_like(ours) / side
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(formula, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [6, 40])
def test_the_library_calls_used_off_the_cpu_give_the_same(way: str, side: int) -> None:
    torch.manual_seed(0)
    leaves = inputs(side, torch.float32)
    expected = modulated_norm(*leaves, groups=4, silu=True)
    found = norm.plain_modulated_norm(*leaves, groups=4, silu=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [6, 40])
def test_in_bfloat16_only_reading_and_writing_round(way: str, side: int) -> None:
    torch.manual_seed(0)
    leaves = [leaf.requires_grad_() for leaf in inputs(side, torch.bfloat16, mean=3.0)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = modulated_norm(*leaves, groups=4, silu=True)
    formula = by_formula(*exact, groups=4, silu=True)
    grad = torch.randn_like(ours) / side
    assert ours.dtype == torch.bfloat16
    assert (ours - formula).abs().max() <= 2**-8 * formula.abs().max()  # half a unit of the last place
    found = torch.autograd.grad(ours, leaves, grad)
    expected = torch.autograd.grad(formula, exact, grad.double())
    for ours_grad, exact_grad in zip(found, expected, strict=True):
        assert (ours_grad - exact_grad).norm() <= 0.003 * exact_grad.norm()


@pytest.mark.parametrize(("dtype", "of"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_silu_is_right_however_far_from_zero(way: str, dtype: torch.dtype, of: float) -> None:
    far = torch.tensor([0.0, 1e-3, 0.5, 1, 2, 5, 10, 20, 40, 79, 80, 81, 87, 88, 89, 126, 128, 200, 1e3, 1e4])
    z = torch.cat([far, -far]).requires_grad_()
    x = torch.randn(1, len(z), 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    ours = modulated_norm(x, torch.zeros(len(z)), z, None, groups=4, silu=True)  # nothing but its bias
    exact = z.detach().double().requires_grad_()
    formula = exact * torch.sigmoid(exact)
    torch.testing.assert_close(ours[0, :, 0, 0].double(), formula, rtol=of, atol=1e-30)
    (found,) = torch.autograd.grad(ours.float().mean((0, 2, 3)).sum(), z)
    (expected,) = torch.autograd.grad(formula.sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=max(of, 1e-5), atol=1e-5)


def test_a_level_far_from_zero_costs_no_digits(way: str) -> None:
    torch.manual_seed(0)
    x, *affine = inputs(32, torch.float32)
    x = x + 1000 * torch.randn(1, 24, 1, 1)  # every channel has a level of its own
    expected = by_formula(x.double(), *(of.double() for of in affine), groups=24, silu=True)
    found = modulated_norm(x, *affine, groups=24, silu=True)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)  # x itself has 1e-4 of them


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_sample_alone(way: str, value: float) -> None:
    torch.manual_seed(0)
    leaves = inputs(8, torch.bfloat16)
    leaves[0][1, 3, 2, 2] = value
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = modulated_norm(*leaves, groups=1, silu=True)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    grads = torch.autograd.grad(out, leaves[::3], torch.ones_like(out))  # those of each sample
    assert grads[0][1].isnan().all()
    assert all(grad[[0, 2]].isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", norm.KINDS)
def test_a_sample_depends_neither_on_its_batch_nor_on_the_threads(threads: None, dtype: torch.dtype) -> None:
    if norm.compiled(norm.SOURCE) is None:
        pytest.skip("no gcc here: norm.c is not compiled")
    torch.manual_seed(0)
    x, told, weight, bias = torch.randn(9, 32, 48, 48).to(dtype), torch.randn(9, 64), *torch.randn(2, 32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for first, last in ((0, 9), (7, 8), (6, 8)):
            leaves = [of[first:last].clone().requires_grad_() for of in (x, told)]
            out = modulated_norm(leaves[0], weight, bias, leaves[1], groups=4, silu=True)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
            found.append([of[7 - first] for of in (out, *grads)])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=0, atol=0)


def test_sizes_are_known_without_numbers() -> None:
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(leaf).requires_grad_() for leaf in inputs(8, torch.bfloat16)]
        out = modulated_norm(*leaves, groups=4, silu=True)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert (out.shape, out.dtype) == (leaves[0].shape, torch.bfloat16)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_where_nothing_can_be_compiled_it_is_said_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    wrong = tmp_path / "wrong.c"
    wrong.write_text("int f( {")
    with caplog.at_level(logging.WARNING):
        if shutil.which("gcc"):
            assert compiling.compiled.__wrapped__(wrong) is None
            assert "wrong.c did not compile, slower without: " in caplog.text
            assert "error: expected" in caplog.text
        monkeypatch.setenv("PATH", str(tmp_path))
        assert compiling.compiled.__wrapped__(norm.SOURCE) is None
        assert "norm.c needs gcc on Linux (Debian: apt-get install gcc libc6-dev)" in caplog.text


def test_what_was_compiled_is_taken_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if compiling.compiled.__wrapped__(norm.SOURCE) is None:
        pytest.skip("no gcc here: norm.c is not compiled")
    (made,) = tmp_path.rglob("*.so")
    assert made.parent.stat().st_mode & 0o077 == 0  # nobody else may put a library there
    monkeypatch.setattr(compiling.subprocess, "run", None)
    assert compiling.compiled.__wrapped__(norm.SOURCE) is not None


@pytest.mark.parametrize(
    ("weight", "told", "groups"),
    [(8, (1, 16), 4), (8, (2, 12), 4), (6, (2, 16), 4), (8, (2, 16), 3)],
    ids=["batch", "told", "channels", "groups"],
)
def test_sizes_that_do_not_go_together_are_refused(
    way: str, weight: int, told: tuple[int, ...], groups: int
) -> None:
    with pytest.raises(
        ValueError, match=r"features \(2, 8, 4, 4\) want weight and bias of \(c,\) in one dtype"
    ):
        norm.norm(
            torch.randn(2, 8, 4, 4), *torch.ones(2, weight), torch.zeros(told), groups, True, norm.EPSILON
        )


def test_no_sample_gives_none_and_no_pixel_is_refused_as_by_pytorch(way: str) -> None:
    weight, bias, told = torch.ones(8), torch.ones(8), torch.ones(2, 16)
    none = modulated_norm(torch.zeros(0, 8, 4, 4), weight, bias, told[:0], groups=4, silu=True)
    assert none.shape == (0, 8, 4, 4)
    with pytest.raises(RuntimeError, match="greater than 0"):
        modulated_norm(torch.zeros(2, 8, 0, 4), weight, bias, told, groups=4, silu=True)


def test_weights_in_bfloat16_are_read_as_they_are(way: str) -> None:
    torch.manual_seed(0)
    x, weight, bias, told = (leaf.bfloat16() for leaf in inputs(6, torch.bfloat16))
    with torch.no_grad():
        found = modulated_norm(x, weight, bias, told, groups=4, silu=True)
        expected = modulated_norm(x, weight.float(), bias.float(), told.float(), groups=4, silu=True)
    assert torch.equal(found, expected)
    halves = [of.requires_grad_() for of in (x, weight, bias, told)]
    wide = [of.detach().double().requires_grad_() for of in halves]
    ours, exact = modulated_norm(*halves, groups=4, silu=True), by_formula(*wide, groups=4, silu=True)
    assert torch.equal(ours, found)
    assert (ours - exact).abs().max() <= 2**-8 * exact.abs().max()
    grad = torch.randn_like(ours)
    expected = torch.autograd.grad(exact, wide, grad.double())
    for half, double in zip(torch.autograd.grad(ours, halves, grad), expected, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half - double).norm() <= 0.003 * double.norm()
