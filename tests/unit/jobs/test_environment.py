"""The environment: secrets stay private, and what the user has set wins."""

import ast
import os
from pathlib import Path

import pytest

from jobs import environment

ROOT = Path(environment.__file__).parents[1]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_token_can_be_read_by_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    token = tmp_path / ".ray" / "auth_token"
    environment.keep_token_private(token)
    assert mode(token) == 0o600
    assert len(token.read_text()) == 64


def test_a_token_that_is_there_is_kept_and_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    token = tmp_path / "auth_token"
    token.write_text("known")
    token.chmod(0o644)
    environment.keep_token_private(token)
    assert (token.read_text(), mode(token)) == ("known", 0o600)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "secret")])
def test_no_token_is_written_where_none_is_needed(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv(name, value)
    environment.keep_token_private(tmp_path / "auth_token")
    assert not (tmp_path / "auth_token").exists()


def test_a_variable_that_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    environment.prepare_environment()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_addresses_come_from_the_environment_and_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DDIFF_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
    assert environment.runs() == "runs"
    assert environment.tracking_uri() is None
    assert not environment.joins_cluster()
    monkeypatch.setenv("DDIFF_STORAGE", "/elsewhere")
    assert environment.runs() == "/elsewhere"


def test_a_dashboard_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(ValueError, match="is a dashboard: hand the command to it with `ddiff submit`"):
        environment.ray_cluster().__enter__()


def test_nobody_else_takes_settings_from_the_environment() -> None:
    """Others may hand a default to a library there, never read one for themselves."""
    for package in ("dd_core", "serve", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            names = {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
            assert path == Path(environment.__file__) or not names & {"environ", "getenv"}, path
