"""Whitened embeddings: every coordinate as loud as the others, nothing lost on the way there and back."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.nets.whitening import Whitening

LOUD = torch.cat([torch.ones(4), torch.full((12,), 0.03)])
"""Directions of a sphere as a CLIP of minutes uses them: few loud, many in a whisper."""


def embeddings(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(7)))
    return F.normalize(torch.randn(count, 16, generator=generator) * LOUD @ turned.T + 0.1, dim=-1)


def measured(count: int = 4_096) -> Whitening:
    whitening = Whitening(16, count)
    for part in embeddings(count).split(64):
        whitening.look(part)
    assert whitening.ready
    return whitening


def test_loud_and_quiet_directions_become_coordinates_of_like_size() -> None:
    raw, white = embeddings(4_096, seed=1), measured()(embeddings(4_096, seed=1))
    deviations = torch.linalg.eigvalsh(torch.cov(raw.T)).clamp(min=0).sqrt()
    assert deviations[-1] / deviations[1] > 20  # the length of unit vectors costs them one direction
    assert white.mean(0).abs().max() < 0.06
    assert 0.3 < white.std(0)[:-1].min() < white.std(0).max() < 1.1


def test_there_and_back_is_the_same_embedding() -> None:
    whitening, there = measured(), embeddings(64, seed=2)
    torch.testing.assert_close(whitening.back(whitening(there)), there, atol=2e-6, rtol=0)


def test_it_is_whitened_in_float32_where_the_network_runs_in_bfloat16() -> None:
    whitening, there = measured(), embeddings(64, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        white = whitening(there)
        again = whitening.back(white)
    assert torch.equal(white, whitening(there))
    assert torch.equal(again, whitening.back(white))


def test_what_it_measures_does_not_depend_on_how_it_comes_and_settles() -> None:
    whole, parts = Whitening(16, 256), measured(256)
    whole.look(embeddings(256))
    torch.testing.assert_close(whole(embeddings(8)), parts(embeddings(8)), atol=1e-4, rtol=0)
    before = parts(embeddings(8))
    parts.look(torch.randn(64, 16))
    assert torch.equal(parts(embeddings(8)), before)


@pytest.mark.parametrize("training", [True, False])
def test_it_looks_in_training_alone_and_knows_when_it_has_seen_enough(training: bool) -> None:
    whitening = Whitening(16, 100).train(training)
    whitening.look(embeddings(64))
    assert not whitening.ready
    whitening.look(embeddings(64))
    assert whitening.ready == training


def test_fewer_embeddings_than_directions_leave_no_coordinate_without_bound() -> None:
    whitening = measured(8)
    assert whitening(embeddings(64, seed=3)).isfinite().all()
    assert whitening.scale.min() > 0.01
