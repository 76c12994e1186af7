"""A hop paints in the numbers that it is told to: the weights of its UNet or DiT, and nothing else."""

import pytest
import torch

from dd_core.cascade import Hop, run
from dd_core.nets.dit import DiT
from dd_core.nets.unet import UNet
from dd_core.precision import Precision, dtype_of, has_bf16
from dd_core.samplers import SamplingSpec
from dd_core.stage import Trained
from dd_core.stages import StageSpec, load_hop
from dd_core.stages.base import BaseHop
from dd_core.stages.chain_hop import ChainHop
from dd_core.stages.consistency_hop import ConsistencyHop
from dd_core.stages.consistency_spec import ConsistencySpec, TeacherSpec
from dd_core.stages.upsampler import UpsamplerHop
from tests.unit.dd_core import test_chain as chains
from tests.unit.dd_core import test_guides as guides
from tests.unit.dd_core import test_stages as stages

FAST = SamplingSpec(sampler="ddim", num_steps=4, guidance_scale=1.0)
JUMPING = ConsistencySpec(base=chains.EDM, teacher=TeacherSpec(guidance_scale=1.0))
CHAINS = {name: spec for name, spec in chains.SPECS.items() if not spec.inpaints}


def chain(spec: chains.ChainSpec, precision: Precision) -> Hop:
    return load_hop(chains.trained(spec), chains.PARENTS, device="cpu", precision=precision)


def stage(spec: StageSpec, precision: Precision) -> Hop:
    weights = stages.stage(spec).model.state_dict()
    return load_hop(Trained(spec, weights), stages.parents(spec), device="cpu", precision=precision)


def halved(hop: Hop) -> set[str]:
    """Parameters in bfloat16."""
    painter = hop.base if isinstance(hop, ConsistencyHop) else hop
    assert isinstance(painter, BaseHop | ChainHop | UpsamplerHop)
    return {name for name, of in painter.model.named_parameters() if of.dtype == torch.bfloat16}


def of_painters(hop: Hop) -> set[str]:
    """Parameters of UNets and DiTs."""
    painter = hop.base if isinstance(hop, ConsistencyHop) else hop
    assert isinstance(painter, BaseHop | ChainHop | UpsamplerHop)
    return {
        f"{place}.{name}"
        for place, part in painter.model.named_modules()
        if isinstance(part, UNet | DiT)
        for name, _ in part.named_parameters()
    }


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_paints_nearly_the_same_in_bfloat16(name: str) -> None:
    how = FAST.but(guidance_scale=1.5 if CHAINS[name].told_dropout and name != "edm" else 1.0)
    state = chains.asked([3, 4], "a red circle", "a blue star")
    if name == "unclip":
        state = state._replace(image_embedding=torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    half, full = chain(CHAINS[name], "bf16"), chain(CHAINS[name], "fp32")
    assert halved(half) == of_painters(half)
    assert halved(half)
    assert not halved(full)
    one, other = run(half, state, how).image, run(full, state, how).image
    assert one is not None
    assert other is not None
    assert one.dtype == torch.float32
    assert 0 < (one - other).abs().mean() < 0.02


@pytest.mark.parametrize("spec", [stages.BASE, stages.UPSAMPLER], ids=["base", "upsampler"])
def test_a_base_and_an_upsampler_do_too(spec: StageSpec) -> None:
    state = stages.asked([3, 4], "a red circle", "a blue star")
    half, full = stage(spec, "bf16"), stage(spec, "fp32")
    assert halved(half) == of_painters(half)
    one, other = run(half, state, FAST).image, run(full, state, FAST).image
    assert one is not None
    assert other is not None
    assert 0 < (one - other).abs().mean() < 0.02


def test_a_consistency_model_does_too() -> None:
    trained = Trained(JUMPING, chains.trained(chains.EDM).weights)
    state, how = (
        chains.asked([3, 4], "", ""),
        SamplingSpec(sampler="consistency", num_steps=2, guidance_scale=1.0),
    )
    half, full = (load_hop(trained, {}, device="cpu", precision=kind) for kind in ("bf16", "fp32"))
    assert halved(half) == of_painters(half)
    one, other = run(half, state, how).image, run(full, state, how).image
    assert one is not None
    assert other is not None
    assert 0 < (one - other).abs().mean() < 0.02


@pytest.mark.parametrize("name", ["glide", "latent"])
def test_it_is_led_through_a_network_in_bfloat16(name: str) -> None:
    spec, how = {"glide": guides.GLIDE, "latent": guides.LATENT}[name], guides.how_of(classes=1.0)
    weights, made = chains.trained(spec), []
    for precision in ("bf16", "fp32"):
        hop = load_hop(weights, guides.PARENTS, device="cpu", precision=precision)
        made.append(run(hop, guides.asked(1), how).image)
    assert made[0] is not None
    assert made[1] is not None
    assert 0 < (made[0] - made[1]).abs().mean() < 0.05


def test_bfloat16_that_is_imitated_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    chain(chains.DDPM, "bf16")
    assert "cpu does not multiply bfloat16" in caplog.text


def test_auto_is_what_the_device_multiplies() -> None:
    cpu = torch.device("cpu")
    assert dtype_of(cpu, "auto") == (torch.bfloat16 if has_bf16(cpu) else torch.float32)
    assert bool(halved(chain(chains.DDPM, "auto"))) == has_bf16(cpu)
    assert dtype_of(torch.device("meta"), "auto") == torch.float32


def test_no_precision_is_float32() -> None:
    assert not halved(chains.hop(chains.DDPM))
