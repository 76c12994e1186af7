"""A run's graph is checked before any work, and its clock counts every start."""

import io
import itertools
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from pydantic import ValidationError
from rich.console import Console

from dd_core import sealed
from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.nets.network import PlainSpec
from dd_core.nets.prior import PriorNetSpec
from dd_core.nets.unet import UNetSpec
from dd_core.samplers import SamplingSpec
from dd_core.stage import Budget, OptimizerSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.prior import PriorSpec
from workflows import pipeline
from workflows.journal import JOURNAL, Journal
from workflows.pairs import PairsSpec
from workflows.pipeline import (
    Making,
    card,
    cascade_of,
    check_parents,
    clock,
    seconds_of,
    timed,
    watched,
)
from workflows.prepare import Prepared
from workflows.progress import StepBars
from workflows.run_spec import RunSpec, in_order
from workflows.storage import Home
from workflows.train_spec import TrainSpec, cpu_share
from workflows.training import inputs
from workflows.worker import threads

if TYPE_CHECKING:
    from workflows.stopping import Stopping
    from workflows.tracking import Tracked

NET = UNetSpec(width=8, channel_mult=(1,), attention_at=(), attention_in_middle=False, groups=4)
UNGUIDED = SamplingSpec(guidance_scale=1.0)


def stage(name: str, **parents: str) -> TrainSpec:
    return TrainSpec(
        name=name,
        stage=ChainSpec(net=PlainSpec(unet=NET), image_size=64),
        parents=parents,
        optimizer=OptimizerSpec(learning_rate=1e-3),
        budget=Budget(steps=2, checkpoint_every=1),
        batch_size=4,
    )


def run_spec(*stages: TrainSpec, hop: str = "a", sizes: tuple[int, ...] = (64,)) -> RunSpec:
    return RunSpec(
        name="r",
        pairs=PairsSpec(shards=("x.tar",), destination="d", sizes=sizes, context_length=8),
        stages=stages,
        cascade=CascadeSpec(
            name="c", hops=(HopSpec(stage=hop, how=UNGUIDED),), context_length=8, image_size=64
        ),
    )


def test_every_stage_comes_after_those_it_stands_on() -> None:
    stages = (stage("d", x="b", y="c"), stage("b", x="a"), stage("c", x="a"), stage("a"))
    assert [one.name for one in in_order(stages)] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ((stage("a", x="b"), stage("b", x="a")), {}, "in a circle: a, b"),
        ((stage("a"), stage("a")), {}, "two stages are named 'a'"),
        ((stage("a"),), {"hop": "bse"}, "no stage is named 'bse'; there are a"),
        (
            (stage("a"),),
            {"sizes": (32, 256)},
            r"'a' trains on images of 64 px, but pairs.sizes is \(32, 256\)",
        ),
    ],
)
def test_a_graph_that_cannot_be_trained_is_refused_by_name(
    stages: tuple[TrainSpec, ...], more: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        run_spec(*stages, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        *("cascade", "data", "embeddings", "evaluation", "evaluation-1a2b3c4d", "report", "total"),
        *("summary.json", "mlflow.db", "mark"),
    ],
)
def test_a_stage_does_not_take_the_place_of_what_a_run_keeps(name: str) -> None:
    with pytest.raises(ValidationError, match=f"a stage is named '{name}', .* rename it"):
        run_spec(stage(name), hop=name)
    assert run_spec(stage(f"{name[0]}-stage"), hop=f"{name[0]}-stage")


def test_a_parent_that_is_nowhere_is_named_before_any_work(tmp_path: Path) -> None:
    spec = run_spec(stage("a", clip="clap"))
    with pytest.raises(
        ValueError, match=r"a: its clip 'clap' is neither a trained stage .* train 'clap' first"
    ):
        check_parents(spec, tmp_path)
    with pytest.raises(ValueError, match="name a directory such as runs/demo/base/bundle"):
        check_parents(run_spec(stage("a", start="runs/demo/base")), tmp_path)
    with pytest.raises(ValueError, match="r has no stage 'base'; it has a"):
        spec.stage("base")


def sealed_bundle(directory: Path, parents: dict[str, str]) -> str:
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text(stage("a").stage.model_dump_json())
    (directory / "w").write_text(directory.parent.name)
    facts = {"step": 1, "images": 4, "seconds": 1.0, "parents": parents}
    return sealed.seal(directory, sealed.digests(directory), facts)


def test_a_bundle_from_elsewhere_that_gave_the_first_weights_is_not_in_the_cascade(tmp_path: Path) -> None:
    start = sealed_bundle(tmp_path / "other" / "base" / "bundle", {"clip": "a" * 64})
    run, bundles = tmp_path / "run", {"a": tmp_path / "run" / "a" / "bundle"}
    sealed_bundle(bundles["a"], {"start": start})
    spec = run_spec(stage("a", start=str(tmp_path / "other" / "base" / "bundle")))
    digest = cascade_of(spec, Home.of(run), bundles)
    assert sealed.verify(run / "cascade").digest == digest == cascade_of(spec, Home.of(run), bundles)
    assert [path.name for path in (run / "cascade").iterdir() if path.is_dir()] == ["a"]


