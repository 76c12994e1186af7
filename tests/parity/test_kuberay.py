"""The manifests against the CRDs that KubeRay publishes, where a checkout of it is (v1.7.0)."""

from typing import Any

import jsonschema
import pytest
import yaml

from jobs.cluster.manifests import job, service, standing
from jobs.cluster.spec import ClusterSpec
from jobs.deploy import Config, serve_fields
from jobs.recipes import smoke
from tests.parity.reference import checkout
from tests.unit.jobs.kuberay import SCHEMAS
from tests.unit.jobs.test_manifests import SERVED, SETTINGS

pytestmark = [pytest.mark.parity, pytest.mark.slow]
CRDS = "helm-chart/kuberay-operator/crds"
FILES = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as one of JSON that refuses fields it does not know."""
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
    open_ended = made.get("x-kubernetes-preserve-unknown-fields") or made.get(
        "x-kubernetes-embedded-resource"
    )
    if "properties" in made and "additionalProperties" not in made and not open_ended:
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def crds() -> dict[str, Any]:
    """Kind -> its schema in v1."""
    path = checkout("ray-project/kuberay", f"{CRDS}/ray.io_rayjobs.yaml") / CRDS
    found = {}
    for kind, name in FILES.items():
        crd = yaml.load((path / f"ray.io_{name}.yaml").read_text(), Loader=yaml.CSafeLoader)
        (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
        found[kind] = version["schema"]["openAPIV3Schema"]
    return found


def checked(document: dict[str, Any], schema: Any) -> list[str]:
    hard = strict(schema)
    hard["properties"]["metadata"] = {"type": "object"}
    return [
        f"{'/'.join(map(str, error.path))}: {error.message[:200]}"
        for error in jsonschema.Draft7Validator(hard).iter_errors(document)
    ]


def test_every_manifest_is_of_the_published_schemas(crds: dict[str, Any]) -> None:
    manifests = [
        *(job(smoke.run(), settings)[-1] for settings in (ClusterSpec(), SETTINGS)),
        standing(smoke.run(), SETTINGS)[-1],
        service(Config(serve_fields(SERVED)), ClusterSpec())[-1],
    ]
    for document in manifests:
        assert not checked(document, crds[document["kind"]])
    (wrong, *_) = manifests
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    assert checked(wrong, crds["RayJob"])


def test_our_short_schemas_say_nothing_that_the_published_ones_do_not(crds: dict[str, Any]) -> None:
    """And leave out none of what they demand of the fields that ours know."""
    assert crds.keys() <= {kind for _, kind in SCHEMAS}
    for (_, kind), schema in SCHEMAS.items():
        if kind in crds:
            compare(schema["properties"]["spec"], crds[kind]["properties"]["spec"], kind)


def compare(ours: dict[str, Any], theirs: dict[str, Any], place: str) -> None:
    """Every field of ours is one of theirs and of its type; what they require we do; their words are ours."""
    if theirs.get("x-kubernetes-int-or-string"):
        return
    if "const" not in ours:
        assert ours.get("type") == theirs.get("type"), place
    if "enum" in theirs:
        assert set(ours.get("enum", ())) == set(theirs["enum"]), place
    for name, inner in ours.get("properties", {}).items():
        assert name in theirs["properties"], f"{place}.{name}"
        compare(inner, theirs["properties"][name], f"{place}.{name}")
    if "items" in ours:
        compare(ours["items"], theirs["items"], f"{place}[]")
    if "properties" in ours:  # of what is a map to both, any name may stand
        assert set(theirs.get("required", ())) <= set(ours.get("required", ())), place
