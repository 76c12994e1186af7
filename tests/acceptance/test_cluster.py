"""The smoke chain on a cluster, submitted from outside and put on the air there: a driver and a node are
killed, and the run is one.

A head and two nodes that share nothing but an S3 store and an MLflow server with users, each with a
folder, and where the rights are there an address, of its own (tests/cluster.py).
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from jobs import dashboard
from jobs.cli import main
from jobs.job_log import MOST_LINES
from serve import code
from tests.cluster import CANARIES, ZONES, TestCluster, cluster, kill_node, postgres_at
from tests.s3 import KEYS, free_port
from workflows import storage
from workflows.storage import Home

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.fault,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore"),  # MLflow's and botocore's, of themselves
    pytest.mark.skipif(postgres_at() is None, reason="PostgreSQL is not installed; `make servers` brings it"),
]
ROOT = Path(__file__).parents[2]
STAGES = ("clip", "autoencoder", "noised_clip", "draft", "base", "upsampler", "prior")
LONG = ("clip", "base")
"""Stages that are long enough to be hit."""
BOUND = "draft"
"""A stage that asks for nodes by their labels."""
STEPS, BEFORE, SAVED = 100, 20, 18
"""Of such a stage: its budget, how many are done when it is hit, and after how many it is saved."""
CHANGES = [
    "at_once=2",
    *(
        f"stages.{name}.{field}"
        for name in STAGES
        for field in ("num_workers=2", "resources.spread=true", "resources.cpus=0.25")
    ),  # so that each finds room on both nodes beside another one and its readers
    f"stages.{BOUND}.resources.labels.zone=in({', '.join(ZONES)})",
    *(f"stages.{name}.budget.{field}" for name in LONG for field in (f"steps={STEPS}", "report_every=5")),
    *(f"stages.{name}.budget.checkpoint_every={SAVED}" for name in LONG),
    f"stages.base.budget.sample_every={STEPS}",
]
SECRETS = [*CANARIES.values(), KEYS["AWS_SECRET_ACCESS_KEY"], "canary-of-postgres"]


class Done(NamedTuple):
    """The run, after all that was done to it."""

    on: TestCluster
    home: Home
    id: str
    accepted_s: float
    """Of the first submission, the command's start included."""
    again: str
    """What a second submission answered while the first was at work."""
    log: str
    command_lines: str
    """Of every process, while it is submitted, in the middle of it and while the cascade is served."""
    status: dict[str, Any]
    deployed: dict[str, str]
    """What `ddiff deploy` says of the endpoint."""
    picture: Image.Image
    """Painted by it."""
    painted_by: str
    """Digest of the cascade that painted it."""


