"""Who hears a negative prompt: whoever reads captions and has learned to guide itself."""

import pytest
import torch

from dd_core.cascade import CascadeState, requested
from dd_core.samplers import SamplingSpec
from dd_core.stages.asking import hears_negative, led_away
from dd_core.stages.chain_hop import ChainHop
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core.students import JUMPING, SPEC
from tests.unit.serve.tiny import STAGES


@pytest.mark.parametrize("name", chains.SPECS)
def test_a_chain_hears_a_negative_prompt_just_where_that_changes_what_guidance_leads_away_from(
    name: str,
) -> None:
    spec = chains.SPECS[name]
    how = chains.how_of(spec)
    if how.guidance_scale == 1:
        assert not led_away(spec, how)
        return
    hop = chains.hop(spec)
    assert isinstance(hop, ChainHop)

    def asked(*negatives: str) -> CascadeState:
        state = requested(["a star"], [1], chains.LENGTH, negatives=negatives)
        side = spec.image_size // spec.factor
        small = torch.zeros(1, 3, side, side)
        return state._replace(label=torch.tensor([0]), image=small)

    told = [hop.rows(state, how).null for state in (asked(), asked("a red box"))]
    same = all(
        one is other or torch.equal(one, other)
        for one, other in zip(*told, strict=True)
        if one is not None and other is not None
    )
    assert led_away(spec, how) == hears_negative(spec) == (not same)
    assert not led_away(spec, how.but(guidance_scale=1.0))


def test_bases_priors_and_what_is_distilled_from_them_hear_it_and_upsamplers_do_not() -> None:
    heard = {name for name, spec in STAGES.items() if hears_negative(spec)}
    assert heard == {"prior", "base"}
    assert hears_negative(SPEC)
    assert not hears_negative(JUMPING)
    assert not led_away(SPEC, SamplingSpec(guidance_scale=1.0))
