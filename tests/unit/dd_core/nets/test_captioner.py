"""The captioner: knows no later word, says nothing of padding, and hears the embedding."""

import math

import pytest
import torch
from torch import Tensor

from dd_core.nets.captioner import Captioner
from dd_core.text import tokens

WIDTH, LENGTH = 16, 8
CAPTIONS = ("a red circle", "a blue star", "two red stars", "a circle")


def told(*captions: str) -> Tensor:
    return torch.tensor(tokens(captions, LENGTH))


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    return Captioner(embedding_width=4, width=WIDTH, layers=1, head_width=8)


def nats(net: Captioner, seen: Tensor, embedding: Tensor, words: Tensor) -> Tensor:
    """By states that are the words themselves, which know nothing later."""
    return net(embedding, words[seen], seen, words)


def a_world() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    embedding = torch.nn.functional.normalize(torch.randn(len(CAPTIONS), 4), dim=-1)
    return told(*CAPTIONS), embedding, torch.randn(49408, WIDTH)


def test_a_word_is_not_known_before_it_is_written(captioner: Captioner) -> None:
    seen, embedding, words = a_world()
    other = seen.clone()
    other[0, 3], other[2, 2] = seen[2, 2], seen[0, 3]  # the same words in the batch, so the same compete
    one, two = (nats(captioner, batch, embedding, words) for batch in (seen, other))
    torch.testing.assert_close(one[0, :2], two[0, :2])
    assert not torch.allclose(one[0, 2:4], two[0, 2:4])


def test_the_end_is_written_and_nothing_behind_it(captioner: Captioner) -> None:
    found = nats(captioner, *a_world())
    assert [int(row.count_nonzero()) for row in found] == [4, 4, 4, 3]  # words and END


def test_who_knows_nothing_is_right_once_in_as_many_words_as_compete(captioner: Captioner) -> None:
    seen, embedding, words = a_world()
    found = nats(captioner, seen, embedding, torch.zeros_like(words))
    assert found[0, 0].item() == pytest.approx(math.log(len(seen.unique())))


def test_it_learns_to_write_from_the_embedding(captioner: Captioner) -> None:
    seen, embedding, words = a_world()
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        nats(captioner, seen, embedding, words).mean().backward()
        optimizer.step()
    right, wrong = (nats(captioner, seen, e, words).sum(1) for e in (embedding, embedding.roll(1, 0)))
    assert (right < 0.5).all()
    assert wrong.mean() > 3 * right.mean() + 1
