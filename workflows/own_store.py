"""The store of a run that names no server: <run>/mlflow.db, an SQLite file that is there whole or not at all.

MLflow creates one by some 1,700 statements, not in one transaction: a store that a kill left half made
is of no use to it, and it cannot repair one.
"""

import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from workflows.storage import Home

logger = logging.getLogger(__name__)


def store_of(run: Home) -> Path:
    """Where the store of a run is, once it has one."""
    return run.here / "mlflow.db"


def holds_runs(store: Path) -> bool:
    """Whether a store holds runs; True for a file that cannot be read now, since it may hold some."""
    if not store.exists():
        return False
    try:
        with closing(sqlite3.connect(store)) as opened:  # rolls back what a kill left half written
            if opened.execute("SELECT 1 FROM sqlite_master WHERE name = 'runs'").fetchone() is None:
                return False
            return opened.execute("SELECT 1 FROM runs LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return True


def ensure(store: Path, make: Callable[[str], object]) -> None:
    """Ensure that the store is whole: one that holds runs is left alone, one that was cut short is made anew.

    Args:
        store: The file.
        make: Creates a store at an SQLAlchemy URL, in place.

    Raises:
        OSError: The disk is full.
    """
    if holds_runs(store):
        return
    with tempfile.TemporaryDirectory(prefix="ddiff-") as place:  # MLflow keeps the file that it made open
        made = Path(place) / store.name
        make(f"sqlite:///{made}")
        if store.exists():
            if version(store) == version(made):
                return
            logger.warning("tracking: %s was cut short while it was made and is made anew", store)
        draft = store.with_name(f".{store.name}")
        shutil.copyfile(made, draft)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    store.with_name(f"{store.name}-journal").unlink(missing_ok=True)  # of an earlier store, which is gone
    draft.replace(store)


def version(store: Path) -> str:
    """Alembic's version of the tables, final when the last of them is made; empty before the first."""
    with closing(sqlite3.connect(store)) as opened:
        if opened.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone() is None:
            return ""
        found = opened.execute("SELECT version_num FROM alembic_version").fetchone()
    return str(found[0]) if found else ""
