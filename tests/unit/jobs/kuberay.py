"""What KubeRay 1.7.0 (`ray.io/v1`) and Kubernetes accept of our manifests, strictly.

RayCluster, RayJob and RayService are held against the schemas that KubeRay publishes (tests/data/README.md),
made strict: a field that they do not name is refused.  Written by hand is what those leave open: the form of
names, labels and words of pods, what the operator refuses besides, and core objects, which are not KubeRay's.
Rules in CEL are not evaluated; none is about a field of ours.

To renew the data, and then to name them here:

    git clone --depth 1 --branch v1.7.0 https://github.com/ray-project/kuberay
    python -m tests.unit.jobs.kuberay kuberay
"""

import functools
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Schema = dict[str, Any]
DATA = Path(__file__).parents[2] / "data"
PUBLISHED = DATA / "kuberay-v1.7.0.json.gz"
CRDS = {
    kind: f"helm-chart/kuberay-operator/crds/ray.io_{kind.lower()}s.yaml"
    for kind in ("RayCluster", "RayJob", "RayService")
}
"""Kind -> where a checkout of KubeRay defines it."""
TEXT: Schema = {"type": "string", "minLength": 1}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
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
AMOUNTS: Schema = {
    "type": "object",
    "propertyNames": {"enum": ["cpu", "memory", "nvidia.com/gpu", "storage", "ephemeral-storage"]},
    "additionalProperties": QUANTITY,
}
RESOURCES: Schema = {
    "type": "object",
    "properties": {"requests": AMOUNTS, "limits": AMOUNTS},
    "additionalProperties": False,
}


