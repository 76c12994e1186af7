"""Fit of pictures and captions: what is known in closed form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dd_core.metrics import cosines, found_own, mean_of, others


def units(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_picture_that_says_its_caption_is_found_and_one_that_says_anothers_is_not() -> None:
    captions, drawn = units(40, 16), others(40, 40, seed=0)
    assert cosines(captions, captions).allclose(torch.ones(40, dtype=torch.float64))
    assert found_own(captions, captions, drawn).all()
    assert not found_own(captions.roll(1, 0), captions, drawn).any()
    assert cosines(-captions, captions).allclose(-torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize("among", [2, 5, 50])
def test_by_chance_one_of_so_many_is_found(among: int) -> None:
    count = 4_000
    hits = found_own(units(count, 8, 1), units(count, 8, 2), others(count, among, seed=3)).double().mean()
    chance = 1 / among
    assert float(hits) == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / count))


def test_a_judge_that_tells_no_captions_apart_finds_none() -> None:
    same = units(1, 8).expand(10, 8)
    assert not found_own(units(10, 8), same, others(10, 5, seed=0)).any()


def test_others_are_never_its_own_nor_twice_the_same_and_are_a_function_of_the_seed() -> None:
    drawn = others(30, 12, seed=7)
    assert drawn.shape == (30, 11)
    for row, theirs in enumerate(drawn.tolist()):
        assert len({*theirs, row}) == 12
        assert set(theirs) <= set(range(30))
    assert torch.equal(drawn, others(30, 12, seed=7))
    assert not torch.equal(drawn, others(30, 12, seed=8))
    assert {n for row in others(30, 30, seed=0).tolist() for n in row} == set(range(30))
    with pytest.raises(ValueError, match="5 of 4 captions cannot be compared"):
        others(4, 5, seed=0)


def test_the_interval_of_a_mean_holds_the_true_one_nineteen_times_of_twenty() -> None:
    samples = torch.rand(4_000, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [mean_of(one) for one in samples]
    assert np.mean([mean.low < 0.5 < mean.high for mean in means]) == pytest.approx(0.95, abs=0.015)
    assert mean_of(torch.tensor([0.0, 1.0])).value == 0.5
