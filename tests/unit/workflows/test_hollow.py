"""Tensors without content have the shapes, types and storages that FakeTensorMode gives them, for less."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from workflows.estimate import Content
from workflows.hollow import Hollow, Hollowing, storage

TABLE = torch.arange(12.0).reshape(3, 4)
"""With content, as a module's buffer may have."""


def attention() -> list[Tensor]:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = layer(*[torch.randn(2, 5, 8)] * 3)[0]
    return [x, F.scaled_dot_product_attention(*[x.unflatten(2, (2, 4)).transpose(1, 2)] * 3)]


def convolutions() -> list[Tensor]:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2))
    x = net(torch.zeros(2, 3, 16, 16).contiguous(memory_format=torch.channels_last))
    return [x, F.interpolate(x, scale_factor=2), x.flatten(1).softmax(1), x.mean((2, 3))]


def views() -> list[Tensor]:
    x = torch.ones(4, 6)
    first, second = x.chunk(2, dim=1)
    return [
        x,
        x.t(),
        first,
        second,
        x[1:, ::2],
        x.expand(2, 4, 6),
        torch.cat([first, second]),
        TABLE[1],
        TABLE.T,
    ]


def numbers() -> list[Tensor]:
    x = torch.randint(0, 9, (5,))
    return [x, x.float() * TABLE[0, 0], x > 3, x.half() + 1.0, x.double().sum(), *torch.topk(x.float(), 2)]


def learned() -> list[Tensor]:
    layer = nn.LayerNorm(6)
    layer(torch.randn(3, 6)).square().mean().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()
    return [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]


@pytest.fixture(params=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16) if request.param == "bfloat16" else nullcontext():
        yield


@pytest.mark.parametrize("program", [attention, convolutions, views, numbers, learned])
@pytest.mark.usefixtures("precision")
def test_results_are_those_of_fake_tensors(program: Callable[[], list[Tensor]]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = program()
    with Hollowing() as mode:
        once = program()
        asked = len(mode.known)
        again = program()
    assert len(mode.known) == asked
    for found in (once, again):
        assert all(isinstance(one, Hollow) and one.device.type == "cpu" for one in found)
        described = [(one.shape, one.stride(), one.dtype) for one in found]
        assert described == [(one.shape, one.stride(), one.dtype) for one in expected]
        assert same_place(found) == same_place(expected)


def same_place(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """Size of the storage of each, and which of them is the first to lie there."""
    places = [storage(one) for one in tensors]
    return [(place.nbytes(), [id(one) for one in places].index(id(place))) for place in places]


def test_of_equal_operations_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hollowing, "known", {})
    with Hollowing() as mode:
        asked, ask = list[str](), mode.asked
        monkeypatch.setattr(
            mode, "asked", lambda func, args, kwargs: (asked.append(str(func)), ask(func, args, kwargs))[1]
        )
        x = torch.ones(2, 3)
        for _ in range(5):
            x = x @ torch.ones(3, 3)
        x @ torch.ones(3, 4)
    assert asked.count("aten.mm.default") == 2


def test_what_changes_a_tensor_in_place_returns_it() -> None:
    with Hollowing():
        x = torch.ones(2, 3)
        assert x.add_(1).mul_(2).copy_(torch.zeros(3)) is x
        assert x.unsqueeze_(0).transpose_(1, 2) is x
        assert (x.shape, x.stride()) == ((1, 3, 2), (6, 1, 3))
        assert storage(x.squeeze_()) is storage(x[0])
        assert (x.sum(0).shape, x.t().is_contiguous()) == ((2,), True)


def test_what_does_not_go_together_is_refused_each_time() -> None:
    with Hollowing():
        x = torch.ones(2, 3)
        for _ in range(2):
            with pytest.raises(RuntimeError):
                x + torch.ones(5)
            with pytest.raises(RuntimeError):
                x.add_(torch.ones(5))
            with pytest.raises(RuntimeError):
                torch._foreach_add_([x], [torch.ones(5)])


def test_content_is_not_made_up() -> None:
    with Hollowing():
        x = torch.ones(3)
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(RuntimeError):
            x.tolist()
        with pytest.raises(RuntimeError):
            x.nonzero()
    with pytest.raises(RuntimeError, match="inside Hollowing alone"):
        x + 1


def test_a_mode_above_supplies_it_item_by_item() -> None:
    with Hollowing(), Content():
        assert torch.ones(2, 3).tolist() == [[1.0] * 3] * 2
        assert torch.zeros(2, dtype=torch.long).tolist() == [0, 0]


def test_all_that_is_made_is_hollow_and_parameters_stay_parameters() -> None:
    with Hollowing():
        module = nn.Linear(3, 4)
        state = tree_leaves(module.state_dict())
    assert all(isinstance(one, Hollow) for one in state)
    assert all(isinstance(one, nn.Parameter) and one.requires_grad for one in module.parameters())
