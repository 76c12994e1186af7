"""What travels to a cluster is our code and the configuration, and nothing that is secret."""

from pathlib import Path
from typing import cast

import pytest
import yaml

from jobs.attempts import attempted
from jobs.config import ConfigError
from jobs.following import Cluster, ClusterError, JobFacts, NameTakenError
from jobs.submit import CONFIG, ROOT, Submitted, order_of, packed, quoted, submit

CANARY = "canary-0123456789"


def test_words_become_a_command_there() -> None:
    run = order_of(("smoke",), None, None, ("name=mine",))
    assert (run.words, run.run) == (("run", "--config", CONFIG), "mine")
    assert order_of(("run",), "smoke", None, ()).run == "smoke"
    assert order_of(("train", "base"), "smoke", None, ()).words == ("train", "base", "--config", CONFIG)
    judge = order_of(("evaluate", "http://x"), None, None, ("captions=8",))
    assert judge.words == ("eval", "--url", "http://x", "--captions", "8")
    serve = order_of(("deploy", "demo@production"), None, None, ("port=80",))
    assert serve.words == ("deploy", "demo@production", "--set", "port=80")
    former = order_of(("deploy", "s3://bucket/runs/deployments/a.yaml"), None, None, ())
    assert former.words == ("deploy", "--config", "s3://bucket/runs/deployments/a.yaml")


@pytest.mark.parametrize(
    ("words", "recipe", "changes", "message"),
    [
        (("smoke",), None, ("name=../../x",), "name: String should match pattern"),
        (("smoke",), None, ("name=a b",), "name: String should match pattern"),
        (("train",), "smoke", (), "train: name one stage"),
        (("train", "bases"), "smoke", (), "smoke has no stage 'bases'"),
        (("prepare",), "smoke", (), "prepare needs kind 'pairs'"),
        (("runn",), None, (), "no recipe 'runn'"),
        (("deploy",), "smoke", (), "write a recipe, or run, train STAGE"),
        (("deploy", "demo"), "smoke", (), "write a recipe, or run, train STAGE"),
        (("deploy", "a.yaml"), None, ("port=80",), "leave out --set"),
        (("evaluate", "http://x"), None, ("prompts=8",), "evaluate takes captions=N and seed=N"),
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
        ours = {
            path.relative_to(ROOT)
            for package in ("dd_core", "jobs", "serve", "workflows")
            for path in (ROOT / package).rglob("*.py")
        }
        assert ours | {Path(CONFIG), Path("workflows/report.css")} <= files
        assert {path.suffix for path in files} <= {
            ".py",
            ".css",
            ".yaml",
            ".json",
            ".typed",
            ".html",
            ".js",
            "",
        }
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
    order = order_of(("smoke",), None, None, (f"pairs.shards=['https://x/{CANARY}.tar']",))
    with (
        pytest.raises(ConfigError, match="the value of SOME_API_KEY is in the configuration") as found,
        packed(order, {}),
    ):
        pass
    assert CANARY not in str(found.value)
    order = order_of(("smoke",), None, None, ())
    with (
        pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI holds a password"),
        packed(order, {"MLFLOW_TRACKING_URI": "http://me:hunter2@mlflow"}),
    ):
        pass


def test_words_reach_the_shell_as_they_are() -> None:
    assert quoted("a'b; rm -rf $HOME") == "'a'\\''b; rm -rf $HOME'"
    assert quoted("s3://bucket/runs") == "s3://bucket/runs"


@pytest.mark.slow
def test_a_command_that_fails_by_itself_is_not_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    assert attempted(3, ["run", "--recipe", "no-such"]) == 2
    assert capfd.readouterr().err.count("no recipe 'no-such'") == 1


class Busy:
    """A cluster on which others submit the same run: answers of `jobs`, and the names that are taken."""

    def __init__(self, taken: set[str], listed: list[list[JobFacts]]) -> None:
        self.taken, self.listed, self.asked = taken, listed, list[str]()

    def jobs(self) -> list[JobFacts]:
        return self.listed.pop(0) if self.listed else []

    def start(self, name: str, *_: object, **__: object) -> str:
        self.asked.append(name)
        if name in self.taken:
            raise NameTakenError(f"{name} already exists")
        return name


def sent(cluster: Busy) -> Submitted:
    order = order_of(("run",), "smoke", None, ())
    return submit(order, cast("Cluster", cluster))


def test_a_name_that_a_deleted_job_still_has_is_passed_over() -> None:
    cluster = Busy({"smoke.1", "smoke.2"}, [])
    done = sent(cluster)
    assert (done.id, done.started, done.attempt) == ("smoke.3", True, 3)
    assert cluster.asked == ["smoke.1", "smoke.2", "smoke.3"]


def test_of_two_who_submit_at_once_the_second_joins_the_first() -> None:
    first = JobFacts("smoke.1", "smoke", 1, "PENDING", "", "run", 0.0, 0.0)
    cluster = Busy({"smoke.1"}, [[], [first]])
    done = sent(cluster)
    assert (done.id, done.started) == ("smoke.1", False)
    assert cluster.asked == ["smoke.1"]


def test_a_cluster_on_which_every_name_is_taken_is_an_error() -> None:
    with pytest.raises(ClusterError, match="the names of 5 jobs are taken by jobs that are not listed"):
        sent(Busy({f"smoke.{number}" for number in range(1, 9)}, []))