def on_laptop(on: TestCluster, *words: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The command, as somebody gives it on a laptop, in an empty folder; and all command lines meanwhile."""
    command = [sys.executable, "-m", "jobs.cli", *words]
    seen = list[str]()
    with subprocess.Popen(
        command,
        cwd=on.directory / "laptop",
        env=on.outside() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:  # what it says fits into the pipes
        while process.poll() is None:
            seen.append(every_command_line())
            time.sleep(0.2)
        out, told = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, told), "\n".join(seen)


def ddiff(on: TestCluster, *words: str, **environment: str) -> Result:
    """The same in this process, which has imported what a command takes seconds to import."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - {"PATH"}:
            if name.startswith(("AWS_", "RAY_", "MLFLOW_", "DDIFF_")):
                patch.delenv(name)
        for name, value in (on.outside() | environment).items():
            patch.setenv(name, value)
        patch.chdir(on.directory / "laptop")
        patch.setattr(dashboard, "TIMEOUT_S", 300.0)  # of a busy machine
        return CliRunner().invoke(main, words)


def ended(on: TestCluster, job: str) -> bool:
    """Whether a job is over; asked of the server itself, for the command takes seconds to start."""
    ask = urllib.request.Request(f"{on.url}/api/jobs/{job}", headers={"Authorization": f"Bearer {on.token}"})
    with urllib.request.urlopen(ask, timeout=60) as answer:
        return bool(json.load(answer)["end_time"])


def wait_for(truth: Callable[[], Any], on: TestCluster, seconds: float = 2400) -> None:
    """Until something is so; the job's last words if it never is."""
    end = time.monotonic() + seconds
    while not truth():
        if time.monotonic() > end or ended(on, "smoke.1"):
            pytest.fail(ddiff(on, "logs", "smoke").stdout[-3000:])
        time.sleep(0.5)


def wait_for_end(on: TestCluster, job: str) -> dict[str, Any]:
    """How a job has ended."""
    end = time.monotonic() + 2400
    while not ended(on, job) and time.monotonic() < end:
        time.sleep(0.3)
    found: dict[str, Any] = json.loads(ddiff(on, "status", job, "--json").stdout)
    return found


def step_of(home: Home, stage: str) -> int:
    """The last step that the journal in the store tells of."""
    return max(
        map(int, re.findall(r'"train/loss", [^,]+, (\d+),', home.text(f"{stage}/metrics.jsonl"))), default=0
    )


def drivers(on: TestCluster) -> list[int]:
    """The processes of `ddiff run` on the head."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            mine = str(on.head.home).encode() in (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if mine and b"jobs.cli" in words:
            found.append(int(path.parent.name))
    return found


def every_command_line() -> str:
    """What anybody on the machine may read of the processes on it."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(lines)


@pytest.fixture(scope="module")
def run() -> Iterator[Done]:
    with cluster() as on, pytest.MonkeyPatch.context() as patch:
        for name, value in on.environment.items():
            if name.startswith(("AWS_", "MLFLOW_TRACKING_")):  # of clients here
                patch.setenv(name, value)
        storage.store.cache_clear()
        home = Home.of("s3://bucket/runs/smoke")
        words = ["submit", "smoke", *(word for change in CHANGES for word in ("--set", change))]
        began = time.monotonic()
        first, command_lines = on_laptop(on, *words)
        accepted = time.monotonic() - began
        if "does not answer" in first.stderr:  # the head was so busy
            first, command_lines = on_laptop(on, *words)
        assert first.returncode == 0, first.stderr
        again = ddiff(on, *words)

        wait_for(lambda: step_of(home, "clip") >= BEFORE, on)
        command_lines += every_command_line()
        os.kill(min(drivers(on)), signal.SIGKILL)  # it may be starting others, which are its copies at first

        wait_for(lambda: step_of(home, "base") >= BEFORE, on)
        kill_node(on.nodes[1])

        status = wait_for_end(on, "smoke.1")
        log = ddiff(on, "logs", "smoke").stdout
        assert status["status"] == "SUCCEEDED", log[-4000:]
        deployed = put_on_air(on)
        picture, painter = painted(deployed["endpoint"])
        command_lines += every_command_line()
        yield Done(
            on, home, first.stdout.strip(), accepted, again.stdout.strip(), log, command_lines, status,
            deployed, picture, painter,
        )  # fmt: skip
        storage.store.cache_clear()


def put_on_air(on: TestCluster) -> dict[str, str]:
    """`ddiff submit deploy`: the laptop has no key of the store and no user of MLflow, the nodes have."""
    where = {"host": on.head.ip, "port": free_port(on.head.ip), "hop.num_cpus": 0.2}
    settings = [word for name, value in where.items() for word in ("--set", f"{name}={value}")]
    done = ddiff(on, "submit", "deploy", "smoke@current", *settings, "--follow")
    assert done.exit_code == 0, done.stderr
    return dict(re.findall(r"^(endpoint|digest|code|config): (\S+)$", done.stderr, re.MULTILINE))


def painted(endpoint: str) -> tuple[Image.Image, str]:
    """A picture over HTTP, and the cascade that the answer says has painted it."""
    body = {"prompt": "a red circle above a small blue square", "seed": 1, "response_format": "b64_json"}
    ask = urllib.request.Request(
        f"{endpoint}/v1/images/generations", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(ask, timeout=600) as answer:
        file = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
        return Image.open(io.BytesIO(file)), str(answer.headers["x-model-version"])


def client_of(run: Done) -> Any:
    """MLflow's own client, as the trainer."""
    from mlflow import MlflowClient  # noqa: PLC0415 seconds

    return MlflowClient(run.on.mlflow, registry_uri=run.on.mlflow)


def test_a_driver_and_a_node_are_lost_and_the_run_is_finished(
    run: Done, record_property: Callable[[str, object], None]
) -> None:
    record_property("accepted_s", round(run.accepted_s, 1))  # the goal is 5 s, of a quiet box
    assert run.status["status"] == "SUCCEEDED", run.log[-4000:]
    assert (run.id, run.again) == ("smoke.1", "smoke.1")
    assert "the driver was killed by SIGKILL; starting it again, attempt 2 of 3" in run.log
    summary = json.loads(run.home.text("summary.json"))
    assert summary["bundle"] == "s3://bucket/runs/smoke/cascade"
    assert set(summary["stages"]) == set(STAGES)
    for name in STAGES:  # each once, and not again by the second driver; the first may die before it says so
        done = len(re.findall(rf"\b{name}: done in ", run.log))
        assert done == 1 or (done == 0 and f"{name}: done before" in run.log), name
    assert len(re.findall(r"clip: continues at step [1-9]", run.log)) >= 1
    assert len(re.findall(r"base: continues at step [1-9]", run.log)) >= 1


def test_the_cascade_is_served_where_it_was_trained(run: Done) -> None:
    assert run.deployed["code"] == code.digest()  # out of the store, whatever the nodes have
    digest = json.loads(run.home.text("summary.json"))["digest"]
    assert run.deployed["digest"] == run.painted_by == digest
    assert (run.picture.size, run.picture.mode) == ((256, 256), "RGB")
    assert len(set(run.picture.getdata())) > 100  # not one colour


def groups_of(run: Done) -> list[tuple[str, str]]:
    """The size of every group of workers, and the lines that say where they are."""
    return re.findall(r"worker group of size (\d): *\n((?:.*world_rank=\d.*\n)+)", run.log)


def test_every_training_had_two_workers(run: Done) -> None:
    groups = groups_of(run)
    assert {size for size, _ in groups} == {"2"}
    assert len(groups) > len(STAGES)  # those that were hit had another
    assert all(re.findall(r"world_rank=(\d)", placed) == ["0", "1"] for _, placed in groups)


def test_two_workers_were_on_two_nodes(run: Done) -> None:
    if not run.on.spaces:
        pytest.skip("no namespaces of the network here (root and `ip`): all nodes have one address")
    nodes = [set(re.findall(r"\(ip=([\d.]+),", placed)) for _, placed in groups_of(run)]
    both, left = {node.ip for node in run.on.nodes}, {run.on.nodes[0].ip}
    assert nodes[-1] == left  # what was hit goes on with what is left
    alone = [placed for placed in nodes[:-1] if placed != both]
    assert len(alone) <= 2  # to Ray a node seems full, just after a stage has ended there
    assert len(nodes) - len(alone) >= len(STAGES)


def tracked(run: Done) -> list[Any]:
    """Every run that MLflow has."""
    client = client_of(run)
    found: list[Any] = client.search_runs([client.get_experiment_by_name("ddiff").experiment_id])
    return found


def test_mlflow_has_one_run_of_it_and_every_point_once(run: Done) -> None:
    client, found = client_of(run), tracked(run)
    parents = [one for one in found if one.data.tags.get("kind") == "pipeline"]
    assert len(parents) == 1
    assert (parents[0].info.run_name, parents[0].info.status) == ("smoke", "FINISHED")
    children = {one.data.tags["stage"]: one for one in found if "stage" in one.data.tags}
    assert len(found) == 1 + len(STAGES) == 1 + len(children)
    for name, child in children.items():
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        steps = {
            metric: [point.step for point in client.get_metric_history(child.info.run_id, metric)]
            for metric in child.data.metrics
        }
        assert not [metric for metric, found in steps.items() if len(found) != len(set(found))], name
        assert max(steps["train/loss"]) == (STEPS if name in LONG else 12)
        assert child.info.status == "FINISHED"
    version = client.get_model_version_by_alias("smoke", "current")
    assert version.source == "s3://bucket/runs/smoke/cascade"
    told = json.dumps([[one.data.params, one.data.tags] for one in found])
    assert str(run.on.directory) not in told  # no node's folder means anything to another
    assert not [secret for secret in SECRETS if secret in told]


def test_no_secret_is_written_down_or_shown(run: Done) -> None:
    assert not [secret for secret in SECRETS if secret in run.command_lines]
    nothing_is_written_down(run)
    assert not [secret for secret in SECRETS if secret in run.log]


def nothing_is_written_down(run: Done) -> None:
    """No secret in the store or on a node, and in the store nothing of a node's own folder."""
    fs = storage.store(run.home.root)
    for path in fs.find("s3://bucket/runs"):
        data = fs.cat_file(path)
        assert not [word for word in (*SECRETS, str(run.on.directory)) if word.encode() in data], path
    for path in run.on.directory.rglob("*"):
        if path.is_file() and path.name != "users.ini" and not path.is_symlink():
            data = path.read_bytes()
            assert not [secret for secret in SECRETS if secret.encode() in data], path


@pytest.fixture(scope="module")
def asked(run: Done) -> dict[str, str]:
    """Jobs that have nothing to do with each other, submitted together: three interpreters start at once."""
    for node in (run.on.head, *run.on.nodes):
        for path in node.home.glob("ddiff-*"):
            shutil.rmtree(path)
    page = storage.store(run.home.root).info(run.home.at("report.html").address)["ETag"]
    again = [word for change in CHANGES for word in ("--set", change)]
    orders = {"again": ["smoke", *again], "bad": ["evaluate", "http://127.0.0.1:9"], "doctor": ["doctor"]}
    return {what: ddiff(run.on, "submit", *words).stdout.strip() for what, words in orders.items()} | {
        "page": page
    }


def test_a_node_keeps_nothing_that_another_would_need(run: Done, asked: dict[str, str]) -> None:
    assert asked["again"] == "smoke.2"
    again = wait_for_end(run.on, "smoke.2")
    log = ddiff(run.on, "logs", "smoke.2").stdout
    assert again["status"] == "SUCCEEDED", log[-4000:]
    assert [len(re.findall(rf"\b{name}: done before", log)) for name in STAGES] == [1] * len(STAGES)
    assert storage.store(run.home.root).info(run.home.at("report.html").address)["ETag"] == asked["page"]
    assert len(tracked(run)) == 1 + len(STAGES)  # of both jobs


def test_its_scores_are_kept_with_the_cascade_and_with_the_run(run: Done) -> None:
    judged = ddiff(run.on, "submit", "evaluate", run.deployed["endpoint"], "--set", "captions=8", "--follow")
    assert judged.exit_code == 0, judged.stderr
    right = re.search(r"^all: ([\d.]+) \(", judged.stderr, re.MULTILINE)
    assert right is not None
    summary = json.loads(run.home.text("summary.json"))  # it was asked what the run itself asks
    assert (summary["oracle"]["all"], summary["oracle"]["n"]) == (float(right[1]), 8)
    assert "00007.png" in run.home.at("evaluation").names()
    client = client_of(run)
    version = client.get_model_version_by_alias("smoke", "current")
    assert float(version.tags["score.all"]) == float(right[1])
    assert client.get_run(version.run_id).data.metrics["oracle/all"] == float(right[1])


def test_the_nodes_are_looked_at_where_they_are_and_mlflow_with_and_without_a_user(
    run: Done, asked: dict[str, str]
) -> None:
    wait_for_end(run.on, asked["doctor"])  # of a node that is short of something it is a failure
    log = ddiff(run.on, "logs", asked["doctor"]).stdout
    for node in (run.on.head, run.on.nodes[0]):
        where = rf"{node.ip}(?: \(\w+\))?"
        lines = (
            rf"^\w+ +disk +{where}: [\d.,]+ [GM]iB free in {node.home}",
            rf"^ok +clock +{where} is [+-][0-4] s",
            rf"^\w+ +gpu +{where}: ",
        )
        assert [line for line in lines if not re.search(line, log, re.MULTILINE)] == [], log
    for check in ("storage", "mlflow", "cluster token"):
        assert re.search(rf"^ok +{check} ", log, re.MULTILINE), log
    here = {"DDIFF_STORAGE": str(run.on.directory / "laptop" / "runs")}  # which has no key of the store
    user = {"MLFLOW_TRACKING_USERNAME": "trainer"}
    user["MLFLOW_TRACKING_PASSWORD"] = CANARIES["MLFLOW_TRACKING_PASSWORD"]
    for shown, state, says in ((user, "ok", "began a run"), ({}, "fail", "401")):
        report = json.loads(ddiff(run.on, "doctor", "--json", **here, **shown).stdout)["findings"]
        (line,) = [one for one in report if one["check"] == "mlflow"]
        assert (line["state"], says in line["says"]) == (state, True), line


def test_the_others_of_the_family(run: Done, asked: dict[str, str]) -> None:
    wrong = ddiff(run.on, "list", RAY_AUTH_TOKEN="x" * 40)
    assert wrong.exit_code == 2
    assert re.fullmatch(
        r"ddiff: \S+ answers 403: the token from RAY_AUTH_TOKEN is wrong; set RAY_AUTH_TOKEN, .*\n",
        wrong.stderr,
    )
    escape = ddiff(run.on, "submit", "smoke", "--set", "name=../../x")
    assert (escape.exit_code, escape.stdout) == (2, "")
    assert "name: String should match pattern" in escape.stderr
    jobs = json.loads(ddiff(run.on, "list", "--json").stdout)["jobs"]
    assert {"smoke.1"} <= {job["id"] for job in jobs}
    assert json.loads(ddiff(run.on, "stop", "smoke.1", "--json").stdout)["status"] == "SUCCEEDED"
    assert ddiff(run.on, "delete", "smoke.1").stdout == "deleted smoke.1\n"
    gone = ddiff(run.on, "status", "smoke.1")
    assert (gone.exit_code, "has no job and no run 'smoke.1'" in gone.stderr) == (2, True)
    ended = ddiff(run.on, "logs", "-f", asked["bad"])
    assert ended.exit_code != 0
    told = ended.stderr.split("the first error:")[1].splitlines()
    assert len(told) <= MOST_LINES - 1  # with the rest of the heading, but not the empty line before it
    assert "http://127.0.0.1:9 does not answer" in "".join(told)


def test_no_secret_is_written_down_by_what_came_after(run: Done, asked: dict[str, str]) -> None:
    nothing_is_written_down(run)
