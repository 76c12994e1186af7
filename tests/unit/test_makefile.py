"""What the Makefile does to .venv and to runs, with stand-ins for Python and ddiff that only say so."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs.cluster.spec import ClusterSpec

ROOT = Path(__file__).parents[2]
MADE = """#!/bin/sh
test "$1" = -m || exit {old}
mkdir -p .venv/bin
printf '#!/bin/sh\\necho pip \"$@\"' > .venv/bin/pip
printf '#!/bin/sh\\nexit 0' > .venv/bin/python
chmod +x .venv/bin/*
"""
"""A Python that is too old or is not, and makes a .venv with one that is not."""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def python(path: Path, *, old: bool) -> Path:
    return program(path, MADE.format(old=int(old)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "DDIFF"))}
    return subprocess.run(
        ["make", *words], cwd=folder, env=kept | variables, capture_output=True, text=True, check=False
    )


def test_no_venv_is_made_by_a_python_that_is_too_old(folder: Path) -> None:
    done = make(folder, "install", f"PYTHON={python(folder / 'old', old=True)}")
    assert done.returncode == 2
    assert (
        "old is too old: ddiff needs Python 3.11 or newer; install one or name it: make PYTHON="
        in done.stdout
    )
    assert not (folder / ".venv").exists()
    done = make(folder, "install", "PYTHON=")
    assert (done.returncode, "no python3 found; install Python 3.11" in done.stdout) == (2, True)


@pytest.mark.parametrize("old", [True, False])
def test_a_venv_of_a_python_that_is_too_old_or_gone_is_made_again_and_another_is_kept(
    folder: Path, *, old: bool
) -> None:
    python(folder / ".venv" / "bin" / "python", old=old)
    program(folder / ".venv" / "bin" / "pip", "#!/bin/sh\nexit 0")
    (folder / ".venv" / "kept").touch()
    for _ in range(2):
        done = make(folder, "install", f"PYTHON={python(folder / 'new', old=False)}")
        assert done.returncode == 0, done.stderr
    assert (folder / ".venv" / "kept").exists() is not old
    assert len(list((folder / ".venv").glob("ddiff-runtime-*"))) == 1


def with_ddiff(folder: Path, text: str) -> Path:
    """A .venv that is whole, with a ddiff of ours, and two runs of which one has left an endpoint."""
    python(folder / ".venv" / "bin" / "python", old=False)
    program(folder / ".venv" / "bin" / "pip", "#!/bin/sh\nexit 0")
    make(folder, "install")
    program(folder / ".venv" / "bin" / "ddiff", text)
    (folder / "runs" / "smoke").mkdir(parents=True)
    (folder / "runs" / "a b").mkdir()
    (folder / "runs" / "a b" / "endpoint.json").touch()
    return folder


@pytest.mark.parametrize(
    ("storage", "run"), [({}, "runs/demo"), ({"DDIFF_STORAGE": "s3://bucket/runs"}, "s3://bucket/runs/demo")]
)
def test_the_endpoint_of_the_demo_is_stopped_where_its_run_is_kept(
    folder: Path, storage: dict[str, str], run: str
) -> None:
    done = make(with_ddiff(folder, '#!/bin/sh\necho "said: $*"'), "stop", **storage)
    assert f"said: stop --run {run}\n" in done.stdout


def test_endpoints_are_stopped_before_their_runs_are_removed_or_nothing_is(folder: Path) -> None:
    program(folder / "elsewhere" / "demo" / "endpoint.json", "")
    with_ddiff(folder, '#!/bin/sh\ntest -e "$3/endpoint.json" && echo "said: $*"')
    done = make(folder, "clean", DDIFF_STORAGE=str(folder / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert "said: stop --run runs/a b\n" in done.stdout
    assert f"said: stop --run {folder}/elsewhere/demo\n" in done.stdout
    assert "smoke" not in done.stdout
    assert not (folder / "runs").exists()
    assert not (folder / ".venv").exists()
    with_ddiff(folder, "#!/bin/sh\nexit 70")
    assert make(folder, "clean").returncode == 2
    assert (folder / "runs" / "a b").exists()


def test_without_a_venv_an_endpoint_cannot_be_stopped_which_is_said_and_the_rest_is_removed(
    folder: Path,
) -> None:
    program(folder / "runs" / "a b" / "endpoint.json", '{"pid": 4711}')
    done = make(folder, "clean")
    assert done.returncode == 0, done.stderr
    assert 'endpoint in runs/a b/endpoint.json; its process may still run: {"pid": 4711}\n' in done.stdout
    assert not (folder / "runs").exists()


DOCKER = """#!/bin/sh
case $1 in
  version) echo "Cannot connect to the Docker daemon" >&2; exit {down};;
  *) echo "said: $*";;
esac
"""


@pytest.mark.parametrize(
    ("words", "name"),
    [([], ClusterSpec().image_name), (["IMAGE=registry.example/ddiff:7"], "registry.example/ddiff:7")],
)
def test_the_image_is_built_with_the_name_that_the_manifests_have(
    folder: Path, words: list[str], name: str
) -> None:
    program(folder / "bin" / "docker", DOCKER.format(down=0))
    done = make(folder, "image", *words, PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert f"said: build --file jobs/cluster/Dockerfile --tag {name} .\n" in done.stdout


def test_without_a_docker_daemon_it_is_said_that_one_is_needed(folder: Path) -> None:
    program(folder / "bin" / "docker", DOCKER.format(down=1))
    done = make(folder, "image", PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "Cannot connect to the Docker daemon" in done.stderr
    assert done.stdout == "no Docker daemon answers; start one and run make image again\n"
    (folder / "bin" / "docker").unlink()
    for name in ("make", "bash", "sed", "sh"):
        (folder / "bin" / name).symlink_to(str(shutil.which(name)))
    done = make(folder, "image", PATH=str(folder / "bin"))
    assert (done.returncode, "no docker here" in done.stdout) == (2, True)


PIP = """#!/bin/sh
case $1 in
  install) echo "$*" >> installed;;
  freeze) echo click==8.1.0; echo "torch==2.15.0+cpu"
    if grep -q gcs installed; then echo gcsfs==2026.1.0; fi;;
esac
"""


def test_the_lock_pins_what_every_extra_brings(folder: Path) -> None:
    program(folder / ".venv" / "bin" / "python", "#!/bin/sh\nexit 0")
    program(folder / ".venv" / "bin" / "pip", PIP)
    done = make(folder, "lock")
    assert done.returncode == 0, done.stderr
    pins = (folder / "constraints.txt").read_text().splitlines()
    assert pins == ["click==8.1.0", "torch==2.15.0", "gcsfs==2026.1.0"]
