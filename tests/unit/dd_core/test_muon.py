"""Muon's step is orthogonal, in whatever numbers the device multiplies, and is that of torch's."""

import pytest
import torch
from torch import nn, optim

from dd_core import muon
from dd_core.muon import Muon, orthogonal
from dd_core.nets.network import PlainSpec
from dd_core.nets.unet import UNetSpec
from dd_core.optimizers import hidden_weights, optimizers_of
from dd_core.stage import OptimizerSpec, Trained
from dd_core.stages import build_stage
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.draft import DraftSpec
from tests.unit.serve import tiny

SHAPES = [(64, 64), (96, 32), (32, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [False, True])
def test_the_step_keeps_directions_and_levels_their_strengths(
    shape: tuple[int, int], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "has_bf16", lambda device: half)
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    strengths = torch.linspace(1, 0.05, min(shape))
    found = orthogonal(u @ strengths.diag() @ v)
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    levelled = u.T @ found.float() @ v.T
    assert 0.6 < levelled.diag().min() <= levelled.diag().max() < 1.25
    assert (levelled - levelled.diag().diag()).abs().max() < (0.05 if half else 1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_twenty_steps_are_those_of_torch(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's is in bfloat16: to the bit in the same numbers, to its rounding in float32."""
    monkeypatch.setattr(muon, "has_bf16", lambda device: half)
    torch.manual_seed(0)
    firsts = [torch.randn(shape) for shape in SHAPES]
    mine, theirs = ([nn.Parameter(first.clone()) for first in firsts] for _ in range(2))
    ours = Muon(mine, 0.02, weight_decay=0.3)
    peer = optim.Muon(theirs, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step()
        peer.step()
    gaps = [(a - b).norm() / (a - first).norm() for a, b, first in zip(mine, theirs, firsts, strict=True)]
    assert max(gaps) == 0 if half else max(gaps) < 0.02


@pytest.mark.parametrize("wide", [False, True])
def test_a_kernel_is_stepped_as_the_matrix_of_its_rows(wide: bool) -> None:
    torch.manual_seed(0)
    first = torch.randn((8, 4, 3, 3) if wide else (64, 2, 3, 3)).to(memory_format=torch.channels_last)
    kernel, matrix = nn.Parameter(first.clone()), nn.Parameter(first.flatten(1).clone())
    kernel.grad = torch.randn(first.shape)
    matrix.grad = kernel.grad.flatten(1).clone()
    for weight in (kernel, matrix):
        Muon([weight], 0.1).step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)
    assert not torch.equal(kernel, first)


def test_muon_steps_what_is_hidden_and_adamw_what_enters_leaves_and_modulates() -> None:
    unet = UNetSpec(
        width=8, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=8, groups=4
    )
    stage = build_stage(ChainSpec(net=PlainSpec(unet=unet)), {})
    names = {weight: name.removeprefix("model.network.") for name, weight in stage.named_parameters()}
    kernels = {names[weight] for weight in hidden_weights(stage, "muon_unet") if weight.ndim == 4}
    matrices = {names[weight] for weight in hidden_weights(stage, "muon_unet") if weight.ndim == 2}
    assert "down.0.blocks.0.residual.conv_in.weight" in kernels
    assert "middle_out.conv_out.weight" in kernels
    assert "up.0.grow.conv_in.weight" in kernels
    assert not {"stem.weight", "out.weight"} & kernels
    places = ("down.1.blocks.0", "middle", "up.0.blocks.0")
    assert {f"{place}.attention.{part}.weight" for place in places for part in ("qkv", "out")} <= matrices
    assert not any("level" in name for name in matrices)
    assert {names[weight] for weight in hidden_weights(stage, "muon")} == matrices
    assert not hidden_weights(stage, "adamw")
    found = optimizers_of(stage, "model", OptimizerSpec(algorithm="muon_unet", learning_rate=1e-3))
    counts = [sum(len(group["params"]) for group in one.param_groups) for one in found.values()]
    assert list(found) == ["muon", "adamw"]
    assert counts == [len(kernels | matrices), len(names) - len(kernels | matrices)]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("draft", {"trunk.2", "coarse", "fine", "out"}),
        ("prior", {"text_in", "caption_in", "found", "sigma_in.2", "noised_in"}),
    ],
)
def test_a_network_that_turns_vectors_into_others_says_which_layers_muon_steps(
    name: str, hidden: set[str]
) -> None:
    clip = Trained(tiny.STAGES["clip"], build_stage(tiny.STAGES["clip"], {}).model.state_dict())
    spec = tiny.STAGES["prior"] if name == "prior" else DraftSpec(embedding_width=16, width=8, image_size=16)
    stage = build_stage(spec, {"clip": clip})
    prefix = "model.network." if name == "prior" else "model."
    names = {weight: key.removeprefix(prefix) for key, weight in stage.named_parameters()}
    blocks = hidden_weights(stage, "muon")
    found = {names[weight].removesuffix(".weight") for weight in hidden_weights(stage, "muon_named") - blocks}
    assert found == hidden
    assert not any(names[weight].removesuffix(".weight") in hidden for weight in blocks)
    assert not hidden_weights(stage, "adamw")


def test_in_a_stem_of_convolutions_muon_steps_all_but_the_one_that_sees_pixels() -> None:
    clip = tiny.CLIP.but(net=tiny.CLIP.net.but(stem="convolutions"))
    stage = build_stage(clip, {})
    kernels = {name for name, weight in stage.named_parameters() if weight.ndim == 4}
    assert len(kernels) == 4
    hidden = hidden_weights(stage, "muon_named")
    found = {name for name, weight in stage.named_parameters() if weight in hidden and weight.ndim == 4}
    assert kernels - found == {"model.towers.visual.conv1.0.weight"}


def test_a_matrix_without_a_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    algorithm = Muon([weight], 0.1)
    algorithm.step()
    assert torch.equal(weight, torch.ones(4, 4))
    assert not algorithm.state[weight]


def test_a_closure_is_called_before_the_step() -> None:
    weight = nn.Parameter(torch.eye(4))

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert Muon([weight], 0.1).step(closure) == 4
    assert weight.diag().max() < 1
