"""Manifests say what the recipe says, and nothing that KubeRay, Serve or Ray would not understand."""

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from click.testing import CliRunner, Result
from ray.job_submission import JobStatus
from ray.runtime_env import RuntimeEnv
from ray.scripts import scripts
from ray.serve.schema import ServeDeploySchema

from jobs.cli import main
from jobs.cluster.manifests import hop_groups, job, object_name, said, service, standing
from jobs.cluster.spec import ClusterSpec, pod_for
from jobs.config import AnySpec
from jobs.deploy import Config, serve_fields
from jobs.fit import PlanError, refusals
from jobs.following import facts_of
from jobs.nodes import Node
from jobs.plan import plan_of
from jobs.recipes import smoke
from serve.spec import ServeSpec
from tests.unit.jobs.kuberay import CLUSTER_IN, errors, strict, vendored
from workflows.estimate import Need, needs
from workflows.run_spec import RunSpec
from workflows.train_spec import TrainSpec

pytestmark = pytest.mark.slow
SECRET = "hunter2-canary"
SETTINGS = ClusterSpec(
    storage="/data/runs",
    claim="ddiff-data",
    claim_class="shared",
    s3_endpoint="http://s3:9000",
    gpu_nodes={"gpu": "h100"},
)
SERVED = ServeSpec.model_validate(
    {
        "cascade": f"s3://ddiff/runs/cascades/{'e' * 64}",
        "digest": "e" * 64,
        "code": "c" * 64,
        "hops": {"base": {"num_gpus": 1, "max_replicas": 3}, "prior": {}},
    }
)


CODE = f"s3://ddiff/runs/code/{'c' * 64}.zip"


def ddiff(*words: str) -> Result:
    return CliRunner().invoke(main, words)


