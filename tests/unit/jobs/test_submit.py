"""What travels to a cluster is our code and the configuration, and nothing that is secret."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import yaml

from jobs import attempts
from jobs.attempts import attempted
from jobs.config import ConfigError
from jobs.environment import for_the_cluster
from jobs.following import Cluster, ClusterError, JobFacts, NameTakenError
from jobs.recipes import smoke
from jobs.submit import CONFIG, Order, Submitted, order_of, packed, submit
from serve.code import PACKAGES, ROOT
from workflows.pairs import PairsSpec
from workflows.run_spec import RunSpec

CANARY = "canary-0123456789"
OWN = ("shapes=null", "pairs.destination=s3://b/prepared")
FROM_STORE = (*OWN, 'pairs.shards=["s3://b/a.tar"]')


def test_words_become_a_command_there() -> None:
    run = order_of(("smoke",), None, None, ("name=mine",))
    assert (run.words, run.run) == (("run", "--config", CONFIG), "mine")
    assert order_of(("run",), "smoke", None, ()).run == "smoke"
    assert order_of(("train", "base"), "smoke", None, ()).words == ("train", "base", "--config", CONFIG)
    judge = order_of(("evaluate", "http://x"), None, None, ("captions=8",))
    assert judge.words == ("eval", "--url", "http://x", "--captions", "8", "--record")
    mine = order_of(("evaluate", "http://x"), None, None, ("data=s3://b/mine", "judge=ViT-L-14/openai"))
    assert mine.words[3:] == ("--data", "s3://b/mine", "--judge", "ViT-L-14/openai", "--record")
    serve = order_of(("deploy", "demo@production"), None, None, ("port=80",))
    assert serve.words == ("deploy", "demo@production", "--set", "port=80")
    former = order_of(("deploy", "s3://bucket/runs/deployments/a.yaml"), None, None, ())
    assert former.words == ("deploy", "--config", "s3://bucket/runs/deployments/a.yaml")


def test_pairs_are_prepared_there_as_a_run_on_own_pairs_says() -> None:
    order = order_of(("prepare",), "smoke", None, FROM_STORE)
    assert isinstance(order.spec, PairsSpec)
    assert order.spec.shards == ("s3://b/a.tar",)
    assert order.words == ("data", "prepare", "--config", CONFIG)


@pytest.mark.parametrize(
    ("words", "recipe", "changes", "message"),
    [
        (("smoke",), None, ("name=../../x",), "name: String should match pattern"),
        (("smoke",), None, ("name=a b",), "name: String should match pattern"),
        (("train",), "smoke", (), "train: name one stage"),
        (("train", "bases"), "smoke", (), "smoke has no stage 'bases'"),
        (("prepare",), "smoke", (), "prepare needs kind 'pairs'"),
        (("runn",), None, (), "no recipe 'runn'"),
        (("deploy",), "smoke", (), "submit deploy: write the name of a recipe; or run, train STAGE or prep"),
        (("deploy", "demo"), "smoke", (), "evaluate URL, deploy NAME@ALIAS or deploy s3://.*, without them"),
        (("doctor",), None, ("name=x",), "or doctor, with one of the two or without; or"),
        (("deploy", "a.yaml"), None, ("port=80",), "leave out --set"),
        (("deploy", "a.yaml"), None, (), "deploy 'a.yaml' is a path beside this folder, which no node has"),
        (("evaluate", "http://x"), None, ("prompts=8",), "evaluate takes captions=N and seed=N"),
        (("evaluate", "http://x"), None, ("data=s3://b/mine",), "data=PREPARED and judge=CLIP go together"),
        (("evaluate", "http://x"), None, ("captions=2",), "captions\n.*greater than or equal to 4"),
        (("smoke",), None, ("shapes=null",), "destination 'prepared' would lie in the folder of the job"),
    ],
)
def test_words_that_are_no_order_are_refused_here(
    words: tuple[str, ...], recipe: str | None, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        order_of(words, recipe, None, changes)


def test_the_pack_is_our_code_and_the_whole_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(CANARY)
    (tmp_path / "data.tar").write_bytes(bytes(10**6))
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    order = order_of(("smoke",), None, None, ("stages.base.budget.steps=7",))
    with packed(order, {"DDIFF_STORAGE": "s3://bucket/runs"}) as (directory, pack):
        files = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
        ours = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
        assert ours | {Path(CONFIG), Path("workflows/report.css"), Path("dd_core/nets/norm.c")} <= files
        assert {path.suffix for path in files} <= {".py", ".css", ".c", ".yaml", ".typed"}
        assert (pack.files, pack.bytes) == (
            len(files),
            sum((directory / file).stat().st_size for file in files),
        )
        assert pack.bytes < 2_000_000
        assert all(CANARY.encode() not in (directory / file).read_bytes() for file in files)
        sent = yaml.safe_load((directory / CONFIG).read_text())
        assert [stage["budget"]["steps"] for stage in sent["stages"] if stage["name"] == "base"] == [7]
    assert not directory.exists()


def test_a_secret_in_the_configuration_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    order = order_of(("smoke",), None, None, (*OWN, f"pairs.shards=['https://x/{CANARY}.tar']"))
    assert refused(order) == (
        "the value of SOME_API_KEY is in pairs.shards.0; take it out: the nodes have it"
    )
    served = order_of(("deploy", "demo@production"), None, None, (f"keys={CANARY}",))
    assert refused(served).startswith("the value of SOME_API_KEY is in the command; ")
    named = order_of(("smoke",), None, None, ())._replace(source=f"/home/me/{CANARY}.yaml")
    assert refused(named).startswith("the value of SOME_API_KEY is in the command; ")


def test_a_short_secret_is_known_as_a_word_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", "smok")
    with packed(order_of(("smoke",), None, None, ()), {}):
        pass
    named = order_of(("smoke",), None, None, (*OWN, "pairs.shards=['https://x/smok.tar']"))
    assert refused(named).startswith("the value of DB_PASS is in pairs.shards.0; ")


@pytest.mark.parametrize("secret", ['with"quotes"and\\slashes', "it's a pass phrase", "k" * 5000])
def test_a_secret_that_yaml_writes_otherwise_or_that_is_long_is_known(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", secret + "\n")
    spec = smoke.run().but(shapes=None)
    shards = spec.pairs.but(shards=(f"x/{secret}.tar",))
    assert "SOME_API_KEY is in pairs.shards.0;" in refused(
        Order(("run",), "smoke", spec.but(pairs=shards), "")
    )


def test_a_password_in_an_address_stays_here() -> None:
    whole = order_of(("smoke",), None, None, ())
    said = refused(whole, {"MLFLOW_TRACKING_URI": "http://me:hunter2@mlflow"})
    assert said.startswith("MLFLOW_TRACKING_URI holds a password, ")
    judged = order_of(("evaluate", "http://me:hunter2@head:8000"), None, None, ())
    assert refused(judged).startswith("the command holds a password, ")
    served = order_of(("deploy", "demo@production"), None, None, ("cascade=s3://me:hunter2@host/x",))
    assert refused(served).startswith("the command holds a password, ")
    shards = order_of(
        ("smoke",), None, None, (*OWN, "pairs.shards=['s3://b/x.tar', 'https://me:hunter2@host/{0..9}.tar']")
    )
    assert refused(shards).startswith("pairs.shards.1 holds a password, ")
    signed = order_of(
        ("smoke",), None, None, (*OWN, "pairs.shards=['https://h/a.tar?X-Amz-Signature=hunter2']")
    )
    assert refused(signed).startswith("pairs.shards.0 holds a password, or an address that gives its reader ")


def refused(order: Order, environment: dict[str, str] | None = None) -> str:
    """Why an order does not travel; what must not be read is not in it either."""
    with pytest.raises(ConfigError) as found, packed(order, environment or {}):
        pass
    assert not any(secret in str(found.value) for secret in (CANARY, "hunter2", "k" * 99))
    return str(found.value)


def test_words_reach_the_shell_as_they_are() -> None:
    cluster = Busy(set(), [])
    submit(order_of(("evaluate", "http://x/$HOME;'"), None, None, ()), cast("Cluster", cluster))
    assert cluster.entrypoints == [
        """python -m jobs.attempts 3 eval --url 'http://x/$HOME;'"'"'' --record -v"""
    ]


@pytest.mark.slow
def test_a_command_that_fails_by_itself_is_not_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    assert attempted(3, ["run", "--recipe", "no-such"]) == 2
    assert capfd.readouterr().err.count("no recipe 'no-such'") == 1


def test_a_stop_that_comes_between_two_drivers_stops_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "driver"
    driver.write_text(f"#!/bin/sh\nmkdir {tmp_path}/second && kill -9 $$\nexec sleep 5\n")
    driver.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(driver))
    monkeypatch.setattr(attempts.log, "warning", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert attempted(3, []) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


class Busy:
    """A cluster on which others submit the same run: answers of `jobs`, and the names that are taken."""

    def __init__(self, taken: set[str], listed: list[list[JobFacts]]) -> None:
        self.taken, self.listed, self.asked = taken, listed, list[str]()
        self.entrypoints, self.marks = list[str](), list[dict[str, str]]()

    def jobs(self) -> list[JobFacts]:
        return self.listed.pop(0) if self.listed else []

    def start(self, name: str, entrypoint: str, *_: object, marks: dict[str, str], **__: object) -> str:
        self.asked.append(name)
        self.entrypoints.append(entrypoint)
        self.marks.append(marks)
        if name in self.taken:
            raise NameTakenError(f"{name} already exists")
        return name


def sent(cluster: Busy) -> Submitted:
    return submit(order(), cast("Cluster", cluster))


def test_a_name_that_a_deleted_job_still_has_is_passed_over() -> None:
    cluster = Busy({"smoke.1", "smoke.2"}, [])
    done = sent(cluster)
    assert (done.id, done.started, done.attempt) == ("smoke.3", True, 3)
    assert cluster.asked == ["smoke.1", "smoke.2", "smoke.3"]


def order(*changes: str) -> Order:
    return order_of(("run",), "smoke", None, changes)


def at_work(done: Order, **told: str) -> JobFacts:
    """The job of an order that was submitted with these variables."""
    told = told or for_the_cluster()
    with packed(done, told) as (_, pack):
        digest = done.digest(told, pack.code)
    return JobFacts(f"{done.run}.1", done.run, 1, "PENDING", "", "run", 0.0, 0.0, digest)


def test_of_two_who_submit_the_same_at_once_the_second_joins_the_first() -> None:
    cluster = Busy({"smoke.1"}, [[], [at_work(order())]])
    done = sent(cluster)
    assert (done.id, done.started) == ("smoke.1", False)
    assert cluster.asked == ["smoke.1"]
    assert cluster.marks[0]["ddiff.order"] == at_work(order()).order


@pytest.mark.parametrize(
    "other",
    [
        lambda: at_work(order("stages.base.budget.steps=7")),
        lambda: at_work(order_of(("train", "base"), "smoke", None, ())),
        lambda: at_work(order(), DDIFF_STORAGE="s3://another/runs"),
        lambda: at_work(order())._replace(order=""),  # of an older ddiff, or Ray has lost its marks
    ],
    ids=["other values", "one stage", "another place", "nobody knows"],
)
def test_another_order_for_a_run_that_is_being_worked_on_is_refused(other: Callable[[], JobFacts]) -> None:
    cluster = Busy(set(), [[other()]])
    with pytest.raises(ClusterError) as found:
        sent(cluster)
    assert str(found.value) == (
        "smoke.1 works on smoke and was told something else, or with other code (run, PENDING); wait for its "
        "end: ddiff logs -f smoke.1, or stop it: ddiff stop smoke.1, or name "
        "this run otherwise: --set name=..."
    )
    assert cluster.asked == []
    done = sent(Busy(set(), [[other()._replace(status="STOPPED")]]))
    assert (done.id, done.started) == ("smoke.2", True)


def test_a_job_that_runs_other_code_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.code.ROOT", tmp_path)
    code = tmp_path / "jobs" / "run.py"
    code.parent.mkdir()
    code.write_text("wrong")
    before = at_work(order())
    again = submit(order()._replace(source="elsewhere.yaml"), cast("Cluster", Busy(set(), [[before]])))
    assert (again.id, again.started) == ("smoke.1", False)
    code.write_text("right")
    with pytest.raises(ClusterError, match="or with other code"):
        sent(Busy(set(), [[before]]))


def test_only_one_config_is_deployed_at_a_time_and_another_is_not_taken_for_it() -> None:
    first, second = (order_of(("deploy", name), None, None, ()) for name in ("demo@current", "other@current"))
    with pytest.raises(ClusterError, match=r"deploy.1 works on deploy .* or stop it: ddiff stop deploy.1$"):
        submit(second, cast("Cluster", Busy(set(), [[at_work(first)]])))


def test_two_endpoints_are_two_runs_and_so_are_two_destinations(tmp_path: Path) -> None:
    urls = ("http://a:1", "http://b:1", "http://a:1/")
    runs = [order_of(("evaluate", url), None, None, ()).run for url in urls]
    assert (len(set(runs)), runs[0]) == (2, runs[2])
    names = [
        order_of(("prepare",), None, pairs_in(tmp_path, place), ()).run
        for place in ("s3://x/prepared", "s3://y/prepared", "s3://x/prepared/")
    ]
    assert (len(set(names)), names[0]) == (2, names[2])
    assert all(re.fullmatch(r"prepare-prepared-[0-9a-f]{8}", name) for name in names)
    with pytest.raises(ConfigError, match="would lie in the folder of the job"):
        order_of(("prepare",), None, pairs_in(tmp_path, "prepared"), ())


def pairs_in(directory: Path, destination: str) -> Path:
    """A preparation to be submitted."""
    config = directory / "pairs.yaml"
    config.write_text(f"kind: pairs\nshards: [s3://b/a.tar]\ndestination: {destination}\n")
    return config


def test_a_cluster_on_which_every_name_is_taken_is_an_error() -> None:
    with pytest.raises(ClusterError, match="the names of 5 jobs are taken by jobs that are not listed"):
        sent(Busy({f"smoke.{number}" for number in range(1, 9)}, []))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("shapes=null", "pairs.destination=s3://b/p", "pairs.shards=['tars/*.tar']"), "shards 'tars/"),
        (
            ("stages.noised_clip.parents.clip=runs/old/clip/bundle",),
            "stages.noised_clip.parents.clip 'runs/old/clip/",
        ),
        ((*FROM_STORE, "evaluation.judge=ViT-B-32:weights.pt"), "evaluation.judge 'weights.pt'"),
        ((*FROM_STORE, "evaluation.judge=here"), "evaluation.judge 'here'"),
        (
            ("stages.clip.stage.pretrained=ViT-B-32:clip.pt",),
            "stages.clip.stage.pretrained 'clip.pt'",
        ),
    ],
)
def test_what_no_node_would_find_is_refused_here(
    changes: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}.* is a path beside this folder"):
        order_of(("run",), "smoke", None, changes)


def test_what_all_nodes_find_is_submitted() -> None:
    order_of(
        ("run",),
        "smoke",
        None,
        ("stages.noised_clip.parents.clip=s3://b/clip/bundle",),
    )
    order_of(("run",), "smoke", None, (*FROM_STORE, "evaluation.judge=ViT-B-32/openai"))
    own = ("shapes=null", "pairs.destination=/data/p", "pairs.shards=['s3://b/{0..9}.tar', '/data/a.tar']")
    order_of(("run",), "smoke", None, own)
    for words in (("data=mine", "judge=ViT-B-32/openai"), ("data=s3://b/d", "judge=ViT-B-32:weights.pt")):
        with pytest.raises(ConfigError, match="is a path beside this folder"):
            order_of(("evaluate", "http://x"), None, None, words)


def test_a_doctor_goes_where_the_keys_are() -> None:
    alone, asked = order_of(("doctor",), None, None, ()), order_of(("doctor",), "smoke", None, ("name=mine",))
    assert (alone.words, alone.spec) == (("doctor",), None)
    assert asked.words == ("doctor", "--config", CONFIG)
    assert isinstance(asked.spec, RunSpec)
    assert asked.spec.name == "mine"
