"""Attention, fused or written out, is softmax(q k / sqrt(d)) v over the keys that a mask lets it see."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dd_core.nets import attention
from dd_core.nets.attention import attend
from tests.unit.dd_core.nets.built import BFLOAT16, built_for, runs_bfloat16

looped = pytest.mark.usefixtures("loops")


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """attention.c, also where AMX is why it is not used; elsewhere a test of it is skipped by name."""
    if not attention.runs() and not runs_bfloat16():
        pytest.skip("attention.c wants gcc and AVX512-BF16: PyTorch's attention is used")
    if not attention.runs():
        built = built_for(BFLOAT16, attention.SOURCE)
        monkeypatch.setattr(attention, "compiled", lambda _: built)
    assert attention.runs()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sides_of_one(batch: int, heads: int, queries: int, keys: int, width: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, the latter two out of one tensor, as a layer makes them."""
    query = torch.randn(batch, queries, heads, width).bfloat16().transpose(1, 2)
    both = torch.randn(batch, keys, 2, heads, width).bfloat16().permute(2, 0, 3, 1, 4)
    return (query, *both.unbind(0))


def test_attention_in_bfloat16_is_that_of_float64_to_its_rounding() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 20, 8).bfloat16().unbind(0)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert (attend(query, key, value) - exact).abs().max() <= 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_looks_only_where_its_mask_lets_it(dtype: torch.dtype) -> None:
    """In bfloat16 on a CPU the products are written out; the fused kernel in double precision is the law."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=generator).to(dtype) for _ in range(3))
    earlier = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    some = (torch.rand(2, 1, 1, 5, generator=generator) < 0.5) | (torch.arange(5) == 0)
    for mask in (earlier, some):
        exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
        seen = attend(query, key, value, mask)
        torch.testing.assert_close(seen.double(), exact, atol=0.02, rtol=0.02)
        hidden = torch.where(mask.expand(2, 1, 5, 5)[:, :, -1, :, None], value, 9.0)
        assert torch.equal(attend(query, key, hidden, mask)[:, :, -1], seen[:, :, -1])


@looped
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(1, 1, 16), (7, 5, 32), (64, 80, 32), (65, 47, 64), (256, 272, 32), (9, 49, 48), (200, 1105, 64)],
)
def test_the_loops_are_attention_to_the_rounding_of_weights(
    queries: int, keys: int, width: int, masked: bool, threads: int
) -> None:
    torch.manual_seed(queries)
    torch.set_num_threads(threads)
    query, key, value = sides_of_one(2, 3, queries, keys, width)
    mask = (torch.rand(2, 1, 1, keys) < 0.5) | (torch.arange(keys) == keys - 1) if masked else None
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    with torch.no_grad():
        found = attend(query, key, value, mask)
        heard = None if mask is None else mask[:, 0, 0]
        assert torch.equal(found, torch.ops.ddiff.attention(query, key, value, heard))
    assert found.shape == query.shape
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.double(), exact, atol=6e-3, rtol=1e-2)


@looped
@torch.no_grad()
def test_the_loops_read_tensors_however_they_lie_in_memory() -> None:
    torch.manual_seed(0)
    straight = sides_of_one(2, 3, 9, 20, 32)
    one_mask = torch.rand(1, 1, 1, 20) < 0.5
    plain = attend(*straight), attend(*straight, one_mask.expand(2, 1, 1, 20).contiguous())
    turned = [part.transpose(2, 3).contiguous().transpose(2, 3) for part in straight]
    apart = [torch.stack([part, part], 3)[:, :, :, 0] for part in straight]
    for parts in (straight, turned, apart):
        assert torch.equal(attend(*parts), plain[0])
        assert torch.equal(attend(*parts, one_mask), plain[1])
    same = [part[:1].expand(2, 3, -1, 32) for part in straight]
    assert torch.equal(attend(*same)[1], plain[0][0])


@looped
@torch.no_grad()
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 2, 3), (1, 0, 3), (1, 2, 0)])
def test_empty_tensors_are_left_to_pytorch(batch: int, queries: int, keys: int) -> None:
    parts = sides_of_one(batch, 2, queries, keys, 16)
    assert torch.equal(attend(*parts), F.scaled_dot_product_attention(*parts))
    with pytest.raises(ValueError, match="none of them empty"):
        torch.ops.ddiff.attention(*parts, None)


@looped
@torch.no_grad()
def test_what_the_loops_find_depends_neither_on_the_batch_nor_on_threads() -> None:
    torch.manual_seed(0)
    parts = sides_of_one(5, 2, 70, 33, 32)
    torch.set_num_threads(1)
    whole = attend(*parts)
    torch.set_num_threads(4)
    assert torch.equal(attend(*parts), whole)
    for row in range(5):
        assert torch.equal(attend(*(part[row : row + 1] for part in parts)), whole[row : row + 1])


@looped
@torch.no_grad()
def test_the_loops_keep_extremes_apart_and_hand_on_what_is_no_number() -> None:
    query, key, value = sides_of_one(1, 1, 2, 3, 16)
    key[0, 0] = torch.tensor([100.0, -100.0, 0.0])[:, None]
    query[0, 0] = torch.tensor([100.0, -100.0])[:, None]
    assert torch.equal(attend(query, key, value)[0, 0], value[0, 0, :2])
    query[0, 0, 0, 5] = torch.nan
    found = attend(query, key, value)
    assert found[0, 0, 0].isnan().all()
    assert torch.equal(found[0, 0, 1], value[0, 0, 1])
    query, key, value = sides_of_one(1, 1, 2, 40, 16)
    key[0, 0, 35, 3] = torch.nan
    assert attend(query, key, value).isnan().all()


@looped
def test_sizes_that_do_not_match_are_refused_before_the_loop_reads_beyond_its_tensors() -> None:
    query, key, value = sides_of_one(2, 3, 4, 5, 16)
    heard = torch.ones(2, 5, dtype=torch.bool)
    for wrong in (
        (query, key[:, :, :4], value, None),
        (query[..., :8], key[..., :8], value[..., :8], None),
        (query.float(), key.float(), value.float(), None),
        (query, key, value, heard[:, :4]),
        (query, key, value, heard.long()),
    ):
        with pytest.raises(ValueError, match="want keys and values"):
            torch.ops.ddiff.attention(*wrong)


@looped
@torch.no_grad()
def test_the_size_of_the_result_is_known_without_data() -> None:
    query, key, value = sides_of_one(2, 3, 4, 5, 16)
    found = attend(query, key, value)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        imagined = torch.ops.ddiff.attention(*(mode.from_tensor(part) for part in (query, key, value)), None)
    assert (imagined.shape, imagined.stride()) == (found.shape, found.stride())


@looped
@pytest.mark.parametrize("odd", ["width", "causal", "gradients", "float32", "many"])
def test_what_the_loops_do_not_do_is_done_by_pytorch(odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compiled", None)  # calling the loops would fail
    monkeypatch.setattr(attention, "MANY", 40)
    query, key, value = sides_of_one(1, 2, 41, 41 if odd == "many" else 40, 24 if odd == "width" else 16)
    mask = torch.ones(1, 1, 41, 40, dtype=torch.bool).tril() if odd == "causal" else None
    if odd == "float32":
        query, key, value = query.float(), key.float(), value.float()
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    with torch.set_grad_enabled(odd == "gradients"):
        torch.testing.assert_close(attend(query, key, value, mask).double(), exact, atol=0.02, rtol=0.02)
