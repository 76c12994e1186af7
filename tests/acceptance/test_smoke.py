"""The smoke recipe through the real command line: tars, seven stages, bundle, HTTP, PNG; then again."""

import base64
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from dd_core import bundle, sealed
from jobs.cli import main
from tests.benchmarks.data import family
from tests.ray_head import free_ports
from tests.s3 import until
from workflows.journal import curves, entries
from workflows.report import SHEETS

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]
STAGES = ("clip", "autoencoder", "noised_clip", "draft", "base", "upsampler", "prior")
DRAWING = {"draft", "base", "prior"}
"""Of the stages those that the recipe has draw while they learn."""

SAVED = Path("runs", "smoke", "autoencoder", "checkpoints", "step-00000006", sealed.MANIFEST)


class Finished(NamedTuple):
    """A run that has been made and is being served."""

    here: Path
    """Where the command was given."""
    url: str
    port: int
    done: subprocess.CompletedProcess[str]
    """The second command: the first was killed."""
    saved_ns: int
    """When the first had written the checkpoint of `SAVED`."""
    seconds: float
    """Of both."""

    @property
    def directory(self) -> Path:
        return self.here / "runs" / "smoke"


RUN = (
    *("run", "--recipe", "smoke", "--set", "at_once=2"),
    *("--set", "shapes.pairs=96", "--set", "shapes.pairs_per_shard=48"),
)
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}
DDIFF = [sys.executable, "-m", "jobs.cli"]


