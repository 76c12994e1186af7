"""Edits without training keep what is known through every hop, and are refused before a network is asked."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core import edits
from dd_core.cascade import CascadeState, Hop
from dd_core.samplers import SamplingSpec, sample
from dd_core.stage import Trained
from dd_core.stages import build_stage, load_hop
from dd_core.stages.consistency_hop import ConsistencyHop
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.students import EDM, JUMPING, JUMPS, random_weights
from tests.unit.serve.tiny import STAGES

LUMA = torch.tensor(edits.LUMA).view(1, 3, 1, 1)


def upsampler() -> Hop:
    torch.manual_seed(0)
    spec = STAGES["upsampler"]
    return load_hop(Trained(spec, random_weights(build_stage(spec, {}).model)), {}, device="cpu")


def jumping() -> ConsistencyHop:
    torch.manual_seed(0)
    found = load_hop(Trained(JUMPING, random_weights(build_stage(EDM, {}).model)), {}, device="cpu")
    assert isinstance(found, ConsistencyHop)
    return found


ENLARGERS = {
    "upsampler": (upsampler, 64, SamplingSpec(num_steps=2, guidance_scale=1.0)),
    "chain": (
        lambda: chains.hop(chains.ENLARGING),
        16,
        SamplingSpec(sampler="ddim", num_steps=2, guidance_scale=1.0),
    ),
}


@pytest.mark.parametrize("name", ENLARGERS)
def test_what_enlarges_keeps_the_brightness_and_the_blocks_that_the_first_hop_kept(name: str) -> None:
    made, side, how = ENLARGERS[name]
    hop = made()
    picture = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    gray, coarse = (LUMA * picture).sum(1, keepdim=True), F.avg_pool2d(picture, 2)
    small = F.avg_pool2d(picture, 4)
    plain = CascadeState([1, 2], chains.told("a", "b"), image=small)

    def drawn(state: CascadeState) -> Tensor:
        draw = hop.start(state, how)
        return sample(draw.sampling, hop.denoiser(draw.rows))

    free = drawn(plain)
    coloured, enlarged = drawn(plain._replace(gray=gray)), drawn(plain._replace(coarse=coarse))
    torch.testing.assert_close((LUMA * coloured).sum(1, keepdim=True), gray, atol=1e-5, rtol=0)
    torch.testing.assert_close(F.avg_pool2d(enlarged, 2), coarse, atol=1e-5, rtol=0)
    assert not torch.allclose((LUMA * free).sum(1, keepdim=True), gray, atol=0.1)
    assert not torch.allclose(F.avg_pool2d(free, 2), coarse, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gray": torch.zeros(1, 1, 16, 16), "coarse": torch.zeros(1, 3, 4, 4)},
            "one edit at a time: gray and coarse",
        ),
        ({"coarse": torch.zeros(1, 3, 5, 5)}, "5 x 5 does not enlarge to 16 x 16"),
        ({"coarse": torch.zeros(1, 3, 4, 8)}, "8 x 4 does not enlarge to 16 x 16"),
        ({"coarse": torch.zeros(1, 1, 4, 4)}, "convert it to 3 channel"),
        ({"gray": torch.zeros(1, 3, 16, 16)}, "convert it to 1 channel"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_by_refuse_itself(change: dict[str, Tensor], message: str) -> None:
    """As the hops before it would work, and a queue would take it, for nothing."""
    state = CascadeState([1], chains.told("a"), label=torch.tensor([0]))._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        jumping().refuse(state, JUMPS)