@pytest.fixture(scope="module", autouse=True)
def _planned_once() -> Iterator[None]:
    """What the same stages need is found once: it takes seconds, and a dozen manifests ask for it."""
    found: dict[str, dict[str, Need]] = {}

    def needed(stages: list[TrainSpec], **how: Any) -> dict[str, Need]:
        key = repr((stages, how["context_length"], how["gpus"]))
        if key not in found:
            found[key] = needs(stages, **how)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.plan.needs", needed)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the command prints, of every kind; a secret is in the environment meanwhile."""
    folder = tmp_path_factory.mktemp("manifests")
    (folder / "cluster.yaml").write_text(yaml.safe_dump(SETTINGS.model_dump(mode="json")))
    (folder / "serve.yaml").write_text(Config(serve_fields(SERVED, CODE), "tiny").text())
    base = ["--set", "stages.base.num_workers=2", "--set", "stages.base.resources.labels.zone=in(a, b)"]
    words = {
        "job": ["--recipe", "smoke", *base],
        "cluster": ["--recipe", "smoke", *base, "--cluster", str(folder / "cluster.yaml")],
        "service": ["--config", str(folder / "serve.yaml")],
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
            patch.setenv(name, SECRET)
        done = {kind: ddiff("manifest", kind, *more) for kind, more in words.items()}
    for result in done.values():
        assert result.exit_code == 0, result.stderr
        assert SECRET not in result.stdout + result.stderr
    return {kind: list(yaml.safe_load_all(result.stdout)) for kind, result in done.items()}


def one(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in manifests if each["kind"] == kind]
    return found


def group(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in cluster["workerGroupSpecs"] if each["groupName"] == name]
    return dict(found)


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster in a manifest."""
    place = CLUSTER_IN[document["kind"]]
    cluster: dict[str, Any] = document["spec"][place] if place else document["spec"]
    return cluster


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a manifest with another value somewhere in its cluster; None: without one."""
    copy = deepcopy(document)
    inner: Any = cluster_of(copy)
    *parents, name = path.split("/")
    for parent in parents:
        inner = inner[int(parent)] if isinstance(inner, list) else inner[parent]
    inner[name] = value
    if value is None:
        del inner[name]
    return copy


def test_every_manifest_is_of_the_published_schemas(made: dict[str, list[dict[str, Any]]]) -> None:
    config = Config(serve_fields(SERVED, CODE))
    for settings in (ClusterSpec(), SETTINGS):
        run = smoke.run()
        for document in (*job(run, settings), *standing(run, settings), *service(config, settings)):
            assert not errors(document)
    for document in itertools.chain(*made.values()):
        assert not errors(document)
    assert (vendored()["version"], vendored()["licence"]) == ("v1.7.0", "Apache-2.0")


POD = "headGroupSpec/template/spec"


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster", "RayService"])
@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("workerGroupSpecs/0/replica", 1, "'replica' was unexpected"),
        ("workerGroupSpecs/0/maxReplicas", "2", "'2' is not of type 'integer'"),
        ("workerGroupSpecs/0/maxReplicas", None, "'maxReplicas' is a required property"),
        (f"{POD}/containers", None, "'containers' is a required property"),
        (f"{POD}/containers/0/securityContext/capabilities/dropped", ["ALL"], "'dropped' was unexpected"),
        (f"{POD}/containers/0/resources/limits/memory", "4 GiB", "'4 GiB' does not match"),
        (f"{POD}/containers/0/resources/limits/memory", 1.5, "1.5 is not of type 'integer', 'string'"),
        (f"{POD}/volumes/0/emptyDir/size", "4Gi", "'size' was unexpected"),
        (f"{POD}/securityContext/runAsUser", "1000", "'1000' is not of type 'integer'"),
        ("autoscalerOptions/upscalingMode", "Fast", "'Fast' is not one of"),
        # what only the operator and Kubernetes refuse
        (f"{POD}/containers/0/imagePullPolicy", "Sometimes", "'Sometimes' is not one of"),
        (f"{POD}/containers/0/name", "Ray_Head", "'Ray_Head' does not match"),
        (f"{POD}/containers", [], "head/template/spec/containers: []"),
        (f"{POD}/volumes/0/name", "shn", "head/template/spec/volumes: none is called shm"),
        ("workerGroupSpecs/0/labels", {"zone": "in(a, b)"}, "labels/zone: 'in(a, b)' does not match"),
    ],
)
def test_a_field_that_kuberay_does_not_know_or_that_is_of_another_type_is_refused(
    kind: str, path: str, value: Any, why: str, made: dict[str, list[dict[str, Any]]]
) -> None:
    (ours,) = [each for each in itertools.chain(*made.values()) if each["kind"] == kind]
    found = errors(changed(ours, path, value))
    assert any(why in error for error in found), found


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("RayJob", "shutDownAfterJobFinishes", True),
        ("RayJob", "backoffLimit", "3"),
        ("RayService", "shutDownAfterJobFinishes", True),
        ("RayService", "serveConfigV2", {}),
        ("RayCluster", "rayVersion", 2.60),
    ],
)
def test_so_it_is_beside_the_cluster(
    kind: str, name: str, value: Any, made: dict[str, list[dict[str, Any]]]
) -> None:
    (ours,) = [each for each in itertools.chain(*made.values()) if each["kind"] == kind]
    assert errors({**ours, "spec": {**ours["spec"], name: value}})


def test_a_schema_made_strict_is_open_only_where_it_says_so() -> None:
    map_of_texts = {"type": "object", "additionalProperties": {"type": "string"}}
    text = {"type": "string"}
    told = {"type": "object", "properties": {"properties": text}, "required": ["properties"]}
    assert strict(told) == told | {"additionalProperties": False}
    assert strict(map_of_texts) == map_of_texts
    kept = told | {"x-kubernetes-preserve-unknown-fields": True}
    assert strict({"type": "array", "items": kept}) == {"type": "array", "items": kept}
    assert strict({"type": "string", "nullable": True})["type"] == ["string", "null"]
    either = strict({"anyOf": [{"type": "integer"}, text], "x-kubernetes-int-or-string": True})
    assert (either["type"], "anyOf" in either) == (["integer", "string"], False)


