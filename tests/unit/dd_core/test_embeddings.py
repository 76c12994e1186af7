"""Embeddings: great circles, the main axes, and codes that lose half a bucket at most."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dd_core import embeddings


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(share=st.floats(0, 1), width=st.integers(2, 50), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_slerp_walks_the_great_circle_at_even_speed(share: float, width: int, seed: int) -> None:
    a, b = F.normalize(drawn(2, 3, width, seed=seed), dim=-1)
    between = embeddings.slerp(a, b, share)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(3).double())
    angle = torch.acos((a * b).sum(1).clamp(-1, 1))
    torch.testing.assert_close((a * between).sum(1), (share * angle).cos(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", [(4, 7), (4, 3, 5, 5)])
def test_slerp_begins_and_ends_at_its_ends_whatever_their_length(shape: tuple[int, ...]) -> None:
    a, b = drawn(*shape), 3 * drawn(*shape, seed=1)
    torch.testing.assert_close(embeddings.slerp(a, b, 0.0), a)
    torch.testing.assert_close(embeddings.slerp(a, b, 1.0), b)
    shares = torch.tensor([0.0, 1.0, 0.0, 1.0])
    mixed = embeddings.slerp(a, b, shares)
    torch.testing.assert_close(mixed[::2], a[::2])
    torch.testing.assert_close(mixed[1::2], b[1::2])


@pytest.mark.parametrize("gap", [1e-3, 3e-3, 1e-2])
def test_slerp_keeps_the_length_of_vectors_that_are_nearly_opposite(gap: float) -> None:
    a = F.normalize(drawn(500, 512), dim=1)
    aside = F.normalize(torch.linalg.cross(a[:, :3], drawn(500, 3, seed=1)), dim=1)  # at right angles to a
    b = math.cos(math.pi - gap) * a + math.sin(math.pi - gap) * F.pad(aside, (0, 509))
    between = embeddings.slerp(a.float(), F.normalize(b, dim=1).float(), 0.5)
    torch.testing.assert_close(between.norm(dim=1), torch.ones(500), atol=1e-3, rtol=0)


def test_slerp_of_equal_vectors_stays_and_of_opposite_ones_says_that_it_cannot() -> None:
    a = F.normalize(drawn(2, 6), dim=-1)
    for near in (a, F.normalize(a + 1e-9, dim=-1)):
        torch.testing.assert_close(embeddings.slerp(a, near, 0.4), a)
    x_axis = torch.tensor([[1.0, 0.0]])
    assert embeddings.slerp(x_axis, -x_axis, 0.5).isnan().all()


def test_noise_between_two_noises_is_noise() -> None:
    """As for DDIM's interpolations; the straight line would be too quiet."""
    a, b = drawn(2, 1, 50_000)
    assert embeddings.slerp(a, b, 0.5).std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.lerp(a, b, 0.5).std().item() == pytest.approx(math.sqrt(0.5), abs=0.02)


def test_a_text_difference_turns_an_image_towards_the_new_caption() -> None:
    image, old, new = F.normalize(drawn(3, 5, 8), dim=-1)
    direction = embeddings.text_difference(new, old)
    turned = embeddings.slerp(image, direction, 0.3)
    torch.testing.assert_close(direction.norm(dim=1), torch.ones(5).double())
    assert ((turned - image) * (new - old)).sum(1).min() > 0


def test_of_unpainted_draws_the_nearest_is_the_one_nearest_to_the_caption() -> None:
    draws, caption = F.normalize(drawn(6, 2, 8), dim=-1), F.normalize(drawn(6, 8, seed=1), dim=-1)
    best = embeddings.nearness(draws, caption, draws).argmax(1)
    assert torch.equal(best, (draws * caption[:, None]).sum(-1).argmax(1))


def test_axes_come_in_the_order_of_their_variance() -> None:
    spread = torch.tensor([0.1, 3.0, 0.5, 1.0, 0.0]).double()
    turn = torch.linalg.qr(drawn(5, 5, seed=3))[0]
    values = (drawn(4000, 5) * spread) @ turn.T + 7
    pca = embeddings.fit_pca(values, 4)
    found = embeddings.encode(pca, values).std(0)
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0, 0.5, 0.1]).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(pca.axes.T @ pca.axes, torch.eye(4).double())
    torch.testing.assert_close(embeddings.decode(pca, embeddings.encode(pca, values)), values)
    best = embeddings.fit_pca(values, 1)
    lost = (embeddings.decode(best, embeddings.encode(best, values)) - values).square().sum(1).mean()
    assert lost.item() == pytest.approx(1 + 0.25 + 0.01, rel=0.1)


def test_the_same_axes_are_found_whatever_the_order_of_the_embeddings() -> None:
    values = drawn(300, 6) * torch.arange(1, 7)
    again = embeddings.fit_pca(values.flip(0), 3)
    torch.testing.assert_close(embeddings.fit_pca(values, 3).axes, again.axes)
    with pytest.raises(ValueError, match="from 1 to the 6"):
        embeddings.fit_pca(values, 7)


@given(count=st.sampled_from([2, 16, 1024]), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_code_is_within_half_a_bucket(count: int, seed: int) -> None:
    pca = embeddings.fit_pca(drawn(200, 6, seed=seed), 4)
    values = embeddings.encode(pca, drawn(200, 6, seed=seed))
    codes = embeddings.to_buckets(values, pca.low, pca.high, count)
    assert codes.min() == 0
    assert codes.max() == count - 1
    back = embeddings.from_buckets(codes, pca.low, pca.high, count)
    half = (pca.high - pca.low) / count / 2
    assert ((back - values).abs() <= half * (1 + 1e-9)).all()
    assert torch.equal(embeddings.to_buckets(back, pca.low, pca.high, count), codes)
    beyond = embeddings.to_buckets(100 * values, pca.low, pca.high, count)
    assert beyond.min() >= 0
    assert beyond.max() < count
