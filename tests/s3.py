"""A store that speaks S3, in a process of its own (moto)."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

import fsspec
from s3fs import S3FileSystem

from tests.ray_head import free_ports

KEYS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-s3-store",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nobody listens on now."""
    return free_ports(1, host)[0]


def answers(url: str) -> bool:
    """Whether a server answers there, be it with an error."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def until(truth: object, seconds: float = 300.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not truth():  # type: ignore[operator]
        assert time.monotonic() < end, f"{truth} not true after {seconds} s"
        time.sleep(0.1)


@contextlib.contextmanager
def stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """End a process after the block, by SIGTERM and, 20 s later, SIGKILL."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def forgotten_clients() -> Iterator[None]:
    """Empty fsspec's cache of clients before and after: its key lacks an address from the environment."""
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1", keys: Mapping[str, str] = KEYS) -> Iterator[dict[str, str]]:
    """A fresh store with one empty bucket, `bucket`; yields the environment variables that lead to it."""
    port = free_port(host)
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    environment = dict(keys) | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    with stopped(process), forgotten_clients():
        until(lambda: answers(environment["AWS_ENDPOINT_URL"]))
        fs = fsspec.filesystem(
            "s3",
            key=keys["AWS_ACCESS_KEY_ID"],
            secret=keys["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            skip_instance_cache=True,
        )
        fs.mkdir("bucket")
        yield environment
