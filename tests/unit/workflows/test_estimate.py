"""What tensors without content say a training needs is what real ones take."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core.stage import PairBatch, Trained
from dd_core.stages import build_stage
from dd_core.training import TrainState
from jobs.recipes import smoke
from workflows.estimate import Need, needs, size
from workflows.pipeline import in_order
from workflows.train_spec import TrainSpec

SPECS = [spec.but(batch_size=4) for spec in in_order(smoke.run().stages)]


@pytest.fixture(scope="module")
def needed() -> dict[str, Need]:
    return needs(SPECS, context_length=smoke.CONTEXT, run=Path("nowhere"))


@pytest.fixture(scope="module")
def real() -> dict[str, TrainState]:
    torch.manual_seed(0)
    made: dict[str, TrainState] = {}
    for spec in SPECS:
        parents = {role: Trained(*trained(named, made)) for role, named in spec.parents.items()}
        made[spec.name] = TrainState(build_stage(spec.stage, parents), spec.optimizer)
    return made


def trained(name: str, made: dict[str, TrainState]) -> Trained:
    spec = next(spec for spec in SPECS if spec.name == name)
    return Trained(spec.stage, made[name].average)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_checkpoints_gradients_and_activations_are_as_large_as_was_said(
    spec: TrainSpec, needed: dict[str, Need], real: dict[str, TrainState]
) -> None:
    state, need = real[spec.name], needed[spec.name]
    assert sum(size(tensor) for tensor in state.tensors().values()) == need.state
    assert sum(parameter.numel() for parameter in state.stage.model.parameters()) == need.parameters
    own = {tensor.untyped_storage().data_ptr() for tensor in state.stage.state_dict().values()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    side, most = spec.stage.image_size, 0
    for phase in state.stage.phases:
        kept.clear()
        batch = PairBatch(
            torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8),
            torch.full((4, smoke.CONTEXT), 49407),
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):  # noqa: SIM117
            with torch.autocast("cpu", torch.bfloat16):
                total = state.stage(batch, phase).total
        held = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
        most = max(most, held)
        if total.requires_grad:
            total.backward()
    assert sum(size(p.grad) for p in state.stage.parameters() if p.grad is not None) <= need.gradients
    assert 0.9 * need.activations <= most <= 1.02 * need.activations


def test_several_workers_share_the_batch_and_double_the_gradients(needed: dict[str, Need]) -> None:
    (clip, *_) = SPECS
    shared = needs([clip.but(num_workers=2)], context_length=smoke.CONTEXT, run=Path("nowhere"))["clip"]
    assert shared.gradients == 2 * needed["clip"].gradients
    assert shared.activations < 0.7 * needed["clip"].activations
    smaller = needs([clip.but(micro_batch_size=1)], context_length=smoke.CONTEXT, run=Path("nowhere"))["clip"]
    assert smaller.activations < shared.activations


def test_a_parent_that_is_nowhere_is_named() -> None:
    base = next(spec for spec in SPECS if spec.name == "base")
    with pytest.raises(ValueError, match="base: its clip 'clip' is neither a stage of the run nor a bundle"):
        needs([base], context_length=smoke.CONTEXT, run=Path("nowhere"))
