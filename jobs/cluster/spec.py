"""The settings of a Kubernetes cluster that the manifests follow."""

import importlib.metadata
import math
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dd_core.spec import Spec

DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""A name that Kubernetes accepts for an object."""
OBJECT_STORE_SHARE = 0.3
"""Of a node's memory that Ray sets aside for its object store unless told otherwise."""


class PodSpec(Spec):
    """The size of a pod, which is a node of Ray."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    gpus: int = Field(0, ge=0)
    scratch_gib: int = Field(10, ge=1)
    """Asked of its disk, for what is made there before it is sent and for what is fetched."""

    @property
    def memory_bytes(self) -> int:
        """What Ray lets workers reserve of it."""
        return round(self.memory_gib * (1 - OBJECT_STORE_SHARE) * 2**30)

    def resources(self) -> dict[str, Any]:
        """Requests and limits for Kubernetes: equal, so that no pod is evicted in favour of another.

        The disk has no limit: a pod is not evicted only because it writes more than was planned.
        """
        amounts = {"cpu": str(self.cpus), "memory": f"{self.memory_gib}Gi"}
        if self.gpus:
            amounts["nvidia.com/gpu"] = str(self.gpus)
        return {"requests": amounts | {"ephemeral-storage": f"{self.scratch_gib}Gi"}, "limits": amounts}


class ClusterSpec(Spec):
    """Names, addresses and sizes; secrets by the names of their Secret objects alone."""

    kind: Literal["cluster"] = "cluster"
    namespace: DnsName = "ddiff"
    image: str = Field("", pattern=r"^\S*$")
    """Built from jobs/cluster/Dockerfile; empty: ddiff:<version of this installation>."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secret: DnsName | None = None
    """Secret of type kubernetes.io/dockerconfigjson, for an image in a registry that asks who pulls it."""
    service_account: DnsName | None = None
    """Of every pod, made before: its identity to a cloud's stores.  None: the head has one that KubeRay
    makes, the others the default one of the namespace."""
    storage: str = "s3://ddiff/runs"
    """DDIFF_STORAGE of every pod; a path lies on `claim`."""
    s3_endpoint: str = ""
    """Of an S3 that is not Amazon's."""
    storage_secret: DnsName | None = "ddiff-storage"  # noqa: S105 as token_secret
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; None: service_account has the right itself."""
    claim: DnsName | None = None
    """A PersistentVolumeClaim to mount at /data, for a storage that is a path."""
    claim_gib: int = Field(500, ge=1)
    """Its size; a run that writes more is refused."""
    claim_class: str | None = None
    """Its storage class, one that many nodes may write to; None: the default one."""
    mlflow: str = "http://mlflow.mlflow.svc:5000"
    """Tracking server; it must be started with this host name among its allowed hosts."""
    mlflow_secret: DnsName | None = "ddiff-mlflow"  # noqa: S105
    """Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    token_secret: DnsName = "ddiff-ray-token"  # noqa: S105 the name of an object
    """Secret with auth_token: without it nobody can use the cluster."""
    gpus: bool = True
    """Whether a stage that leaves use_gpu open gets GPUs."""
    gpu_nodes: dict[str, str] = Field(default_factory=dict)
    """Labels of the Kubernetes nodes that have them, such as cloud.google.com/gke-accelerator."""
    head: PodSpec = PodSpec(cpus=2, memory_gib=8)
    decode: PodSpec = PodSpec(cpus=8, memory_gib=16)
    """Nodes without a GPU that read and decode."""
    decode_nodes: int = Field(4, ge=0)
    """At most."""
    hop: PodSpec = PodSpec(cpus=4, memory_gib=16)
    """Nodes that serve; one with a GPU where a hop asks for one."""
    grace_s: int = Field(120, ge=30)
    """Grace period of a worker pod that is stopped: Ray announces it, and training there saves."""
    retries: int = Field(1, ge=0)
    """New clusters for a job whose head was lost; each resumes.  A refused run is retried as often."""
    operator_namespace: DnsName = "kuberay-system"
    """May ask the dashboard and Serve."""
    client_namespace: DnsName = "ingress"
    """May send requests to the endpoint."""

    @field_validator("storage")
    @classmethod
    def _storage_can_be_seen_by_all(cls, storage: str) -> str:
        parts = PurePosixPath(storage).parts
        if "://" not in storage and (parts[:2] != ("/", "data") or ".." in parts):
            raise ValueError(f"storage {storage!r} is neither an address (s3://bucket/runs) nor under /data")
        return storage.rstrip("/")

    @model_validator(mode="after")
    def _a_path_lies_on_a_claim(self) -> "ClusterSpec":
        if self.storage_bytes is not None and not self.claim:
            raise ValueError(f"storage {self.storage} is a path: name the claim that is mounted at /data")
        return self

    @property
    def storage_bytes(self) -> int | None:
        """Room for runs, on the claim; None: a store, which does not say."""
        return None if "://" in self.storage else self.claim_gib * 2**30

    @property
    def image_name(self) -> str:
        """The image of every pod."""
        return self.image or f"ddiff:{importlib.metadata.version('ddiff')}"


def pod_for(*, cpus: float, memory_bytes: int, gpus: int, scratch_bytes: int = 0) -> PodSpec:
    """A pod on which a worker of this size fits, with one more CPU for reading and a GiB for Ray itself.

    Args:
        cpus: Of the worker.
        memory_bytes: The same.
        gpus: The same.
        scratch_bytes: What it makes and fetches on its disk, beside what every pod is given.
    """
    gib = math.ceil(memory_bytes / 2**30 / (1 - OBJECT_STORE_SHARE)) + 1
    spare = PodSpec.model_fields["scratch_gib"].default
    scratch = math.ceil(scratch_bytes / 2**30) + spare
    return PodSpec(cpus=math.ceil(cpus) + 1, memory_gib=gib, gpus=gpus, scratch_gib=scratch)
