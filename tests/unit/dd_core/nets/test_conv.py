"""A convolution by oneDNN is that of PyTorch, hears of changed weights, and asks for no gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.devices import imagined
from dd_core.nets.conv import Conv, by_onednn, kinds
from dd_core.nets.layers import ResBlock, Shared, Told

pytestmark = pytest.mark.skipif(not kinds(), reason="Conv leaves all to PyTorch on this machine")
KINDS = (torch.float32, torch.bfloat16)
WAYS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "1x1": {"kernel_size": 1},
    "without bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "patches": {"kernel_size": 2, "stride": 2},
}


@pytest.fixture(params=KINDS, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param not in kinds():
        pytest.skip("this CPU does not multiply bfloat16, so Conv leaves it to PyTorch")
    return request.param  # type: ignore[no-any-return]


def conv(dtype: torch.dtype = torch.float32, **how: object) -> Conv:
    torch.manual_seed(0)
    made = Conv(6, 5, **(how or WAYS["3x3"]))  # type: ignore[arg-type]
    return made.to(dtype).requires_grad_(False)


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def plainly(layer: Conv, x: Tensor) -> Tensor:
    """In float32, by PyTorch."""
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    return F.conv2d(x.float(), weight, bias, layer.stride, layer.padding)


def near(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    of = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(one.float(), other.float(), atol=of, rtol=of)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_it_answers_as_pytorch_does_and_adds_what_it_is_given(
    way: str, frozen: bool, dtype: torch.dtype
) -> None:
    layer = conv(dtype, **WAYS[way]).requires_grad_(not frozen)
    x = features(2, 6, 8, 8, dtype=dtype)
    assert by_onednn(x, layer.weight)
    out = plainly(layer, x)
    near(layer(x), out, dtype)
    onto = features(*out.shape, dtype=dtype)
    kept = onto.clone()
    near(layer(x, onto=onto), out + onto.float(), dtype)
    near(layer(x.contiguous(), onto=onto.contiguous()), out + onto.float(), dtype)
    assert torch.equal(onto, kept)


@torch.no_grad()
def test_an_answer_does_not_depend_on_the_size_that_weights_were_laid_out_for(dtype: torch.dtype) -> None:
    layer, again, large, small = conv(dtype), conv(dtype), features(3, 6, 32, 32), features(1, 6, 4, 4)
    large, small = large.to(dtype), small.to(dtype)
    first = layer(large), layer(small)
    second = again(small), again(large)
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[0])


@torch.no_grad()
def test_changed_weights_are_heard() -> None:
    layer, x = conv(), features(1, 6, 8, 8)
    before = layer(x)
    layer.weight.lerp_(torch.ones_like(layer.weight), 0.5)  # as averages of weights move
    near(layer(x), plainly(layer, x), torch.float32)
    assert not torch.equal(layer(x), before)
    layer.load_state_dict({name: 2 * part for name, part in layer.state_dict().items()})
    near(layer(x), plainly(layer, x), torch.float32)
    layer.to(torch.float64)
    assert layer(x.double()).dtype == torch.float64
    layer.to(torch.float32)
    near(layer(x), plainly(layer, x), torch.float32)


@pytest.mark.parametrize("channels", [6, 16])  # of oneDNN's convolution, of winograd.c's
@torch.no_grad()
def test_weights_at_an_address_that_others_had_are_heard(channels: int) -> None:
    torch.manual_seed(0)
    layer, x = Conv(channels, channels, 3, padding=1).requires_grad_(False), features(1, channels, 8, 8)
    for scale in range(20):
        other = {"weight": layer.weight * scale, "bias": layer.bias}
        found = torch.func.functional_call(layer, other, (x,))
        near(found, F.conv2d(x, other["weight"], layer.bias, padding=1), torch.float32)
    for _ in range(10):
        layer.bfloat16()
        layer.float()
        with torch.no_grad():
            layer.weight.data = torch.randn_like(layer.weight)
        near(layer(x), plainly(layer, x), torch.float32)


@pytest.mark.parametrize("channels", [6, 16])
def test_weights_that_a_fused_optimizer_steps_are_heard(channels: int) -> None:
    """It counts no change."""
    torch.manual_seed(0)
    layer, x = Conv(channels, channels, 3, padding=1), features(1, channels, 8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        layer.requires_grad_(False)
        with torch.no_grad():
            near(layer(x), plainly(layer, x), torch.float32)
        near(layer(x), plainly(layer, x), torch.float32)
        layer.requires_grad_()
        layer(x).square().sum().backward()
        optimizer.step()


def test_weights_that_count_no_changes_are_never_laid_out() -> None:
    with torch.inference_mode():
        layer, x = conv(), features(1, 6, 8, 8)
        before = layer(x)
        layer.weight.mul_(2)
        assert not torch.equal(layer(x), before)
        near(layer(x), plainly(layer, x), torch.float32)


@torch.no_grad()
def test_what_has_answered_can_be_copied_and_sent() -> None:
    layer, x = conv(), features(1, 6, 8, 8)
    out = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), out)
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_gradients_are_those_of_pytorch() -> None:
    layer, x, onto = conv().requires_grad_(), features(1, 6, 8, 8), features(1, 5, 8, 8)
    assert not by_onednn(x, layer.weight)
    wanted = torch.autograd.grad((plainly(layer, x) + onto).square().sum(), [layer.weight])
    found = torch.autograd.grad(layer(x, onto=onto).square().sum(), [layer.weight])
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of what switches oneDNN off
@torch.no_grad()
def test_it_is_left_to_pytorch_for_other_devices_dtypes_and_casts() -> None:
    x, weight = features(1, 6, 8, 8), conv().weight
    assert by_onednn(x, weight)
    assert not by_onednn(x.double(), weight.double())
    assert not by_onednn(x, weight.bfloat16())
    assert not by_onednn(x[:0], weight)
    assert not by_onednn(x.to("meta"), weight.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(x, weight)
    with imagined("cuda"):
        assert not by_onednn(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, weight)
        assert conv()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("wide", [8, 16])
def test_a_residual_block_adds_the_same_with_and_without_gradients(wide: int) -> None:
    torch.manual_seed(0)
    block = ResBlock(8, wide, Shared(level_width=4, groups=4)).requires_grad_(False)
    block.conv_out.weight.normal_()
    x, told = features(2, 8, 8, 8), Told(torch.randn(2, 4))
    with torch.no_grad():
        quick = block(x, told)
    torch.testing.assert_close(quick, block(x.requires_grad_(), told), atol=1e-5, rtol=1e-5)
