"""One application for all tests of a file that only ask."""

from collections.abc import Iterator

import pytest

from tests.unit.serve.endpoint import Served


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    one = Served()
    with one.client:
        yield one
