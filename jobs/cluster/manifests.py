"""`ddiff manifest`: the objects of KubeRay for a run, a service or a standing cluster, and their volume."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs.attempts import ATTEMPTS
from jobs.cluster.pods import CONFIG, PART, Group, network_policy, ray_cluster, submitter
from jobs.cluster.spec import ClusterSpec, PodSpec, pod_for
from jobs.config import ConfigError, loaded
from jobs.deploy import Config, serve_fields
from jobs.failures import words_of
from jobs.fit import refuse
from jobs.inputs import refuse_local
from jobs.plan import StagePlan, groups, plan_of, stage_plan
from jobs.secrecy import refuse_secrets, texts
from serve.spec import ReplicaSpec, ServeSpec
from workflows.run_spec import RunSpec

KIND = "ddiff.io/stage-kind"
SERVE_PORT = 8000
SERVICE = "ddiff-serve"
"""The name of the RayService, one to a namespace."""
NAME_LENGTH = 40
"""Longest name of an object of a run; of the 63 characters KubeRay needs some for what it appends."""
Manifest = dict[str, Any]


def read_cluster(file: Path | None) -> ClusterSpec:
    """The settings in a file, or the defaults.

    Raises:
        ConfigError: The file cannot be used.
    """
    fields = loaded(file, "`ddiff manifest settings` prints one to start from") if file else {}
    try:
        return ClusterSpec.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{file}: {words_of(error, fields)}") from None


def text_of(manifests: list[Manifest]) -> str:
    """As one file for kubectl."""
    return "---\n".join(
        yaml.safe_dump(one, sort_keys=False, allow_unicode=True, width=100) for one in manifests
    )


def job(spec: RunSpec, cluster: ClusterSpec) -> list[Manifest]:
    """A RayJob that makes a run on a cluster of its own.

    A driver that is killed is started again on the same cluster.  If the head is lost, a retry makes a new
    cluster and a new driver; the run resumes because its name and its storage, and so all that it has
    finished, are the same.  KubeRay cannot tell a lost head from a run that is refused, and retries both.

    Raises:
        ConfigError: A secret of this environment, or a password, would stand in it, or the run reads what no
            pod has.
        PlanError: A stage cannot fit even there.
    """
    refuse_local(spec)
    refuse_secrets(said_of(cluster, spec.model_dump(mode="json")))
    name = object_name(spec.name)
    bound, groups = on_groups(spec, cluster)
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-run", "namespace": cluster.namespace},
        "data": {"run.yaml": yaml.safe_dump(bound.model_dump(mode="json"), sort_keys=False)},
    }
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": {PART: name}},
        "spec": {
            "entrypoint": f"python -m jobs.attempts {ATTEMPTS} run --config {CONFIG}/run.yaml -v",
            "metadata": {"ddiff.run": spec.name, "ddiff.command": "run"},  # as jobs.following knows a job
            "runtimeEnvYAML": yaml.safe_dump(
                {"env_vars": {"RAY_TRAIN_V2_ENABLED": "1", "RAY_DEDUP_LOGS": "0"}}
            ),
            "backoffLimit": cluster.retries,
            "submitterConfig": {"backoffLimit": 2},
            "submitterPodTemplate": submitter(cluster, name),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": ray_cluster(cluster, groups, name=name, config=f"{name}-run"),
        },
    }
    return [config, network_policy(cluster, name, ports=[]), rayjob]


def standing(spec: RunSpec, cluster: ClusterSpec) -> list[Manifest]:
    """A RayCluster that stays, with the groups that the stages of a run need, for `ddiff submit`.

    Raises:
        ConfigError: As above.
    """
    refuse_secrets(said_of(cluster, spec.model_dump(mode="json")))
    name = object_name(spec.name)
    _, groups = on_groups(spec, cluster)
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": {PART: name}},
        "spec": ray_cluster(cluster, groups, name=name),
    }
    return [network_policy(cluster, name, ports=[SERVE_PORT]), body]


def service(config: Config, cluster: ClusterSpec) -> list[Manifest]:
    """A RayService for a config of `ddiff deploy --publish`.

    Its name is always the same: another cascade in the config is taken up in place, replica by replica; a
    change of the pods starts a new cluster beside the old one, which answers until the new one is ready.

    Raises:
        ConfigError: As above.
    """
    refuse_secrets(said_of(cluster, config.fields))
    spec = config.spec.but(host="0.0.0.0", port=SERVE_PORT)  # noqa: S104 behind a NetworkPolicy
    name = SERVICE
    fields = serve_fields(spec, config.code) | {"proxy_location": "EveryNode"}
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "namespace": cluster.namespace, "labels": {PART: name}},
        "spec": {
            "serveConfigV2": yaml.safe_dump(fields, sort_keys=False),
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": 120,
            "excludeHeadPodFromServeSvc": True,
            "rayClusterConfig": ray_cluster(cluster, hop_groups(spec, cluster), name=name),
        },
    }
    return [network_policy(cluster, name, ports=[SERVE_PORT]), body]


def said_of(cluster: ClusterSpec, fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text that manifests are made of: (where it stands, text)."""
    yield from texts(cluster.model_dump(mode="json"), "cluster")
    yield from texts(fields)


