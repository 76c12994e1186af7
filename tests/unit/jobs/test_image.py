"""The image that the manifests name: what it is made of, how, and that it runs, where a Docker daemon is."""

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "jobs" / "cluster" / "Dockerfile").read_text()
BASES = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
IGNORED = [
    line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
]


def copied() -> list[str]:
    """What the Dockerfile takes out of this repository."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def expression(pattern: str) -> str:
    """A pattern of .dockerignore, which is one of a path, as a regular expression."""
    parts = re.split(r"(\*\*/|\*|\?|\[[^]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)


def kept_out(path: str) -> bool:
    """Whether Docker is not sent this file: the last pattern of it, or of a folder above it, decides."""
    above = [str(each) for each in (Path(path), *Path(path).parents[:-1])]
    out = False
    for pattern in IGNORED:
        if any(re.fullmatch(expression(pattern.removeprefix("!")), each) for each in above):
            out = not pattern.startswith("!")
    return out


def test_all_that_the_image_is_made_of_is_there_and_is_sent() -> None:
    assert {"constraints.txt", "pyproject.toml", "README.md"} < set(copied())
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not kept_out(source)
    files = [path for source in copied() for path in (ROOT / source).rglob("*")]
    needed = [path for path in files if path.suffix in {".py", ".c", ".css", ".typed"}]
    assert {path.suffix for path in needed} == {".py", ".c", ".css", ".typed"}
    assert [path for path in needed if kept_out(path.relative_to(ROOT).as_posix())] == []


def test_every_package_is_copied_and_installed() -> None:
    listed = re.search(r"^include = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed
    packages = {name.removesuffix("*") for name in re.findall(r'"(.+?)"', listed[1])}
    assert packages == {source for source in copied() if (ROOT / source).is_dir()}
    for package in packages:
        for file in (ROOT / package).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} would not be installed"


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        "jobs/.env",
        "jobs/cluster/.env.production",
        "jobs/.netrc",
        "workflows/.aws/credentials",
        "serve/tls.key",
        "serve/tls.pem",
        "serve/credentials.json",
        "jobs/cluster/secrets.yaml",
        ".git/config",
        ".venv/bin/python",
        "cluster.yaml",
        "serve.yaml",
        "tests/conftest.py",
        "jobs/__pycache__/cli.cpython-311.pyc",
        "dd_core/nets/__pycache__/unet.cpython-311.pyc",
        "jobs/cli.pyc",
        "jobs/.ruff_cache/x",
    ],
)
def test_secrets_runs_and_caches_are_not_sent(path: str) -> None:
    assert kept_out(path)


def test_what_git_ignores_is_not_sent_either() -> None:
    for line in (ROOT / ".gitignore").read_text().splitlines():
        name = line.rstrip("/").replace("*", "x")
        assert kept_out(name), line
        assert kept_out(f"{name}/x"), line


def test_the_image_is_built_as_the_makefile_installs_by_no_root_and_from_what_is_pinned() -> None:
    assert "-c constraints.txt" in DOCKERFILE
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["1000:1000"]
    assert BASES
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base) for base in BASES), BASES


def skipped_without_a_daemon() -> None:
    """The test is skipped, by name, where no Docker daemon answers or it cannot fetch the base image."""
    if not shutil.which("docker"):
        pytest.skip("there is no docker here; the image is not built")
    try:
        done = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        pytest.skip("no Docker daemon answers within 20 s; the image is not built")
    if done.returncode:
        why = done.stderr.strip().splitlines() or ["it does not say why"]
        pytest.skip(f"no Docker daemon answers; the image is not built: {why[-1]}")
    for base in set(BASES):
        got = subprocess.run(["docker", "pull", base], capture_output=True, text=True, check=False)
        if got.returncode:
            pytest.skip(f"{base} cannot be had here; the image is not built: {got.stderr.strip()[-200:]}")


def docker(*words: str) -> str:
    """What a command of Docker prints."""
    done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)  # pip fetches gigabytes
def test_the_image_is_built_and_runs() -> None:
    skipped_without_a_daemon()
    name = "ddiff:built-by-a-test"
    words = ["make", "image", f"IMAGE={name}"]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    inside = ("run", "--rm", "--network", "none", name)
    try:
        assert docker(*inside, "ddiff", "--version").split()[-1] == importlib.metadata.version("ddiff")
        docker(*inside, "python", "-c", "import jobs, serve, workflows, dd_core")
        docker(*inside, "python", "-c", "import jobs.run, jobs.attempts, serve.app, workflows.training")
        assert docker(*inside, "id", "-u").strip() == "1000"
        docker(*inside, "bash", "-c", "ray --version && wget --version")  # what KubeRay calls
    finally:
        docker("image", "rm", "--force", name)
