"""Attention, fused or written out, is softmax(q k / sqrt(d)) v over the keys that a mask lets it see."""

import pytest
import torch
import torch.nn.functional as F

from dd_core.nets.attention import attend


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