def test_what_a_parent_from_elsewhere_stands_on_is_wanted_before_any_work(tmp_path: Path) -> None:
    other = tmp_path / "other"
    clip = sealed_bundle(other / "clip" / "bundle", {"start": "b" * 64})
    sealed_bundle(other / "draft" / "bundle", {"clip": clip})
    named = {role: str(other / role / "bundle") for role in ("clip", "draft")}
    run, whole = tmp_path / "run", stage("b", clip=named["clip"])
    lacking = run_spec(stage("a", draft=named["draft"]), stage("clip"))
    with pytest.raises(ValueError, match=f"a: its draft .* was trained on clip {clip[:12]}, which no"):
        check_parents(lacking, run)
    check_parents(run_spec(stage("a", draft=named["draft"]), whole), run)
    check_parents(run_spec(stage("a", start=named["draft"])), run)
    run.mkdir()
    (other / "clip").rename(run / "clip")
    check_parents(lacking, run)  # its own stage is that clip


def test_a_start_that_has_measured_the_embeddings_of_another_clip_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    clip = sealed_bundle(other / "clip" / "bundle", {})
    sealed_bundle(other / "prior" / "bundle", {"clip": clip})
    start = str(other / "prior" / "bundle")
    net = PriorNetSpec(width=16, layers=1, head_width=8, text_width=16, embedding_width=8, context_length=8)
    prior = stage("a", clip="clip", start=start).but(stage=PriorSpec(net=net))
    spec = run_spec(prior, stage("clip"), hop="clip")
    with pytest.raises(ValueError, match=f"a: its start .* measured the embeddings of clip {clip[:12]}, and"):
        check_parents(spec, run)
    elsewhere = prior.but(parents=prior.parents | {"clip": str(other / "clip" / "bundle")})
    check_parents(run_spec(elsewhere, stage("clip"), hop="clip"), run)
    assert not caplog.messages
    check_parents(run_spec(stage("a", clip="clip", start=start), stage("clip")), run)  # it measures none
    assert f"a: its start was told what clip {clip[:12]} says, and 'clip' is another" in caplog.text
    run.mkdir()
    (other / "clip").rename(run / "clip")
    check_parents(spec, run)  # the run's own is that clip


def test_a_start_within_the_run_that_has_measured_another_clip_is_refused_before_it_trains(
    tmp_path: Path,
) -> None:
    old = sealed_bundle(tmp_path / "old" / "clip" / "bundle", {"start": "b" * 64})
    sealed_bundle(tmp_path / "run" / "first" / "bundle", {"clip": old})
    sealed_bundle(tmp_path / "run" / "clip" / "bundle", {})  # trained anew since
    net = PriorNetSpec(width=16, layers=1, head_width=8, text_width=16, embedding_width=8, context_length=8)
    prior = stage("a", clip="clip", start="first").but(stage=PriorSpec(net=net))
    with pytest.raises(ValueError, match=f"its start 'first' has measured the embeddings of clip {old[:12]}"):
        inputs(prior, run=tmp_path / "run", data=tmp_path)


def test_a_stage_s_own_bundle_is_no_start_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed_bundle(tmp_path / "run" / "a" / "bundle", {})
    monkeypatch.chdir(tmp_path)
    for named in ("run/a/bundle", str(tmp_path / "run" / "a" / "bundle")):
        with pytest.raises(ValueError, match=r"its start .* is its own bundle, .* with start: a, or copy"):
            check_parents(run_spec(stage("a", start=named)), tmp_path / "run")
    check_parents(run_spec(stage("b", start="run/a/bundle"), hop="b"), tmp_path / "run")


@pytest.mark.parametrize("alone", [True, False], ids=["a stage alone", "the whole run"])
def test_a_run_is_told_its_settings_its_data_and_what_of_them_was_rejected(
    alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Prepared(Home.of(tmp_path / "prepared"), (), {"kept": 5, "rejected": 1}, "abc")
    monkeypatch.setattr(pipeline, "prepared_data", lambda *_: data)
    monkeypatch.setattr(pipeline, "made", lambda spec, _: tmp_path / spec.name)
    monkeypatch.setattr(pipeline, "cascade_of", lambda *_: "digest")
    journal = Journal(tmp_path / JOURNAL)
    tracked = cast("Tracked", SimpleNamespace(journal=journal))
    spec = run_spec(stage("a"))
    if alone:
        assert pipeline.run_stage(spec, "a", run=tmp_path, tracked=tracked) == tmp_path / "a"
    else:
        pipeline.run_pipeline(spec, run=tmp_path, tracked=tracked)
    lines = [json.loads(line)[:3] for line in journal.path.read_text().splitlines()]
    assert lines[0][2]["pairs.context_length"] == "8"
    assert ["artifact", "manifest.json", str(tmp_path / "prepared" / "manifest.json")] in lines
    assert ["dataset", "r", {"source": str(tmp_path / "prepared"), "digest": "abc"}] in lines
    assert ["metric", "data/kept", 5] in lines
    assert ["metric", "data/rejected", 1] in lines


def test_a_report_whose_last_lines_are_not_written_yet_does_not_end_the_telling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "PROGRESS_S", 0.0)
    one = stage("a").but(budget=Budget(steps=9, checkpoint_every=9))
    journal = Journal(tmp_path / "a" / JOURNAL)
    journal.log({"train/loss": 0.5, "time/samples_per_second": 2.0, "time/remaining_estimate": 3.0}, 1)
    journal.log({"train/loss": 0.25}, 2)
    stopping = cast("Stopping", None)
    plain = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO, "workflows"), StepBars(plain) as bars:
        making = Making(Home.of(tmp_path), cast("Prepared", None), cast("Tracked", None), 1, stopping, bars)
        with watched(one, making):
            pass
    assert "a: step 1 of 9, loss 0.5" in caplog.text


