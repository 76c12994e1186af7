"""What KubeRay 1.7.0 (`ray.io/v1`) and Kubernetes accept of the fields that our manifests use, strictly.

Written by hand from the types of KubeRay v1.7.0 (Apache-2.0); tests/parity/test_kuberay.py holds it, and the
manifests, against the published CRDs where a checkout of them is: what they require is required here, and of
words that they list these are listed.  A field that is not here is refused.
"""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(m|Ki|Mi|Gi|Ti)?$"}
LABELS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"},
    "additionalProperties": {
        "type": "string",
        "pattern": r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$",
    },
}


def fields(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def some(item: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": item}


def choice(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "enum": list(values)}


AMOUNTS: Schema = {
    "type": "object",
    "propertyNames": {"enum": ["cpu", "memory", "nvidia.com/gpu", "storage", "ephemeral-storage"]},
    "additionalProperties": QUANTITY,
}
RESOURCES = fields(requests=AMOUNTS, limits=AMOUNTS)
CONTAINER = fields(
    "name image resources",
    name=NAME,
    image=TEXT,
    imagePullPolicy=choice("Always", "IfNotPresent", "Never"),
    resources=RESOURCES,
    env=some(fields("name value", name=TEXT, value={"type": "string"})),
    envFrom=some(fields("secretRef", secretRef=fields("name", name=NAME))),
    volumeMounts=some(fields("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
    securityContext=fields(allowPrivilegeEscalation=FLAG, capabilities=fields(drop=some(TEXT))),
    lifecycle=fields(preStop=fields(exec=fields("command", command=some(TEXT)))),
)
VOLUME = fields(
    "name",
    name=NAME,
    emptyDir=fields(medium=choice("Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=fields("claimName", claimName=NAME),
    configMap=fields("name", name=NAME),
)
POD = fields(
    "containers",
    containers=some(CONTAINER),
    volumes=some(VOLUME),
    securityContext=fields(
        runAsNonRoot=FLAG,
        runAsUser=COUNT,
        runAsGroup=COUNT,
        fsGroup=COUNT,
        seccompProfile=fields("type", type=choice("RuntimeDefault", "Unconfined", "Localhost")),
    ),
    automountServiceAccountToken=FLAG,
    tolerations=some(
        fields(
            key=TEXT,
            operator=choice("Exists", "Equal"),
            effect=choice("NoSchedule", "PreferNoSchedule", "NoExecute"),
        )
    ),
    nodeSelector=TEXTS,
    serviceAccountName=NAME,
    imagePullSecrets=some(fields("name", name=NAME)),
    restartPolicy=choice("Never"),
    terminationGracePeriodSeconds=COUNT,
)
TEMPLATE = fields("spec", metadata=fields(labels=LABELS), spec=POD)
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode=choice("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version=choice("v1", "v2"),
        upscalingMode=choice("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
    ),
    headGroupSpec=fields(
        "template",
        serviceType=choice("ClusterIP", "NodePort", "LoadBalancer"),
        rayStartParams=TEXTS,
        template=TEMPLATE,
    ),
    workerGroupSpecs=some(
        fields(
            "groupName minReplicas maxReplicas template",
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            labels=LABELS,
            template=TEMPLATE,
        )
    ),
)
META = fields("name namespace", name=NAME, namespace=NAME, labels=LABELS)


def manifest(version: str, kind: str, **body: Schema) -> Schema:
    """A whole object."""
    return fields(
        f"apiVersion kind metadata {' '.join(body)}",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=META,
        **body,
    )


SELECTOR = fields(matchLabels=TEXTS)
CLUSTER_IN = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
"""Where in the spec of an object its cluster is."""
NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""Letters, at most."""


def refused(document: dict[str, Any]) -> Iterator[str]:
    """What the operator refuses although the schemas allow it (its utils/validation.go), of our fields."""
    kind, spec = document["kind"], document["spec"]
    if len(document["metadata"]["name"]) > NAME_LENGTH[kind]:
        yield f"a name of more than {NAME_LENGTH[kind]} letters"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    cluster = spec[CLUSTER_IN[kind]] if CLUSTER_IN[kind] else spec
    version = tuple(map(int, cluster["rayVersion"].split(".")[:2]))
    if cluster["authOptions"]["mode"] == "token" and version < (2, 52):
        yield "a token needs Ray 2.52"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        name = group.get("groupName", "head")
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            yield f"{name}: minReplicas {group['minReplicas']} > maxReplicas {group['maxReplicas']}"
        if not group["template"]["spec"]["containers"]:
            yield f"{name}: no container"
        if "labels" in group["rayStartParams"]:
            yield f"{name}: labels among rayStartParams"


SCHEMAS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): manifest("ray.io/v1", "RayCluster", spec=RAY_CLUSTER),
    ("ray.io/v1", "RayJob"): manifest(
        "ray.io/v1",
        "RayJob",
        spec=fields(
            "entrypoint rayClusterSpec",
            entrypoint=TEXT,
            metadata=TEXTS,
            runtimeEnvYAML=TEXT,
            backoffLimit=COUNT,
            submitterConfig=fields(backoffLimit=COUNT),
            submitterPodTemplate=TEMPLATE,
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=COUNT,
            rayClusterSpec=RAY_CLUSTER,
        ),
    ),
    ("ray.io/v1", "RayService"): manifest(
        "ray.io/v1",
        "RayService",
        spec=fields(
            "serveConfigV2 rayClusterConfig",
            serveConfigV2=TEXT,
            upgradeStrategy=fields(
                "type", type=choice("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
            ),
            rayClusterDeletionDelaySeconds=COUNT,
            excludeHeadPodFromServeSvc=FLAG,
            rayClusterConfig=RAY_CLUSTER,
        ),
    ),
    ("v1", "ConfigMap"): manifest("v1", "ConfigMap", data=TEXTS),
    ("v1", "PersistentVolumeClaim"): manifest(
        "v1",
        "PersistentVolumeClaim",
        spec=fields(
            "accessModes resources",
            accessModes=some(choice("ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany")),
            resources=RESOURCES,
            storageClassName=NAME,
        ),
    ),
    ("networking.k8s.io/v1", "NetworkPolicy"): manifest(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        spec=fields(
            "podSelector policyTypes ingress",
            podSelector=SELECTOR,
            policyTypes=some(choice("Ingress", "Egress")),
            ingress=some(
                fields(
                    **{
                        "from": some(fields(podSelector=SELECTOR, namespaceSelector=SELECTOR)),
                        "ports": some(fields("protocol port", protocol=choice("TCP", "UDP"), port=COUNT)),
                    }
                )
            ),
        ),
    ),
}