def test_a_job_runs_the_resolved_recipe_retries_and_resumes(made: dict[str, list[dict[str, Any]]]) -> None:
    job = one(made["job"], "RayJob")["spec"]
    assert (job["backoffLimit"], job["shutdownAfterJobFinishes"]) == (1, True)
    assert job["entrypoint"] == "python -m jobs.attempts 3 run --config /etc/ddiff/run.yaml -v"
    listed = {"submission_id": "smoke-x7k2p", "status": JobStatus.RUNNING, "message": "", "start_time": 0}
    facts = facts_of(SimpleNamespace(**listed, end_time=0, driver_exit_code=None, metadata=job["metadata"]))
    assert (facts.id, facts.run, facts.command) == ("smoke-x7k2p", "smoke", "run")  # for `ddiff logs smoke`
    RuntimeEnv(**yaml.safe_load(job["runtimeEnvYAML"]))
    config = one(made["job"], "ConfigMap")
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    spec = AnySpec.validate_python(yaml.safe_load(config["data"]["run.yaml"]))
    assert isinstance(spec, RunSpec)
    base = spec.stage("base")
    assert (base.num_workers, base.use_gpu, base.resources.cpus) == (2, True, 1)
    assert base.resources.labels == {"zone": "in(a, b)", "ddiff.io/stage-kind": "base"}