def published(checkout: Path) -> dict[str, Schema]:
    """Kind -> its schema in v1, from a checkout of KubeRay.  They have no descriptions."""
    found = {}
    for kind, file in CRDS.items():
        crd = yaml.load((checkout / file).read_text(), Loader=yaml.CSafeLoader)
        (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
        found[kind] = version["schema"]["openAPIV3Schema"]
    return found


def vendor(checkout: Path) -> Path:
    """Write the schemas of a checkout at a release into tests/data; equal schemas make equal bytes."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    version = git("describe", "--tags", "--exact-match")
    content = {
        "source": "https://github.com/ray-project/kuberay",
        "version": version,
        "commit": git("rev-parse", "HEAD"),
        "licence": "Apache-2.0",
        "files": CRDS,
        "schemas": published(checkout),
    }
    file = DATA / f"kuberay-{version}.json.gz"
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    file.write_bytes(gzip.compress(text.encode(), mtime=0))
    return file


@functools.cache
def vendored() -> dict[str, Any]:
    """What tests/data has: the schemas, and of what they are."""
    return json.loads(gzip.decompress(PUBLISHED.read_bytes()))


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as one of JSON that refuses fields it does not know.

    Defaults are not filled in as an API server would: what is required must stand in the document.
    """
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value
        if key in ("default", "enum", "required")
        else {name: strict(one) for name, one in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
    }
    if made.get("x-kubernetes-int-or-string"):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if made.get("nullable"):
        made["type"] = [made["type"], "null"]
    open_ended = made.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and "additionalProperties" not in made and not open_ended:
        made["additionalProperties"] = False
    return made


def fields(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return partly(**properties) | {"required": required.split(), "additionalProperties": False}


def partly(**properties: Schema) -> Schema:
    """An object in which these fields, where they stand, are so; what else stands there others check."""
    return {"type": "object", "properties": properties}


def some(item: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": item}


def choice(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "enum": list(values)}


META = fields("name namespace", name=NAME, namespace=NAME, labels=LABELS)
SELECTOR = fields(matchLabels=TEXTS)


def manifest(version: str, kind: str, **body: Schema) -> Schema:
    """A whole object."""
    return fields(
        f"apiVersion kind metadata {' '.join(body)}",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=META,
        **body,
    )


CORE: dict[tuple[str, str], Schema] = {
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
                        "ports": some(
                            fields(
                                "protocol port",
                                protocol=choice("TCP", "UDP"),
                                port={"type": "integer", "minimum": 1, "maximum": 65535},
                            )
                        ),
                    }
                )
            ),
        ),
    ),
}
"""(apiVersion, kind) -> its schema."""
TEMPLATE = partly(
    metadata=partly(labels=LABELS),
    spec=partly(
        containers=some(
            partly(
                name=NAME,
                image=TEXT,
                imagePullPolicy=choice("Always", "IfNotPresent", "Never"),
                resources=RESOURCES,
                env=some(partly(name=TEXT)),
                envFrom=some(partly(secretRef=partly(name=NAME))),
                volumeMounts=some(partly(name=NAME, mountPath=TEXT)),
            )
        )
        | {"minItems": 1},
        volumes=some(
            partly(
                name=NAME,
                emptyDir=partly(medium=choice("Memory"), sizeLimit=QUANTITY),
                persistentVolumeClaim=partly(claimName=NAME),
                configMap=partly(name=NAME),
            )
        ),
        securityContext=partly(
            seccompProfile=partly(type=choice("RuntimeDefault", "Unconfined", "Localhost"))
        ),
        tolerations=some(
            partly(
                operator=choice("Exists", "Equal"),
                effect=choice("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        nodeSelector=LABELS,
        serviceAccountName=NAME,
        imagePullSecrets=some(partly(name=NAME)),
        restartPolicy=choice("Always", "OnFailure", "Never"),
        terminationGracePeriodSeconds={"minimum": 0},
    ),
)
"""Of a pod, what Kubernetes refuses where the published schemas, which name all fields, say only types."""
CLUSTER_IN = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
"""Where in the spec of an object its cluster is."""
NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""Letters, at most."""


@functools.cache
def checker(version: str, kind: str) -> jsonschema.Draft7Validator:
    """The strict schema of a kind."""
    if (version, kind) in CORE:
        return jsonschema.Draft7Validator(CORE[version, kind])
    assert version == "ray.io/v1"
    spec = strict(vendored()["schemas"][kind])["properties"]["spec"]  # a manifest of ours has no status
    return jsonschema.Draft7Validator(manifest(version, kind, spec=spec))


def errors(document: dict[str, Any]) -> list[str]:
    """Why a manifest would be refused, each with its place."""
    found = list(places(checker(document["apiVersion"], document["kind"]), document))
    return found or list(refused(document) if document["kind"] in CLUSTER_IN else ())


def places(validator: jsonschema.Draft7Validator, document: Any, above: str = "") -> Iterator[str]:
    """Errors of a schema."""
    for error in validator.iter_errors(document):
        yield f"{above}{'/'.join(map(str, error.path))}: {error.message[:200]}"


def refused(document: dict[str, Any]) -> Iterator[str]:
    """What is refused although the published schemas allow it, of our fields.

    By the operator (its utils/validation.go) or, when it makes the pods, by Kubernetes.
    """
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
        if not 0 <= group.get("minReplicas", 0) <= group.get("maxReplicas", 0):
            yield f"{name}: minReplicas {group['minReplicas']} < 0 or > maxReplicas {group['maxReplicas']}"
        if "labels" in group["rayStartParams"]:
            yield f"{name}: labels among rayStartParams"
        yield from places(jsonschema.Draft7Validator(LABELS), group.get("labels", {}), f"{name}/labels/")
        yield from refused_pod(group["template"], f"{name}/template/")
    if "submitterPodTemplate" in spec:
        yield from refused_pod(spec["submitterPodTemplate"], "submitterPodTemplate/")


def refused_pod(template: dict[str, Any], above: str) -> Iterator[str]:
    """Likewise, of a pod."""
    yield from places(jsonschema.Draft7Validator(TEMPLATE), template, above)
    volumes = {volume["name"] for volume in template["spec"].get("volumes", ())}
    for container in template["spec"]["containers"]:
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"{above}spec/volumes: none is called {mount['name']}, which a container mounts"


if __name__ == "__main__":
    print(vendor(Path(sys.argv[1])))  # noqa: T201
