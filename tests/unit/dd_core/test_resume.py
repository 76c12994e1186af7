"""A training of any kind of stage that is cut and goes on ends as the unbroken one, to the last bit."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from dd_core import checkpoint
from dd_core.nets.classifier import ClassifierSpec as ClassifierNetSpec
from dd_core.stage import Budget, OptimizerSpec, PairBatch, Trained
from dd_core.stages import StageSpec, build_stage
from dd_core.stages.classifier import ClassifierSpec
from dd_core.stages.noised_clip import NoisedClipSpec
from dd_core.training import TrainState, train
from tests.unit.dd_core import (
    students,
    test_autoencoder,
    test_autoregressive_prior,
    test_causal_prior,
    test_chain,
    test_stages,
)
from tests.unit.dd_core.test_stages import CLIP

CAUSAL, BARE = test_causal_prior.SPEC, test_chain.BARE
SPECS: list[StageSpec] = [
    CLIP,
    test_autoencoder.SPEC.but(disc_start=2),  # its second player joins between the cuts
    NoisedClipSpec(net=CLIP.net),
    ClassifierSpec(net=ClassifierNetSpec(unet=students.UNET, image_size=16, classes=2)),
    test_stages.DRAFT.but(measured_images=6),
    test_stages.BASE,
    BARE.but(net=BARE.net.but(unet=BARE.net.unet.but(dropout=0.1))),
    students.SPEC,
    students.ALONE,
    test_stages.UPSAMPLER,
    test_stages.PRIOR.but(net=test_stages.PRIOR.net.but(measured_images=6)),
    CAUSAL.but(measured_images=6, net=CAUSAL.net.but(context_length=test_chain.LENGTH)),
    test_autoregressive_prior.SPEC.but(measured_images=12),
]
OPTIMIZER = OptimizerSpec(learning_rate=3e-3, precision="fp32", warmup_steps=2, ema_images=30)
BUDGET = Budget(steps=4, checkpoint_every=1)


def test_no_kind_of_stage_is_left_out() -> None:
    union, _ = get_args(StageSpec)
    assert {type(spec) for spec in SPECS} == set(get_args(union))


@pytest.fixture(scope="module")
def parents() -> dict[str, Trained]:
    """What any of them stands on."""
    found = students.on_a_base()
    drawn = students.random_weights(build_stage(test_stages.DRAFT, {"clip": found["clip"]}).model)
    return found | {"draft": Trained(test_stages.DRAFT, drawn)}


@pytest.fixture(scope="module")
def wide() -> Trained:
    """A CLIP whose widths are all equal, as a causal prior needs it."""
    return Trained(test_chain.CLIP, students.random_weights(build_stage(test_chain.CLIP, {}).model))


def pairs(size: int, first: int) -> Iterator[PairBatch]:
    """Four pairs for each step from the first on, the same whoever asks; to measure six takes two steps."""
    for number in itertools.count(first):
        generator = torch.Generator().manual_seed(number)
        label = torch.randint(0, 2, (4,), generator=generator)
        image = torch.randint(0, 256, (4, 3, size, size), generator=generator, dtype=torch.uint8)
        yield PairBatch(image, students.told("a red square", "a blue square")[label], label)


def begun(spec: StageSpec, parents: dict[str, Trained], seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    return TrainState(build_stage(spec, {role: parents[role] for role in ("clip", *spec.needs)}), OPTIMIZER)


def steps(state: TrainState, size: int, until: int) -> list[float]:
    """The losses of the steps up to this one."""
    reports = train(state, pairs(size, state.step), optimizer=OPTIMIZER, budget=BUDGET)
    return [report.read()["loss"] for report in itertools.islice(reports, until - state.step)]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_cut_and_resumed_is_the_unbroken_run_to_the_last_bit(
    spec: StageSpec, parents: dict[str, Trained], wide: Trained, tmp_path: Path
) -> None:
    if spec.kind == "causal_prior":
        parents = {"clip": wide}
    whole = begun(spec, parents)
    curve = []
    for until in (1, 3, 4):
        curve += steps(whole, spec.image_size, until)
        checkpoint.write(tmp_path / str(until), whole.tensors(), {"step": whole.step, "images": whole.images})
    wanted = whole.tensors()
    for cut in (1, 3):
        resumed = begun(spec, parents, seed=99)  # a new process knows nothing
        tensors = resumed.tensors()
        resumed.restored(tensors, **checkpoint.read(tmp_path / str(cut), tensors))
        assert steps(resumed, spec.image_size, 4) == curve[cut:]
        found = resumed.tensors()
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
