"""A RayCluster of KubeRay: a head that computes nothing, and groups of workers; no pod runs as root."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray

from jobs.cluster.spec import ClusterSpec, PodSpec
from jobs.environment import SPINS, STOP_S
from jobs.nodes import NodeGroup

PART = "app.kubernetes.io/part-of"
DATA, CONFIG, SCRATCH = "/data", "/etc/ddiff", "/scratch"
LEAVE_S = 20
"""The part of a pod's grace period in which Ray itself ends."""
GROUP_START_S = 1800
"""How long Ray Train waits for nodes that the autoscaler brings; its default is 60 s."""


class Group(NamedTuple):
    """Identical worker pods."""

    name: str
    pod: PodSpec
    least: int
    most: int
    labels: Mapping[str, str]

    def nodes(self) -> NodeGroup:
        """For the plan that is made on the cluster before its nodes are there."""
        return NodeGroup(
            name=self.name,
            count=self.most,
            cpus=self.pod.cpus,
            gpus=self.pod.gpus,
            memory_bytes=self.pod.memory_bytes,
            labels=dict(self.labels),
        )


def ray_cluster(cluster: ClusterSpec, groups: list[Group], *, name: str, config: str = "") -> dict[str, Any]:
    """The spec of a RayCluster.

    Args:
        cluster: Where it will run.
        groups: Its workers.
        name: Of the run or the service; pods are labelled with it.
        config: ConfigMap to mount on the head at /etc/ddiff.
    """
    environment = variables(cluster, groups)
    return {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token", "secretName": cluster.token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": 120},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104 behind a token and
            # a NetworkPolicy
            "template": template(cluster, Group("head", cluster.head, 1, 1, {}), name, environment, config),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.least,
                "minReplicas": group.least,
                "maxReplicas": group.most,
                "rayStartParams": {},
                "labels": dict(group.labels),
                "template": template(cluster, group, name, environment, ""),
            }
            for group in groups
        ],
    }


def variables(cluster: ClusterSpec, groups: list[Group]) -> list[dict[str, str]]:
    """Environment of every pod; nothing secret."""
    found = {
        "DDIFF_STORAGE": cluster.storage,
        "GOMP_SPINCOUNT": SPINS,
        "DDIFF_NODE_GROUPS": json.dumps([group.nodes().model_dump() for group in groups]),
        "MLFLOW_TRACKING_URI": cluster.mlflow,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(GROUP_START_S),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": SCRATCH,
        "RAY_TMPDIR": "/tmp",  # noqa: S108 in the pod: Ray's session stays where KubeRay looks for its logs
    }
    if cluster.s3_endpoint:
        found["AWS_ENDPOINT_URL"] = cluster.s3_endpoint
    return [{"name": name, "value": value} for name, value in found.items()]


def template(
    cluster: ClusterSpec, group: Group, name: str, environment: list[dict[str, str]], config: str
) -> dict[str, Any]:
    """One pod: our image, not root, its secrets by reference, a third of its memory as /dev/shm, a disk."""
    volumes: list[dict[str, Any]] = [
        {
            "name": "shm",
            "emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-group.pod.memory_gib // 3)}Gi"},
        },
        {"name": "scratch", "emptyDir": {}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 in the pod
        {"name": "scratch", "mountPath": SCRATCH},
    ]
    if cluster.claim:
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": cluster.claim}})
        mounts.append({"name": "data", "mountPath": DATA})
    if config:
        volumes.append({"name": "config", "configMap": {"name": config}})
        mounts.append({"name": "config", "mountPath": CONFIG, "readOnly": True})
    secrets = [name for name in (cluster.storage_secret, cluster.mlflow_secret) if name]
    container = {
        "name": f"ray-{'head' if group.name == 'head' else 'worker'}",
        "image": cluster.image_name,
        "imagePullPolicy": cluster.pull_policy,
        "resources": group.pod.resources(),
        "env": environment,
        "envFrom": [{"secretRef": {"name": secret}} for secret in secrets],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod: dict[str, Any] = {
        "containers": [container],
        "volumes": volumes,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    pod |= pulling(cluster)
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if group.name != "head":  # the head's autoscaler talks to Kubernetes, the workers have no need to
        pod["automountServiceAccountToken"] = False
        pod["terminationGracePeriodSeconds"] = cluster.grace_s
        container["lifecycle"] = {
            "preStop": {"exec": {"command": ["/bin/bash", "-c", leaving(cluster.grace_s)]}}
        }
    if group.pod.gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        if cluster.gpu_nodes:
            pod["nodeSelector"] = cluster.gpu_nodes
    return {"metadata": {"labels": {PART: name}}, "spec": pod}


def pulling(cluster: ClusterSpec) -> dict[str, Any]:
    """The secret by which a pod may pull our image, if one is named."""
    return {"imagePullSecrets": [{"name": cluster.pull_secret}]} if cluster.pull_secret else {}


def submitter(cluster: ClusterSpec, name: str) -> dict[str, Any]:
    """The pod that hands a RayJob to its cluster: as KubeRay makes it, with our label and the pull secret.

    `network_policy` lets it in by the label: KubeRay itself labels this pod since 1.7 only.  Its command is
    left to KubeRay.
    """
    container = {
        "name": "ray-job-submitter",
        "image": cluster.image_name,
        "resources": {
            "requests": {"cpu": "500m", "memory": "200Mi"},
            "limits": {"cpu": "1", "memory": "1Gi"},
        },
    }
    pod = {"restartPolicy": "Never", **pulling(cluster), "containers": [container]}
    return {"metadata": {"labels": {PART: name}}, "spec": pod}


def leaving(grace_s: int) -> str:
    """The command of a worker pod before it is stopped: Ray tells training there to save and go on elsewhere.

    SIGTERM would not do: KubeRay's shell does not pass it on.
    """
    seconds = grace_s - LEAVE_S
    announced = f"--reason DRAIN_NODE_REASON_PREEMPTION --deadline-remaining-seconds {seconds}"
    return f"ray drain-node {announced} --reason-message 'the pod is stopped' && sleep {seconds}"


def network_policy(cluster: ClusterSpec, name: str, *, ports: list[int]) -> dict[str, Any]:
    """Who may reach the pods: each other, the operator, and clients at these ports; nobody else."""

    def from_namespace(namespace: str, allowed: list[int]) -> dict[str, Any]:
        selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
        return {
            "from": [{"namespaceSelector": selector}],
            "ports": [{"protocol": "TCP", "port": port} for port in allowed],
        }

    ours = {"podSelector": {"matchLabels": {PART: name}}}
    ingress = [
        {"from": [ours]},
        from_namespace(cluster.operator_namespace, [8265, *ports]),
        *([from_namespace(cluster.client_namespace, ports)] if ports else []),
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": cluster.namespace},
        "spec": {"podSelector": ours["podSelector"], "policyTypes": ["Ingress"], "ingress": ingress},
    }