def on_groups(spec: RunSpec, cluster: ClusterSpec) -> tuple[RunSpec, list[Group]]:
    """A run whose stages name all their resources and their groups of nodes, and these groups.

    Raises:
        PlanError: A stage cannot fit even there.
    """
    gpus = [
        stage.but(use_gpu=cluster.gpus if stage.use_gpu is None else stage.use_gpu) for stage in spec.stages
    ]
    plan = plan_of(spec.but(stages=tuple(gpus)), [], run=f"{cluster.storage}/{spec.name}")
    decode = Group("decode", cluster.decode, 0, cluster.decode_nodes, {KIND: "decode"})
    found = [*stage_groups(plan.stages, spec.at_once), decode]
    bound = spec.but(stages=tuple(stage_bound(stage) for stage in plan.stages))
    nodes = [node for group in found for node in group.nodes().nodes()]
    told = zip(plan.stages, bound.stages, strict=True)
    stages = tuple(stage_plan(stage, before.need, nodes, at_once=spec.at_once) for before, stage in told)
    refuse(plan._replace(stages=stages, nodes=tuple(nodes), free=cluster.storage_bytes))
    return bound, found


def stage_bound(plan: StagePlan) -> Any:
    """A stage whose workers run on the group of its kind."""
    spec, cpus = plan.spec, plan.spec.resources.cpus or 1.0
    labels = {**spec.resources.labels, KIND: group_name(spec.stage.kind)}
    memory = plan.reserved_bytes / 2**30
    return spec.but(
        use_gpu=plan.gpu, resources=spec.resources.but(cpus=cpus, memory_gib=memory, labels=labels)
    )


def stage_groups(plans: tuple[StagePlan, ...], at_once: int) -> list[Group]:
    """One group for each kind of stage; empty at first.

    It may grow to what the largest stage of that kind needs, or those that may train side by side.
    """
    found: list[Group] = []
    for kind in dict.fromkeys(plan.spec.stage.kind for plan in plans):
        alike = [plan for plan in plans if plan.spec.stage.kind == kind]
        pod = pod_for(
            cpus=max(plan.spec.resources.cpus or 1.0 for plan in alike),
            memory_bytes=max(plan.reserved_bytes for plan in alike),
            gpus=max(int(plan.gpu) for plan in alike),
            scratch_bytes=max(plan.scratch_bytes for plan in alike),
        )
        labels = {KIND: group_name(kind)}
        for plan in alike:
            labels |= said(plan.spec.resources.labels)
        together = [*((plan,) for plan in alike), *groups(plans, at_once)]
        most = max(sum(plan.spec.num_workers for plan in some if plan in alike) for some in together)
        found.append(Group(group_name(kind), pod, 0, most, labels))
    return found


def said(selectors: Mapping[str, str]) -> dict[str, str]:
    """Labels that fulfil these selectors: of several allowed values the first, none for a negated one."""
    chosen = {}
    for name, selector in selectors.items():
        if not selector.startswith("!"):
            inside = re.fullmatch(r"in\((.*)\)", selector)
            chosen[name] = inside[1].split(",")[0].strip() if inside else selector
    return chosen


def hop_groups(spec: ServeSpec, cluster: ClusterSpec) -> list[Group]:
    """Nodes for the replicas of the hops: a group for hops that ask for a GPU, one for those that do not.

    At most twice as many as all replicas need, since new ones start before the old ones stop.
    """
    unnamed = max(1, 3 - len(spec.hops))  # a cascade has three hops or so
    hops = [*spec.hops.values(), *[spec.hop] * unnamed]
    found = []
    for gpu in (True, False):
        alike = [hop for hop in hops if bool(hop.num_gpus) is gpu]
        if not alike and gpu:
            continue
        pod = PodSpec(
            cpus=cluster.hop.cpus,
            memory_gib=cluster.hop.memory_gib,
            gpus=max([1, cluster.hop.gpus]) if gpu else 0,
            scratch_gib=cluster.hop.scratch_gib,
        )
        least, most = (nodes_for(alike, pod, which) for which in ("min_replicas", "most_replicas"))
        name = "hops-gpu" if gpu else "hops-cpu"
        found.append(Group(name, pod, max(1, least), max(2, 2 * most), {KIND: name}))
    return found


def nodes_for(hops: list[ReplicaSpec], pod: PodSpec, which: str) -> int:
    """How many pods the replicas of these hops need, hop by hop, each replica whole on one pod."""
    count = 0
    for hop in hops:
        fit = min(
            int(pod.cpus / hop.num_cpus) if hop.num_cpus else 64,
            int(pod.gpus / hop.num_gpus) if hop.num_gpus else 64,
        )
        if not fit:
            raise ConfigError(
                f"a replica wants {hop.num_cpus:g} CPUs and {hop.num_gpus or 0:g} GPUs, a pod of hops has "
                f"{pod.cpus} and {pod.gpus}; raise hop.cpus or hop.gpus of the cluster"
            )
        count += -(-getattr(hop, which) // fit)
    return count


def claim(cluster: ClusterSpec) -> list[Manifest]:
    """The volume for a storage that is a path; all runs share it, so it is in the manifests of none.

    Raises:
        ConfigError: The settings name none.
    """
    if not cluster.claim:
        raise ConfigError(
            f"the settings name no claim, and storage {cluster.storage} needs none; for a storage that is a "
            "path set both, such as claim: ddiff-data and storage: /data/runs"
        )
    spec: Manifest = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{cluster.claim_gib}Gi"}},
    }
    if cluster.claim_class:
        spec["storageClassName"] = cluster.claim_class
    metadata = {"name": cluster.claim, "namespace": cluster.namespace}
    return [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}]


def group_name(kind: str) -> str:
    """noised_clip -> noised-clip."""
    return kind.replace("_", "-")


def object_name(name: str) -> str:
    """The name of a run as Kubernetes accepts it (DNS-1035), with room for what KubeRay adds.

    A name that has to be changed gets a digest at its end, to tell it from others that would look the same.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = plain if plain[:1].isalpha() else f"run-{plain}".rstrip("-")
    if plain == name and len(plain) <= NAME_LENGTH:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{plain[: NAME_LENGTH - 7].rstrip('-')}-{digest}"
