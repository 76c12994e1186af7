"""What Serve is told when a cascade is deployed on a cluster that serves more than this."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray.serve.schema

from jobs import artifacts, deploy
from jobs.config import ConfigError
from jobs.dashboard import DashboardError
from jobs.deploy import Config, beside_others, serve_fields
from jobs.failures import line_of
from serve import app, code, running
from serve.spec import ServeSpec
from tests.unit.serve.tiny import tiny_cascade
from workflows.registry import Version

CONFIG = Config(serve_fields(ServeSpec(cascade="s3://bucket/cascade", digest="a" * 64)))


def test_the_applications_of_others_are_told_again_for_serve_deletes_what_it_is_not_told() -> None:
    theirs = {"name": "theirs", "route_prefix": "/theirs", "import_path": "theirs:app", "args": {"a": 1}}
    ours = CONFIG.fields["applications"][0]
    before = ours | {"args": ours["args"] | {"digest": "b" * 64}}
    details: dict[str, Any] = {
        "applications": {
            "ddiff": {"deployed_app_config": before},
            "theirs": {"deployed_app_config": theirs},
            "by hand": {"deployed_app_config": None},
        }
    }
    told = beside_others(CONFIG, details)
    assert told["applications"] == [ours, theirs]
    assert told | {"applications": [ours]} == CONFIG.fields
    ray.serve.schema.ServeDeploySchema.model_validate(told)
    assert beside_others(CONFIG, {"applications": {}}) == CONFIG.fields


class Serve:
    """A dashboard on which a cascade is on the air and the next one fails."""

    address = "http://127.0.0.1:8265"

    def __init__(self, log: pytest.LogCaptureFixture) -> None:
        before = CONFIG.fields["applications"][0]
        self.former = before | {"args": before["args"] | {"digest": "b" * 64}}
        self.status, self.log, self.said_before, self.away = "RUNNING", log, "", 0
        self.told: list[dict[str, Any]] = []
        """The fields of ours, from time to time."""
        self.others: dict[str, dict[str, Any]] = {}
        self.told_beside: list[list[dict[str, Any]]] = []

    def __enter__(self) -> "Serve":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get(self, _: str) -> dict[str, Any]:
        if self.said_before and self.away:
            self.away -= 1
            raise DashboardError("no answer in 20 s")
        ours = {"status": self.status, "message": "Error: no memory", "deployed_app_config": self.former}
        return {
            "http_options": {"host": "127.0.0.1", "port": 8000},
            "applications": {"ddiff": ours, **self.others},
        }

    def put(self, _: str, fields: dict[str, Any]) -> None:
        ours, *others = fields["applications"]
        self.told.append(ours)
        self.told_beside.append(others)
        self.said_before, self.status = self.said_before or self.log.text, "DEPLOY_FAILED"


def test_a_deployment_that_fails_names_the_way_back_before_anything_is_changed_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    serve = Serve(caplog)
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    caplog.set_level("INFO", "jobs")
    with pytest.raises(deploy.DeployError) as failed:
        deploy.deploy(CONFIG, serve.address)
    (former,) = [path for path in (tmp_path / "deployments").iterdir() if "b" * 64 in path.read_text()]
    way = f"ddiff deploy --config {former}"
    assert way in serve.said_before
    assert way in line_of(failed.value)
    assert serve.told == [CONFIG.fields["applications"][0], serve.former]  # some hops may be new by now


def test_what_somebody_deploys_over_a_cascade_that_fails_stays_on_the_air(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Busy(Serve):
        def put(self, path: str, fields: dict[str, Any]) -> None:
            super().put(path, fields)
            self.former = self.former | {"args": self.former["args"] | {"digest": "c" * 64}}

    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    serve = Busy(caplog)
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    with pytest.raises(deploy.DeployError):
        deploy.deploy(CONFIG, serve.address)
    assert serve.told == CONFIG.fields["applications"]
    assert f"{'c' * 12}, deployed by another meanwhile, stays; nothing is put back" in caplog.text


def test_a_cascade_is_deployed_over_one_of_another_ddiff_which_is_put_back_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    serve = Serve(caplog)
    strange = {"field_of_another_ddiff": 1, "hop": {"threads": "many"}, "code": "e" * 64}
    serve.former = serve.former | {"args": serve.former["args"] | strange}
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    with pytest.raises(deploy.DeployError, match="no memory"):
        deploy.deploy(CONFIG, serve.address)
    assert serve.told == [CONFIG.fields["applications"][0], serve.former]
    (former,) = [path for path in (tmp_path / "deployments").iterdir() if "b" * 64 in path.read_text()]
    with pytest.raises(ConfigError, match=f"another ddiff has written it .its code is {'e' * 12}., deploy"):
        deploy.written_before(str(former))


def test_what_somebody_deploys_while_the_cascade_is_copied_stays_and_is_what_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    theirs = {"name": "theirs", "route_prefix": "/theirs", "import_path": "theirs:app"}
    serve, publish = Serve(caplog), deploy.publish

    def copied(config: Config) -> str:
        serve.others["theirs"] = {"deployed_app_config": theirs}
        serve.former = serve.former | {"args": serve.former["args"] | {"digest": "c" * 64}}
        return publish(config)

    monkeypatch.setattr(deploy, "publish", copied)
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    with pytest.raises(deploy.DeployError):
        deploy.deploy(CONFIG, serve.address)
    (ours,) = CONFIG.fields["applications"]
    assert serve.told == [ours, serve.former]
    assert serve.told_beside == [[theirs], [theirs]]


def test_an_address_that_serve_does_not_have_is_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path / "kept"))
    serve = Serve(caplog)
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    (ours,) = CONFIG.fields["applications"]
    moved = CONFIG._replace(
        fields=CONFIG.fields | {"applications": [ours | {"args": ours["args"] | {"port": 9}}]}
    )
    with pytest.raises(ConfigError, match=r"listens at 127\.0\.0\.1:8000, not at 127\.0\.0\.1:9; --set host"):
        deploy.deploy(moved, serve.address)
    assert (serve.told, (tmp_path / "kept").exists()) == ([], False)


class Behind(Serve):
    """One that runs what it is told."""

    def put(self, path: str, fields: dict[str, Any]) -> None:
        super().put(path, fields)
        self.former, self.status = self.told[-1], "RUNNING"


@pytest.mark.parametrize("why", ["Connection refused", f"cascade {'c' * 12} answers, not {'a' * 12}"])
def test_what_serve_runs_is_not_put_back_where_its_endpoint_is_out_of_our_reach(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    serve = Behind(caplog)
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    monkeypatch.setattr(deploy, "POLL_S", 0.0)
    monkeypatch.setattr(deploy, "ANSWER_S", 0.0)
    monkeypatch.setattr(running, "missing", lambda *_: why)
    (ours,) = CONFIG.fields["applications"]
    quick = CONFIG._replace(
        fields=CONFIG.fields | {"applications": [ours | {"args": ours["args"] | {"startup_s": 0.5}}]}
    )
    found = deploy.deploy(quick, serve.address)
    assert (found["endpoint"], found["seen"]) == ("http://127.0.0.1:8000", False)
    assert len(serve.told) == 1
    assert why in caplog.text


def test_what_has_failed_is_another_to_serve_when_it_is_deployed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    serve, asked = Serve(caplog), CONFIG.fields["applications"][0]
    serve.former, serve.status = asked, "DEPLOY_FAILED"
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    for _ in range(2):
        with pytest.raises(deploy.DeployError):
            deploy.deploy(CONFIG, serve.address)
        serve.former = serve.told[-1]
    first, second = serve.told
    assert asked != first != second
    assert first | {"runtime_env": asked.get("runtime_env")} == asked | {
        "runtime_env": asked.get("runtime_env")
    }
    ray.serve.schema.ServeDeploySchema.model_validate(CONFIG.fields | {"applications": [second]})


@pytest.mark.parametrize(
    ("silence", "why", "puts"), [((9, 60.0), "no memory", 2), ((10**9, 0.01), "no answer in 20 s", 1)]
)
def test_a_dashboard_that_is_silent_is_waited_for_and_what_nobody_knows_to_have_failed_is_not_put_back(
    silence: tuple[int, float],
    why: str,
    puts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    serve = Serve(caplog)
    serve.away, limit_s = silence
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    monkeypatch.setattr(deploy, "POLL_S", 0.0)
    monkeypatch.setattr(deploy, "SILENT_S", limit_s)
    caplog.set_level("INFO", "jobs")
    with pytest.raises(deploy.DeployError) as failed:
        deploy.deploy(CONFIG, serve.address)
    assert why in str(failed.value)
    assert ("nothing is put back" in str(failed.value)) is (puts == 1)
    assert "back to the former: ddiff deploy --config" in str(failed.value)
    assert len(serve.told) == puts


class Dying(Behind):
    """One of whose hops loses a replica while another starts, and has a new one a few questions later."""

    def __init__(self, log: pytest.LogCaptureFixture, trigger: str) -> None:
        super().__init__(log)
        self.trigger, self.asked = trigger, 0

    def get(self, path: str) -> dict[str, Any]:
        details = super().get(path)
        self.asked += bool(self.told)
        if self.told and self.asked < 20:
            lost = {"status": "DEPLOY_FAILED", "status_trigger": self.trigger}
            starts = {"status": "UPDATING", "status_trigger": "CONFIG_UPDATE_STARTED"}
            details["applications"]["ddiff"] |= {
                "status": "DEPLOY_FAILED",
                "deployments": {"base": lost, "upsampler": starts},
            }
        return details


def test_a_replica_that_dies_meanwhile_is_no_failure_and_one_that_never_starts_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    monkeypatch.setattr(deploy, "POLL_S", 0.0)
    monkeypatch.setattr(running, "missing", lambda *_: "")
    serve = Dying(caplog, "HEALTH_CHECK_FAILED")
    monkeypatch.setattr(deploy, "Dashboard", lambda address: serve)
    found = deploy.deploy(CONFIG, serve.address)
    assert (found["endpoint"], found["seen"]) == ("http://127.0.0.1:8000", True)
    assert len(serve.told) == 1
    serve = Dying(caplog, "REPLICA_STARTUP_FAILED")
    with pytest.raises(deploy.DeployError, match="is not served"):
        deploy.deploy(CONFIG, serve.address)
    assert len(serve.told) == 2


def test_a_cluster_elsewhere_is_not_told_of_a_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for place in ("", "runs"):
        monkeypatch.setenv("DDIFF_STORAGE", place)
        with pytest.raises(ConfigError, match="do not see 'runs', a folder beside this one: set"):
            deploy.resolved("demo@current", (), "http://203.0.113.1:8265")
        with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):  # the next question
            deploy.resolved("demo@current", (), "http://127.0.0.1:8265")
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path))
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        deploy.resolved("demo@current", (), "http://203.0.113.1:8265")


class Models:
    """A registry that knows one cascade."""

    def __init__(self, run: Path, digest: str) -> None:
        self.found = Version("tiny", "1", str(run / "cascade"), digest, {})

    def version(self, _: str) -> Version:
        return self.found


def test_what_a_config_names_is_put_there_when_it_is_published_and_not_when_it_is_only_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = tiny_cascade(tmp_path / "run")
    monkeypatch.setattr(deploy, "registry", lambda name: Models(tmp_path / "run", digest))
    monkeypatch.setenv("DDIFF_STORAGE", str(tmp_path / "kept"))
    config = deploy.resolved("tiny")
    assert not (tmp_path / "kept").exists()
    ray.serve.schema.ServeDeploySchema.model_validate(config.fields)
    assert config.spec.cascade == f"{tmp_path}/kept/cascades/{digest}"
    assert config.code == f"file://{tmp_path}/kept/code/{config.spec.code}.zip"

    written = deploy.publish(config)
    assert deploy.written_before(written).fields == config.fields
    assert (Path(config.spec.cascade) / "manifest.json").exists()
    with zipfile.ZipFile(config.code.removeprefix("file://")) as archive:
        archive.extractall(tmp_path / "node")
    assert [path.name for path in (tmp_path / "node").iterdir()] == ["ddiff"]  # as Ray wants it
    monkeypatch.setattr(code, "ROOT", tmp_path / "node" / "ddiff")
    assert code.digest() == config.spec.code
    (tmp_path / "node" / "ddiff" / "serve" / "app.py").write_text("")
    with pytest.raises(ValueError, match=rf"config is for {config.spec.code[:12]}: give the nodes that"):
        app.build(config.fields["applications"][0]["args"])


def test_of_a_config_that_another_ddiff_has_written_everything_that_is_refused_is_named(
    tmp_path: Path,
) -> None:
    (ours,) = CONFIG.fields["applications"]
    args = ours["args"] | {"port": 0, "hops": {"base": {"max_replica": 2}}, "code": "c" * 64}
    file = tmp_path / "other.yaml"
    file.write_text(Config({"applications": [ours | {"args": args}]}).text())
    with pytest.raises(ConfigError) as refused:
        deploy.written_before(str(file))
    assert str(refused.value) == (
        f"{file}: port: Input should be greater than or equal to 1; hops.base: ReplicaSpec has no field "
        "'max_replica'; did you mean 'max_replicas'?; if another ddiff has written it (its code is "
        "cccccccccccc), deploy it with that one"
    )


def test_a_store_that_ray_fetches_nothing_from_leaves_the_code_to_the_nodes() -> None:
    assert artifacts.code_address("memory://runs") == ""
    assert artifacts.code_address("s3://bucket/runs") == f"s3://bucket/runs/code/{code.digest()}.zip"


def test_equal_code_is_packed_into_equal_bytes() -> None:
    assert code.packed() == code.packed()
    with zipfile.ZipFile(io.BytesIO(code.packed())) as archive:
        assert {name.split("/")[1] for name in archive.namelist()} == set(code.PACKAGES)


def test_the_way_back_is_to_the_code_that_was_on_the_air() -> None:
    spec = ServeSpec(cascade="s3://bucket/cascade", digest="a" * 64, code="c" * 64)
    place = "s3://bucket/runs/code/c.zip"
    (ours,) = serve_fields(spec, place)["applications"]
    former = deploy.on_air({"applications": {"ddiff": {"deployed_app_config": ours}}})
    assert former is not None
    assert (former.code, former.spec) == (place, spec)
    running = {"deployed_app_config": ours, "status": "RUNNING"}
    assert not deploy.state_of(running, spec)
    assert deploy.state_of(running, spec.but(code="d" * 64)) == "Serve has not taken the config yet"
    assert deploy.state_of(running, spec.but(precision="fp32")) == "Serve has not taken the config yet"
    assert "precision" not in ours["args"]  # which code from before precisions would refuse
    (told,) = serve_fields(spec.but(precision="fp32"), place)["applications"]
    assert told["args"]["precision"] == "fp32"
