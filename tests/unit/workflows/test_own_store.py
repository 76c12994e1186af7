"""The store of a run is whole or not there, and one that holds runs is never touched."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from workflows.own_store import ensure, holds_runs

TABLES = "CREATE TABLE runs (id); CREATE TABLE alembic_version (version_num);"


def filled(store: Path, statements: str) -> Path:
    with closing(sqlite3.connect(store)) as opened:
        opened.executescript(statements)
    return store


def make(uri: str) -> None:
    filled(Path(uri.removeprefix("sqlite:///")), f"{TABLES} INSERT INTO alembic_version VALUES ('new')")


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", False),
        ("CREATE TABLE runs (id)", False),
        (TABLES, False),
        (f"{TABLES} INSERT INTO alembic_version VALUES ('old')", False),
        (f"{TABLES} INSERT INTO alembic_version VALUES ('new')", True),  # nothing was sent there yet
        (f"{TABLES} INSERT INTO alembic_version VALUES ('old'); INSERT INTO runs VALUES (1)", True),
    ],
)
def test_only_a_store_that_was_cut_short_is_made_anew(tmp_path: Path, before: str, kept: bool) -> None:
    store = filled(tmp_path / "mlflow.db", before)
    held, was = holds_runs(store), store.stat().st_ino
    ensure(store, make)
    assert (store.stat().st_ino == was) == kept
    assert holds_runs(store) == held == ("INTO runs" in before)
    if not held:
        with closing(sqlite3.connect(store)) as opened:
            assert opened.execute("SELECT version_num FROM alembic_version").fetchall() == [("new",)]
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def broken(uri: str) -> None:
        filled(Path(uri.removeprefix("sqlite:///")), TABLES)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(tmp_path / "mlflow.db", broken)
    assert not [*tmp_path.iterdir()]


def test_what_is_no_database_may_hold_runs_and_is_left_to_mlflow_to_refuse(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    store.write_bytes(b"no database at all" * 100)
    ensure(store, make)
    assert store.read_bytes().startswith(b"no database")
