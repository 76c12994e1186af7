"""Which code made a run, by whom and by what command: the tags that MLflow sets itself on runs it starts."""

import getpass
import shlex
import shutil
import subprocess
import sys

from serve import code
from workflows.addresses import redacted

CODE = "ddiff.code"
"""Tag: the digest of the packages (`serve.code`), whether they were committed or not."""


def source_tags() -> dict[str, str]:
    """Tags of an MLflow run; the user and the commit where they can be known."""
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": redacted(shlex.join(["ddiff", *sys.argv[1:]])),
        "mlflow.user": user(),
        "mlflow.source.git.commit": commit(),
        CODE: code.digest(),
    }
    return {name: value for name, value in tags.items() if value}


def user() -> str:
    """Who runs this; empty where the system knows no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def commit() -> str:
    """Commit of the checkout that the code runs from; empty if that is none, or there is no git."""
    git = shutil.which("git")
    if git is None or not (code.ROOT / ".git").exists():
        return ""
    asked = [git, "-C", str(code.ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.strip() if done.returncode == 0 else ""