def test_groups_have_what_the_stages_state_and_the_plan_fits_on_them(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    cluster = one(made["job"], "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    names = [each["groupName"] for each in cluster["workerGroupSpecs"]]
    assert names == ["clip", "autoencoder", "noised-clip", "draft", "base", "upsampler", "prior", "decode"]
    base = group(cluster, "base")
    assert (base["minReplicas"], base["maxReplicas"]) == (0, 2)
    assert base["labels"] == {"ddiff.io/stage-kind": "base", "zone": "a"}
    limits = base["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "2", "memory": "4Gi", "nvidia.com/gpu": "1"}  # 1.5 GiB is 70 % of it, and one
    assert "nvidia.com/gpu" not in str(group(cluster, "decode")["template"])
    environment = {
        each["name"]: each["value"]
        for each in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    }
    nodes = [
        Node(each["name"], each["cpus"], each["gpus"], each["memory_bytes"], each["labels"])
        for each in json.loads(environment["DDIFF_NODE_GROUPS"])
        for _ in range(each["count"])
    ]
    config = yaml.safe_load(one(made["job"], "ConfigMap")["data"]["run.yaml"])
    spec = AnySpec.validate_python(config)
    assert isinstance(spec, RunSpec)
    assert not refusals(plan_of(spec, nodes, run="s3://ddiff/runs/smoke"))


def test_a_worker_pod_that_is_to_go_says_so_and_leaves_who_trains_there_time_to_save(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    for manifests in made.values():
        cluster = cluster_of(manifests[-1])
        for each in cluster["workerGroupSpecs"]:
            pod = each["template"]["spec"]
            shell, flag, line = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert (shell, flag) == ("/bin/bash", "-c")
            drain, _, wait = line.partition(" && ")
            program, *words = shlex.split(drain)
            context = scripts.drain_node.make_context("drain-node", words[1:])  # Ray reads these words
            assert (program, words[0]) == ("ray", "drain-node")
            assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
            waits = int(wait.removeprefix("sleep "))
            assert context.params["deadline_remaining_seconds"] == waits
            assert 0 < waits < pod["terminationGracePeriodSeconds"]
        env = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in env


def test_the_autoscaler_of_ray_adds_nodes_and_removes_idle_ones(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    for manifests in made.values():
        cluster = cluster_of(manifests[-1])
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["autoscalerOptions"] == {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 120,
        }


def test_no_pod_is_root_or_holds_a_secret_and_the_cluster_asks_for_a_token(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    for manifests in made.values():
        cluster = cluster_of(manifests[-1])
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ddiff-ray-token"}
        templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for pod in (each["template"]["spec"] for each in templates):
            assert pod["securityContext"]["runAsNonRoot"]
            (container,) = pod["containers"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert [one["secretRef"]["name"] for one in container["envFrom"]] == [
                "ddiff-storage",
                "ddiff-mlflow",
            ]
            named = {each["name"] for each in container["env"]}
            assert not {name for name in named if "TOKEN" in name or "SECRET" in name or "PASSWORD" in name}
            assert container["image"].startswith("ddiff:")


def test_every_pod_has_the_account_and_the_pull_secret_that_the_settings_name() -> None:
    settings = SETTINGS.but(service_account="trainer", pull_secret="registry", storage_secret=None)
    documents = [
        job(smoke.run(), settings)[-1],
        standing(smoke.run(), settings)[-1],
        service(Config(serve_fields(SERVED, CODE)), settings)[-1],
    ]
    for document in documents:
        assert not errors(document)
        cluster = cluster_of(document)
        for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            pod = each["template"]["spec"]
            assert pod["serviceAccountName"] == "trainer"
            assert pod["imagePullSecrets"] == [{"name": "registry"}]
    submitter = documents[0]["spec"]["submitterPodTemplate"][
        "spec"
    ]  # KubeRay's own would not have the secret
    assert submitter["imagePullSecrets"] == [{"name": "registry"}]
    assert submitter["containers"][0]["image"] == settings.image_name
    for document in (job(smoke.run(), SETTINGS)[-1], standing(smoke.run(), SETTINGS)[-1]):
        for word in ("serviceAccountName", "imagePullSecrets"):
            assert word not in str(document)


@pytest.mark.parametrize(
    ("kind", "line", "where"),
    [
        (
            "job",
            f"mlflow: http://{SECRET}.svc:5000",
            "the value of MLFLOW_TRACKING_PASSWORD is in cluster.mlflow",
        ),
        ("cluster", "mlflow: http://me:hunter3@mlflow:5000", "cluster.mlflow holds a password"),
        ("service", "s3_endpoint: https://s3/?sig=hunter3", "cluster.s3_endpoint holds a password"),
    ],
)
def test_a_secret_in_the_settings_becomes_no_manifest(
    kind: str, line: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    (tmp_path / "c.yaml").write_text(line)
    (tmp_path / "serve.yaml").write_text(Config(serve_fields(SERVED, CODE), "tiny").text())
    what = ["--config", str(tmp_path / "serve.yaml")] if kind == "service" else ["--recipe", "smoke"]
    done = ddiff("manifest", kind, *what, "--cluster", str(tmp_path / "c.yaml"))
    assert (done.exit_code, where in done.stderr, done.stdout) == (2, True, ""), done.stderr
    assert SECRET not in done.stderr
    assert "hunter3" not in done.stderr


@pytest.mark.parametrize("kind", ["job", "cluster"])
def test_a_secret_in_the_run_becomes_no_manifest(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    done = ddiff("manifest", kind, "--recipe", "smoke", "--set", f"pairs.caption=json:{SECRET}")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the value of MLFLOW_TRACKING_PASSWORD is in pairs.caption" in done.stderr


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (
            ["shapes=null", "pairs.destination=runs/mine/prepared"],
            "destination 'runs/mine/prepared' would lie in the folder of the job",
        ),
        (
            ["shapes=null", "pairs.destination=s3://b/prepared", 'pairs.shards=["data/{00..09}.tar"]'],
            "shards 'data/{00..09}.tar' is a path beside this folder, which no node has",
        ),
        (
            [
                *("shapes=null", "pairs.destination=s3://b/prepared", 'pairs.shards=["s3://b/a.tar"]'),
                "evaluation.judge=ViT-B-32:weights/clip.pt",
            ],
            "evaluation.judge 'weights/clip.pt' is a path beside this folder",
        ),
    ],
)
def test_a_job_whose_run_reads_what_no_pod_has_becomes_no_manifest(changes: list[str], where: str) -> None:
    words = [word for change in changes for word in ("--set", change)]
    done = ddiff("manifest", "job", "--recipe", "smoke", *words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert where in done.stderr


def test_only_its_own_pods_the_operator_and_clients_reach_a_cluster(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    policy = one(made["service"], "NetworkPolicy")["spec"]
    service = one(made["service"], "RayService")
    labels = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["policyTypes"] == ["Ingress"]
    ports = [[port["port"] for port in rule.get("ports", [])] for rule in policy["ingress"]]
    assert ports == [[], [8265, 8000], [8000]]
    assert all(rule["from"] for rule in policy["ingress"])  # an empty one would let everybody in


def test_the_pod_that_submits_a_job_is_kuberays_own_and_reaches_its_cluster(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    body = one(made["job"], "RayJob")["spec"]
    template = body["submitterPodTemplate"]
    policy = one(made["job"], "NetworkPolicy")["spec"]
    let_in = [peer["podSelector"]["matchLabels"] for peer in policy["ingress"][0]["from"]]
    assert template["metadata"]["labels"] in let_in
    assert "ports" not in policy["ingress"][0]
    assert template["spec"] == {  # GetSubmitterTemplate of KubeRay, which adds the command
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": body["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
                    "image"
                ],
                "resources": {
                    "requests": {"cpu": "500m", "memory": "200Mi"},
                    "limits": {"cpu": "1", "memory": "1Gi"},
                },
            }
        ],
    }


def test_a_service_embeds_a_config_that_serve_reads_and_that_our_application_builds_from(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    service = one(made["service"], "RayService")["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    parsed = ServeDeploySchema.model_validate(config)
    assert parsed.applications[0].runtime_env == {"working_dir": CODE}
    RuntimeEnv(**parsed.applications[0].runtime_env)
    assert parsed.http_options.host == "0.0.0.0"
    spec = ServeSpec.model_validate(parsed.applications[0].args)
    assert spec.but(host=SERVED.host) == SERVED
    assert service["upgradeStrategy"]["type"] == "NewCluster"
    assert (
        service["rayClusterDeletionDelaySeconds"] == 120
    )  # the old cluster answers what it was asked before
    assert service["excludeHeadPodFromServeSvc"] is True
    gpu, cpu = service["rayClusterConfig"]["workerGroupSpecs"]
    assert (gpu["minReplicas"], gpu["maxReplicas"]) == (1, 6)  # three replicas, twice while they are replaced
    assert gpu["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cpu["minReplicas"] == 2  # of the prior, and of what the config does not name


@pytest.mark.parametrize("named", [{}, {"base": {}}, {"prior": {}, "base": {}, "upsampler": {}}])
def test_hops_that_are_not_named_have_the_nodes_that_they_ask_for(named: dict[str, Any]) -> None:
    spec = ServeSpec.model_validate({"cascade": "s3://a", "hop": {"num_gpus": 1}, "hops": named})
    gpu, cpu = hop_groups(spec, ClusterSpec())
    assert (gpu.name, gpu.pod.gpus, gpu.least) == ("hops-gpu", 1, max(1, 3 - len(named)))
    assert (cpu.name, cpu.pod.gpus) == ("hops-cpu", 0)


def test_a_hop_that_wants_more_replicas_than_it_may_have_has_the_nodes_for_them() -> None:
    many = {"min_replicas": 9, "num_gpus": 1}  # and max_replicas is 1
    for hops in ({"base": many}, {"base": many, "prior": {"min_replicas": 4}}, {}):
        spec = ServeSpec.model_validate({"cascade": "s3://ddiff/a", "digest": "e" * 64, "hops": hops})
        document = service(Config(serve_fields(spec, CODE)), ClusterSpec())[-1]
        assert not errors(document)
        for each in document["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
            assert 0 < each["minReplicas"] < each["maxReplicas"], each["groupName"]
        document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplicas"] = 0
        assert "> maxReplicas 0" in errors(document)[0]


def test_a_pod_has_a_disk_for_what_is_made_there_and_enough_shared_memory(
    made: dict[str, list[dict[str, Any]]],
) -> None:
    cluster = one(made["job"], "RayJob")["spec"]["rayClusterSpec"]
    for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = each["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert volumes[mounts[environment["TMPDIR"]]] == {}
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert int(volumes[mounts["/dev/shm"]]["sizeLimit"].removesuffix("Gi")) >= 0.3 * memory
        assert "ephemeral-storage" not in container["resources"]["limits"]
    state = next(each for each in plan_of(smoke.run(), [], run="s3://b/x").stages if each.spec.name == "base")
    asked = group(cluster, "base")["template"]["spec"]["containers"][0]["resources"]["requests"]
    scratch = int(asked["ephemeral-storage"].removesuffix("Gi")) * 2**30
    assert scratch > state.scratch_bytes > 2 * state.need.state


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("demo", r"demo"),
        ("2026-demo", r"run-2026-demo-[0-9a-f]{6}"),
        ("demo_a", r"demo-a-[0-9a-f]{6}"),
        ("demo.a", r"demo-a-[0-9a-f]{6}"),
        ("Demo-a", r"demo-a-[0-9a-f]{6}"),
        ("demo-a", r"demo-a"),
        ("a" * 60, r"a{33}-[0-9a-f]{6}"),
        ("a" * 61, r"a{33}-[0-9a-f]{6}"),
        ("__", r"run-[0-9a-f]{6}"),
    ],
)
def test_an_object_is_named_after_its_run_as_kubernetes_wants_it(name: str, made: str) -> None:
    assert re.fullmatch(made, object_name(name))
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", object_name(name))


def test_two_runs_never_share_an_object() -> None:
    names = ["demo-a", "demo_a", "demo.a", "Demo-a", "demo-A", "a" * 60, "a" * 61, "1", "run-1"]
    assert len({object_name(name) for name in names}) == len(names)


def test_settings_come_back_as_they_were_printed_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    printed = ddiff("manifest", "settings").stdout
    assert ClusterSpec.model_validate(yaml.safe_load(printed)) == ClusterSpec()
    for line, said_of_it in {
        "storage: runs": "neither an address",
        "{storage: /database, claim: a}": "neither an address",
        "{storage: /data/../etc, claim: a}": "neither an address",
        "storage: /data/runs": "storage /data/runs is a path: name the claim that is mounted at /data",
        "imgae: x": "did you mean 'image'",
        "token_secret: ../x": "token_secret",
    }.items():
        (tmp_path / "c.yaml").write_text(line)
        done = ddiff("manifest", "job", "--recipe", "smoke", "--cluster", str(tmp_path / "c.yaml"))
        assert (done.exit_code, said_of_it in done.stderr) == (2, True), done.stderr


def test_a_claim_for_a_storage_that_is_a_path_is_made_by_itself(
    made: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """`ddiff manifest KIND | kubectl delete -f -` must not delete the volume of all runs."""
    settings = SETTINGS.but(namespace="mine")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (tmp_path / "serve.yaml").write_text(Config(serve_fields(SERVED, CODE), "tiny").text())
    cluster_file = ["--cluster", str(tmp_path / "c.yaml")]
    (claim,) = yaml.safe_load_all(ddiff("manifest", "claim", *cluster_file).stdout)
    assert not errors(claim)
    assert (claim["metadata"]["name"], claim["metadata"]["namespace"]) == ("ddiff-data", "mine")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for kind, what in (
        ("job", ["--recipe", "smoke"]),
        ("service", ["--config", str(tmp_path / "serve.yaml")]),
    ):
        printed = ddiff("manifest", kind, *what, *cluster_file)
        assert printed.exit_code == 0, printed.stderr
        assert "claimName: ddiff-data" in printed.stdout
        assert "kind: PersistentVolumeClaim" not in printed.stdout
    assert "PersistentVolumeClaim" not in [each["kind"] for each in made["cluster"]]
    cluster = one(made["cluster"], "RayCluster")["spec"]
    for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        mounts = each["template"]["spec"]["containers"][0]["volumeMounts"]
        assert {"name": "data", "mountPath": "/data"} in mounts
    assert group(cluster, "base")["template"]["spec"]["nodeSelector"] == {"gpu": "h100"}


def test_a_claim_that_the_settings_do_not_name_is_refused_and_so_is_one_of_a_run() -> None:
    done = ddiff("manifest", "claim")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "the settings name no claim, and storage s3://ddiff/runs needs none" in done.stderr
    done = ddiff("manifest", "claim", "--recipe", "smoke")
    assert (done.exit_code, "leave out --recipe" in done.stderr) == (2, True)


def test_a_run_is_held_against_the_claim_that_it_lies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.plan.free_disk", lambda directory: 0)  # of who prints the manifest
    shapes = smoke.run().but(shapes={"pairs": 100_000})  # some 4 GiB
    assert job(shapes, SETTINGS)
    with pytest.raises(
        PlanError, match=r"/data/runs/smoke will hold .* 1\.0 GiB are free; .* raise claim_gib"
    ):
        job(shapes, SETTINGS.but(claim_gib=1))


def test_a_pod_has_room_for_its_worker() -> None:
    for gib in (0.5, 1.5, 30, 700):
        pod = pod_for(cpus=1, memory_bytes=round(gib * 2**30), gpus=0)
        assert pod.memory_bytes >= gib * 2**30
    assert said({"a": "x", "b": "in(y, z)", "c": "!w", "d": "!in(q)"}) == {"a": "x", "b": "y"}