def ddiff(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, in a directory of its own."""
    return subprocess.run(
        [*DDIFF, *words], cwd=here, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def killed_at_the_second_stage(here: Path) -> int:
    """Start the run, and take everything of it away at once when the second stage has saved itself."""
    with (here / "killed.log").open("w") as log:
        run = subprocess.Popen(
            [*DDIFF, *RUN],
            cwd=here,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    while not (here / SAVED).exists():
        assert run.poll() is None, (here / "killed.log").read_text()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return (here / SAVED).stat().st_mtime_ns


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    here = tmp_path_factory.mktemp("here")
    (port,) = free_ports(1)  # not one that is given to another while this is trained
    began = time.monotonic()
    saved = killed_at_the_second_stage(here)
    done = ddiff(here, *RUN, "--serve", "--port", str(port))
    try:
        assert done.returncode == 0, done.stderr
        seconds = time.monotonic() - began
        yield Finished(here, f"http://127.0.0.1:{port}", port, done, saved, seconds)
    finally:
        CliRunner().invoke(main, ["stop", "--run", str(here / "runs" / "smoke")])


def test_the_chain_runs_to_its_end_and_says_where_everything_is(
    run: Finished, record_property: Callable[[str, object], None]
) -> None:
    record_property("said", f"tars to PNG over HTTP, killed once: {run.seconds:.0f} s, the goal is 240 s")
    assert "Traceback" not in run.done.stderr
    for name in ("report.html", "cascade", run.url):
        assert name in run.done.stdout
    summary = json.loads((run.directory / "summary.json").read_text())
    assert summary["oracle"]["n"] == 8
    wanted = {"all", "one_object", "two_object", "unseen", "colour", "shape", "size", "place", "background"}
    assert wanted <= summary["oracle"].keys()
    assert {*STAGES, "data", "embeddings", "total"} <= summary["seconds"].keys()
    assert Path(run.here, summary["bundle"]).is_dir()
    assert "<h2>Pictures</h2>" in Path(run.here, summary["report"]).read_text()


def test_a_run_that_was_killed_goes_on_where_it_was(run: Finished) -> None:
    assert "clip: done before" in run.done.stderr
    assert (run.here / SAVED).stat().st_mtime_ns == run.saved_ns
    losses = curves(run.directory / "autoencoder" / "metrics.jsonl")["train/loss"]
    assert list(losses) == [4, 8, 12]


def test_the_cascade_holds_every_stage_and_names_its_parents_by_digest(run: Finished) -> None:
    seal = sealed.verify(run.directory / "cascade")
    digests = {name: sealed.verify(run.directory / name / "bundle").digest for name in STAGES}
    assert seal.facts["stages"] == digests
    for name in ("base", "prior", "noised_clip"):
        assert bundle.load(run.directory / name / "bundle").parents["clip"] == digests["clip"]


def test_no_file_of_the_cascade_can_run_code(run: Finished) -> None:
    names = {path.suffix for path in (run.directory / "cascade").rglob("*") if path.is_file()}
    assert names <= {".safetensors", ".json", ".md"}


def test_the_endpoint_paints_the_prompt_and_repeats_a_seed_to_the_byte(run: Finished) -> None:
    until(lambda: httpx.get(f"{run.url}/health/ready", timeout=120).status_code == 200)
    body = {"prompt": "a red circle", "seed": 5, "response_format": "b64_json"}
    replies = [httpx.post(f"{run.url}/v1/images/generations", json=body, timeout=120) for _ in range(2)]
    first, second = (base64.b64decode(reply.json()["data"][0]["b64_json"]) for reply in replies)
    assert Image.open(io.BytesIO(first)).size == (256, 256)
    assert first == second


def test_a_sample_without_a_server_is_the_same_however_many_are_asked_for(run: Finished) -> None:
    for seed, count, out in ((1, 3, "three"), (2, 1, "one")):
        words = ["--cascade", str(run.directory / "cascade"), "--seed", str(seed), "-n", str(count)]
        done = CliRunner().invoke(main, ["sample", "a red circle", *words, "--out", str(run.here / out)])
        assert done.exit_code == 0, done.stderr
    names = [path.name for path in sorted((run.here / "three").iterdir())]
    assert names == ["00000001.png", "00000002.png", "00000003.png"]
    one = (run.here / "one" / "00000002.png").read_bytes()
    assert (run.here / "three" / "00000002.png").read_bytes() == one
    text = Image.open(io.BytesIO(one)).text  # type: ignore[attr-defined]
    assert (text["prompt"], text["seed"]) == ("a red circle", "2")
    assert text["cascade"] == sealed.verify(run.directory / "cascade").digest


@pytest.mark.filterwarnings("ignore")  # MLflow's, of its own dependencies
def test_mlflow_has_a_run_for_the_pipeline_and_a_child_for_each_stage(run: Finished, tmp_path: Path) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415 seconds

    client = MlflowClient(f"sqlite:///{run.directory / 'mlflow.db'}")
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    children = {one.info.run_name: one for one in found if "mlflow.parentRunId" in one.data.tags}
    (parent,) = (one for one in found if one.info.run_name not in children)
    assert children.keys() == set(STAGES)
    assert {one.info.status for one in found} == {"FINISHED"}
    digest = sealed.verify(run.directory / "cascade").digest
    assert parent.data.params["name"] == "smoke"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {
        "images",
        "manifest.json",
        "report.html",
        "summary.json",
    }
    assert {*SHEETS} == pictures_of(client, parent.info.run_id)
    (version,) = client.search_model_versions()
    assert (version.name, version.run_id) == ("smoke", parent.info.run_id)
    assert version.source.startswith("file:")
    assert version.source.endswith("runs/smoke/cascade")
    for tags in (version.tags, parent.data.tags):
        assert tags["bundle_sha256"] == digest
    assert [*client.search_registered_models()[0].aliases] == ["current"]
    manifest = (run.directory / "data" / "prepared" / sealed.MANIFEST).read_text()
    kept = client.download_artifacts(parent.info.run_id, "manifest.json", str(tmp_path))
    assert Path(kept).read_text() == manifest
    for name, child in children.items():
        bundle_of = run.directory / name / "bundle"
        assert child.data.params["stage.kind"] == json.loads((bundle_of / "spec.json").read_text())["kind"]
        assert child.data.tags["bundle"].endswith(f"runs/smoke/{name}/bundle")
        assert child.data.tags["bundle_sha256"] == sealed.verify(bundle_of).digest
        assert [one.dataset.name for one in child.inputs.dataset_inputs] == ["prepared"]
        assert pictures_of(client, child.info.run_id) == ({"samples"} if name in DRAWING else set())


def pictures_of(client: Any, run_id: str) -> set[str]:
    """The names of the pictures that MLflow has of a run."""
    files = client.list_artifacts(run_id, "images")
    return {re.split(r"[%+]", Path(file.path).name)[0] for file in files}


def test_what_is_done_is_not_done_again(run: Finished) -> None:
    weights = [run.directory / name / "bundle" / "weights.safetensors" for name in STAGES]
    before = [path.stat().st_mtime_ns for path in weights]
    again = ddiff(run.here, *RUN)
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in weights] == before
    for name in STAGES:
        assert f"{name}: done before" in again.stderr
    assert not (run.directory / "endpoint.json").exists()  # it replaced the one that was left running


@pytest.mark.fault
@pytest.mark.parametrize(
    "file", ["base/weights.safetensors", "base/spec.json", "clip/manifest.json", "cascade.json", "README.md"]
)
def test_a_flipped_bit_is_refused_with_the_file_named(run: Finished, file: str, tmp_path: Path) -> None:
    shutil.copytree(run.directory / "cascade", tmp_path / "cascade")
    path = tmp_path / "cascade" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = CliRunner().invoke(main, ["verify", str(tmp_path / "cascade")])
    assert done.exit_code == 4
    assert file in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.fault
def test_a_cascade_with_a_missing_file_is_neither_sampled_nor_served(run: Finished, tmp_path: Path) -> None:
    shutil.copytree(run.directory / "cascade", tmp_path / "cascade")
    (tmp_path / "cascade" / "upsampler" / "weights.safetensors").unlink()
    where = ["--cascade", str(tmp_path / "cascade")]
    for words in (["sample", "a red circle", "--out", str(tmp_path / "out")], ["serve"]):
        done = CliRunner().invoke(main, [*words, *where])
        assert done.exit_code == 4
        assert "upsampler/weights.safetensors" in done.stderr
    assert not (tmp_path / "out").exists()


def training_on(here: Path, stage: Path) -> subprocess.Popen[bytes]:
    """A run whose prior trains for long, once it has saved a step that it had not before.

    What is saved before it begins may be of workers whose driver was killed, and who are about to end.
    """
    words = [*DDIFF, *RUN, "--set", "stages.prior.budget.steps=100000"]
    said = here / "stopped.log"
    with said.open("w") as log:
        process = subprocess.Popen(words, cwd=here, env=ENVIRONMENT, stdout=log, stderr=log)
    before = None
    while before is None or not saved_steps(stage) - before:
        assert process.poll() is None, said.read_text()
        if before is None and "prior: 100,000 steps of" in said.read_text():
            before = saved_steps(stage)
        time.sleep(0.1)
    return process


def saved_steps(stage: Path) -> set[str]:
    """Names of the checkpoints of a stage that are whole."""
    return {path.parent.name for path in (stage / "checkpoints").glob(f"step-*/{sealed.MANIFEST}")}


@pytest.mark.fault
def test_a_run_whose_driver_is_killed_alone_goes_on_and_one_told_to_stop_saves_itself_and_ends_with_code_6(
    run: Finished,
) -> None:
    """Neither leaves a process, and no worker of the killed one writes into what goes on."""
    stage = run.directory / "prior"
    shutil.rmtree(stage)
    process = training_on(run.here, stage)
    orphans = family(process.pid)
    process.kill()
    process.wait()
    kept = int(max(saved_steps(stage))[5:])
    process = training_on(run.here, stage)
    started = orphans + family(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(900) == 6
    finally:
        process.kill()
        process.wait()
    told = [one.step for one in entries(stage / "metrics.jsonl") if one.name == "train/loss"]
    again = [at for at, (before, step) in enumerate(itertools.pairwise(told), 1) if step <= before]
    assert len(again) <= 1  # what the killed one told beyond its last checkpoint
    assert all(told[at] > kept for at in again)
    assert [*dict.fromkeys(told)] == [*range(told[0], told[-1] + 1, told[0])]
    said = (run.here / "stopped.log").read_text()
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if line.startswith("ddiff: "))
    assert line == said.splitlines()[-1]
    newest = max((stage / "checkpoints").iterdir())
    assert f"prior: stopped at step {int(newest.name[5:]):,} of 100,000; run the same command" in line
    sealed.verify(newest)
    end = time.monotonic() + 300
    while left := [pid for pid in started if alive(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.2)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.fault
def test_a_gradient_that_stays_not_finite_ends_a_training_in_one_line_with_code_5(run: Finished) -> None:
    rate = (
        "--set",
        "stages.upsampler.optimizer.learning_rate=1e30",
    )  # what was trained at another goes aside
    done = ddiff(run.here, "train", "upsampler", *RUN[1:], *rate)
    assert done.returncode == 5, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("ddiff: "))
    assert line == done.stderr.splitlines()[-1]
    assert line.startswith("ddiff: upsampler: gradient not finite 4 times in a row")
    assert line.endswith("lower optimizer.learning_rate")
    assert not (run.directory / "upsampler" / "bundle").exists()
