"""Stages that train side by side are, to the bit, those that were trained one after the other."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dd_core import sealed
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.network import PlainSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.training import DivergedError
from tests.faults.test_resume import SHARD
from tests.prepared import write_prepared
from tests.unit.dd_core.test_checkpoint_ranks import NET
from tests.when import when
from workflows.journal import curves, entries
from workflows.pairs import PairsSpec
from workflows.pipeline import all_made, seconds_of, timed
from workflows.prepare import Prepared
from workflows.run_spec import RunSpec
from workflows.storage import Home
from workflows.tracking import Tracked, tracked
from workflows.train_spec import TrainSpec
from workflows.training import PreemptedError, train_stage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.fault,
    pytest.mark.timeout(3000),
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # Ray's, of itself
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
STEPS = 150
UNGUIDED = SamplingSpec(guidance_scale=1.0)


def stage(name: str, seed: int, **more: object) -> TrainSpec:
    return TrainSpec(
        name=name,
        stage=ChainSpec(net=PlainSpec(unet=NET.but(image_channels=0)), image_size=32, crop=16),
        optimizer=OptimizerSpec(learning_rate=1e-3, precision="fp32"),
        budget=Budget(steps=STEPS, checkpoint_every=50, report_every=1),
        batch_size=8,
        seed=seed,
    ).but(**more)


SPEC = RunSpec(
    name="r",
    pairs=PairsSpec(shards=("x.tar",), destination="d", sizes=(32,), context_length=8),
    stages=(stage("last", 3, parents={"start": "one"}), stage("one", 1), stage("other", 2)),
    at_once=2,
    cascade=CascadeSpec(
        name="c", hops=(HopSpec(stage="last", how=UNGUIDED),), context_length=8, image_size=32
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    home = Home.of(write_prepared(tmp_path_factory.mktemp("d") / "prepared", files=3, size=32))
    return Prepared(home, tuple(home.names()), {}, "d" * 64)


@pytest.fixture(scope="module")
def alone(local_ray: None, data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the two that begin together, trained one after the other on as many threads."""
    run = tmp_path_factory.mktemp("alone")
    for name in ("one", "other"):
        train_stage(SPEC.stage(name), run=run, data=data.home, at_once=SPEC.at_once)
    return run


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[Tracked]:
    with tracked(tmp_path / "run") as found:
        yield found


def steps_of(run: Path, name: str) -> list[int]:
    return list(curves(run / name / "metrics.jsonl").get("train/loss", {}))


def statuses(run: Path, name: str) -> list[str]:
    """What the journal says of how a stage stood."""
    return [entry.value for entry in entries(run / name / "metrics.jsonl") if entry.kind == "status"]


def furthest(run: Path) -> int:
    """Steps of the one of the two that has done more; the other may still be starting."""
    return max(max(steps_of(run, name), default=0) for name in ("one", "other"))


def assert_same(run: Path, other: Path) -> None:
    """To the last bit: averaged weights, and the losses on the way."""
    for name in ("one", "other"):
        ours, theirs = (load_file(path / name / "bundle" / "weights.safetensors") for path in (run, other))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        assert (
            curves(run / name / "metrics.jsonl")["train/loss"]
            == (curves(other / name / "metrics.jsonl")["train/loss"])
        )


def test_two_stages_side_by_side_stopped_by_sigterm_and_continued_are_those_trained_one_by_one(
    alone: Path, data: Prepared, tracking: Tracked, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    sigterm = when(lambda: furthest(run) >= 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = rf"(one|other): stopped at step \d+ of {STEPS}; run the same"
    with sigterm, pytest.raises(PreemptedError, match=stopped):
        all_made(SPEC, Home.of(run), data, tracking)
    assert signal.getsignal(signal.SIGTERM) is before
    for name in ("one", "other"):  # each saved what it had
        newest = max((run / name / "checkpoints").iterdir())
        assert newest.name == f"step-{max(steps_of(run, name)):08d}"
        assert 1 <= max(steps_of(run, name)) < STEPS
        assert not (run / name / "stop").exists()
    assert not (run / "last" / "checkpoints").exists()  # not begun

    with timed(run, "total"):
        bundles = all_made(SPEC, Home.of(run), data, tracking)
    assert list(bundles) == ["one", "last", "other"]
    assert_same(run, alone)
    parents = sealed.verify(run / "last" / "bundle").facts["parents"]
    assert parents == {"start": sealed.verify(run / "one" / "bundle").digest}
    assert {"one", "other", "last", "total"} <= seconds_of(run).keys()


def test_a_gradient_that_stays_not_finite_reaches_no_checkpoint_and_stops_those_beside_it_saved(
    data: Prepared, tracking: Tracked, tmp_path: Path
) -> None:
    run, often = tmp_path / "run", Budget(steps=10**6, checkpoint_every=1, report_every=1)
    long = stage("other", 2, budget=often.but(checkpoint_every=10**6))
    heat = OptimizerSpec(learning_rate=1e20, grad_clip=1e20, precision="fp32")
    hot = stage("one", 1, optimizer=heat, budget=often)
    spec = SPEC.but(stages=(hot, long, SPEC.stage("last").but(parents={"start": "other"})))
    with pytest.raises(DivergedError, match=r"one: gradient not finite 4 times in a row.*lower"):
        all_made(spec, Home.of(run), data, tracking)
    shards = list((run / "one" / "checkpoints").glob(f"*/{SHARD}"))
    assert shards
    for path in shards:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert not (run / "one" / "bundle").exists()
    stopped = max(steps_of(run, "other"), default=0)
    newest = max((run / "other" / "checkpoints").iterdir())
    assert newest.name == f"step-{stopped:08d}"
    assert statuses(run, "one")[-1] == "FAILED"
    assert statuses(run, "other")[-1] == "KILLED"
    assert not (run / "last").exists()  # not begun
