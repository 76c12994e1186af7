"""Captions without their padding are read as with it."""

import pytest
import torch

from dd_core.nets.clip import Clip
from dd_core.nets.packed import ROUND, packing
from dd_core.nets.prior import PriorNet
from tests.unit.serve import tiny

TOKENS = torch.zeros(4, 12, dtype=torch.long)
TOKENS[0, :2] = torch.tensor([49406, 49407])
TOKENS[1, :5] = torch.tensor([49406, 320, 700, 1100, 49407])
TOKENS[2, :9] = torch.tensor([49406, *range(500, 507), 49407])
TOKENS[3, :3] = torch.tensor([49406, 320, 49407])


def clip() -> Clip:
    torch.manual_seed(0)
    made = Clip(tiny.CLIP.net)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made.eval()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_rows_come_back_as_they_were_and_sizes_are_few(share: float) -> None:
    there = torch.rand(50, 17, generator=torch.Generator().manual_seed(0)) < share
    x = torch.randn(50, 17, 3)
    found, count = packing(there), int(there.sum())
    assert len(found.places) == len(set(found.places.tolist()))  # none twice: no gradient counts twice
    assert len(found.places) % ROUND == 0 or len(found.places) == 50 * 17
    assert count <= len(found.places) < count + ROUND
    assert torch.equal(found.pack(x)[:count], x[there])
    assert torch.equal(found.unpack(found.pack(x))[there], x[there])


def test_states_and_embeddings_are_those_of_the_whole_sequence() -> None:
    """`read` asks open_clip's own transformer, padding and all."""
    made = clip()
    whole, packed = made.read(TOKENS), made.read_packed(TOKENS)
    torch.testing.assert_close(packed.embedding, whole.embedding)
    assert packed.packing.there.sum(1).tolist() == [2, 5, 9, 3]
    assert packed.packing.there.shape == (4, 12)
    torch.testing.assert_close(packed.states[:19], whole.states[packed.packing.there])


def test_gradients_are_those_of_the_whole_sequence() -> None:
    made = clip()
    found = []
    packed, whole = made.read_packed(TOKENS), made.read(TOKENS)
    there = packed.packing.there
    for states, embedding in ((packed.states[:19], packed.embedding), (whole.states[there], whole.embedding)):
        made.zero_grad()
        (states.sin().sum() + embedding.square().mul(torch.arange(16)).sum()).backward()
        found.append([weight.grad.clone() for weight in made.parameters() if weight.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_prior_reads_a_caption_the_same_beside_longer_ones() -> None:
    towers = clip()
    spec = tiny.STAGES["prior"]
    net = PriorNet(spec.net)  # type: ignore[union-attr]
    together = net.read(towers.read_packed(TOKENS))
    for row in range(4):
        alone = net.read(towers.read_packed(TOKENS[row : row + 1]))
        torch.testing.assert_close(together[row : row + 1], alone)
    assert (together[1] - together[3]).abs().max() > 1e-3
