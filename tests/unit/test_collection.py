"""What `-m ray` does not collect holds no test that starts a Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import names_ray, pytest_collection_modifyitems, pytest_ignore_collect

HERE = Path(__file__).parents[1]


def asked(expression: str) -> Any:
    return SimpleNamespace(option=SimpleNamespace(markexpr=expression))


@pytest.mark.parametrize(
    "text", ["@needs_ray\ndef", "pytestmark = [pytest.mark.ray]", "pytestmark = RAY_MARKS", "@mark.ray"]
)
def test_a_file_that_names_the_mark_is_collected(text: str, tmp_path: Path) -> None:
    file = tmp_path / "test_a.py"
    file.write_text(text)
    assert pytest_ignore_collect(file, asked("ray")) is None


def test_others_are_passed_by_where_these_alone_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "test_a.py"
    file.write_text("import ray\n\npytestmark = pytest.mark.rays")
    assert pytest_ignore_collect(file, asked("ray")) is True
    for expression in ("not ray", "", "ray or slow"):
        assert pytest_ignore_collect(file, asked(expression)) is None
    assert pytest_ignore_collect(tmp_path, asked("ray")) is None
    assert names_ray(HERE / "acceptance" / "test_smoke.py")


def test_a_marked_test_in_a_file_that_does_not_name_the_mark_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "test_a.py"
    file.write_text("from elsewhere import test_it")
    marked: Any = SimpleNamespace(
        path=file, nodeid="test_a.py::test_it", get_closest_marker=lambda name: name
    )
    with pytest.raises(pytest.UsageError, match=r"test_a\.py::test_it is marked `ray`"):
        pytest_collection_modifyitems([marked])
