"""The schemas that the manifests are checked with against those of a checkout of KubeRay (v1.7.0)."""

import pytest

from tests.parity.reference import checkout
from tests.unit.jobs.kuberay import CRDS, published, vendored

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def test_the_schemas_in_tests_are_those_of_the_release() -> None:
    assert vendored()["schemas"] == published(checkout("ray-project/kuberay", CRDS["RayJob"]))
    assert vendored()["files"] == CRDS