def test_the_card_of_a_cascade_names_its_data_without_a_signature() -> None:
    pairs = PairsSpec(shards=("https://h/a.tar?sig=hunter2", "b.tar"), destination="d", sizes=(64,))
    spec = run_spec(stage("a"))
    assert "Trained on https://h/a.tar, b.tar." in card(spec.model_copy(update={"pairs": pairs}), {})


def test_the_fingerprint_follows_what_the_result_depends_on_and_nothing_else() -> None:
    one = stage("a")
    same = one.but(num_workers=2, restarts=0, checkpoints_kept=5, budget=Budget(steps=2, checkpoint_every=2))
    elsewhere = same.but(use_gpu=True, resources={"memory_gib": 9, "labels": {"zone": "a"}})
    assert same.fingerprint("d", {}) == elsewhere.fingerprint("d", {}) == one.fingerprint("d", {})
    others = [
        one.but(seed=1).fingerprint("d", {}),
        one.but(budget=Budget(steps=3, checkpoint_every=1)).fingerprint("d", {}),
        one.but(stage=one.stage.but(crop=32)).fingerprint("d", {}),
        one.fingerprint("e", {}),
        one.fingerprint("d", {"clip": "e"}),
    ]
    assert len({one.fingerprint("d", {}), *others}) == 6


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match="batch_size 4 is no multiple of num_workers 3"):
        stage("a").but(num_workers=3)
    with pytest.raises(ValidationError, match="micro_batch_size 3 does not divide 4"):
        stage("a").but(micro_batch_size=3)


def test_the_clock_adds_up_over_starts_and_failures(tmp_path: Path) -> None:
    (tmp_path / "seconds.json").write_text(json.dumps({"base": 100.0, "data": 5.0}))
    assert seconds_of(tmp_path)["total"] == 105  # of a start that had no total of its own
    with pytest.raises(KeyError), timed(tmp_path, "base", "total"):
        raise KeyError
    seconds = seconds_of(tmp_path)
    assert 100 <= seconds["base"] < 110
    assert seconds["total"] == pytest.approx(seconds["base"] + 5, abs=0.002)
    assert [clock(value) for value in (7.4, 75, 3725)] == ["0:07", "1:15", "1:02:05"]
    (tmp_path / "seconds.json").write_text("")  # by a machine that lost its power
    assert seconds_of(tmp_path) == {"total": 0}


def test_the_clock_counts_what_goes_on_side_by_side_once_in_the_total(tmp_path: Path) -> None:
    names = [f"stage{number}" for number in range(8)]
    both = threading.Barrier(len(names), timeout=60)

    def work(name: str) -> None:
        with timed(tmp_path, name):
            both.wait()  # all are being timed at once
            time.sleep(0.5)

    with timed(tmp_path, "total"), ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(work, names))
    seconds = seconds_of(tmp_path)
    assert seconds.keys() == {*names, "total"}  # none has overwritten another's
    assert all(0.5 <= seconds[name] <= seconds["total"] for name in names)
    assert seconds["total"] < sum(seconds[name] for name in names)


def test_a_share_of_the_cpus_follows_the_spec_and_leaves_room_for_all_and_for_who_reads() -> None:
    for total, workers, at_once in itertools.product((1, 2, 3, 4, 16, 64), (1, 2, 3, 7), (1, 2, 3, 5)):
        share = cpu_share(total, workers, at_once)
        assert 0 < share <= 1
        assert at_once * workers * share <= total - 0.5 + 1e-9
    assert [cpu_share(2, 1, 1), cpu_share(2, 1, 2), cpu_share(2, 2, 2), cpu_share(64, 8, 4)] == [
        1.0,
        0.75,
        0.37,
        1.0,
    ]
    cores = len(os.sched_getaffinity(0))
    assert [threads(1, 1), threads(1, cores), threads(cores, 2)] == [cores, 1, 1]
