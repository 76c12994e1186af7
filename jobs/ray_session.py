"""Ray while a command works with it: the cluster that is joined, or one of our own on this machine."""

import contextlib
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from jobs import environment
from jobs.dashboard import refuse_open
from jobs.signals import sigterm_kept
from workflows import cpus

log = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 2**30
"""Of a Ray that we start ourselves, without GPUs; what flows through it is small images."""
STORE_SHARE = 4
"""With GPUs, which take them much faster, one part in so many of the shared memory, if that is more."""
STARTS = 6
"""Attempts to start a Ray."""


class RayStartError(RuntimeError):
    """Ray does not come up on this machine."""


def own_cpus() -> int:
    """CPUs in the accounting of a Ray of our own."""
    return max(4, cpus.available())


def object_store_bytes(devices: Path = Path("/dev")) -> int:
    """Of a Ray of our own; `devices` is where the system shows GPUs and shared memory."""
    if not any(devices.glob("nvidia[0-9]*")):
        return OBJECT_STORE_BYTES
    return max(OBJECT_STORE_BYTES, shutil.disk_usage(devices / "shm").free // STORE_SHARE)


@contextlib.contextmanager
def ray_cluster(*, verbose: bool = False) -> Iterator[None]:
    """Ray while the block runs: the cluster at RAY_ADDRESS, else one of our own on this machine.

    Our own has at least four CPUs in Ray's accounting, so that reading goes on beside training on a
    small machine, listens on this machine only, and asks for a token that only its owner can read.

    Raises:
        ValueError: RAY_ADDRESS is a dashboard, which takes jobs and is not joined, or a cluster elsewhere
            that asks for no token.
    """
    environment.refuse_dashboard()
    environment.prepare_environment()
    import ray  # noqa: PLC0415 the variables above are read when ray is imported

    level = logging.INFO if verbose else logging.ERROR
    for handler in logging.getLogger("ray.data").handlers:  # there if the caller has imported ray.data
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(level)
    with sigterm_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Ray on its own future defaults
        if environment.joins_cluster():
            joined = ray.init(address=environment.ray_address(), log_to_driver=verbose, logging_level=level)
            refuse_open_cluster(joined.dashboard_url)
        else:
            keep_token_private(Path.home() / ".ray" / "auth_token")
            start_ray(level, verbose=verbose)
    try:
        yield
    finally:
        with sigterm_kept():
            ray.shutdown()


def refuse_open_cluster(dashboard: str | None) -> None:
    """Leave a cluster elsewhere that runs code for anybody, unless the user has allowed it.

    Raises:
        jobs.dashboard.DashboardError: It is such a cluster; it has been left again.
    """
    import ray  # noqa: PLC0415

    if environment.in_a_job() or not dashboard or environment.auth_mode() == "disabled":
        return  # checked by the submission; no dashboard to ask; or allowed by the user
    try:
        refuse_open(f"http://{dashboard}", unless="set RAY_AUTH_MODE=disabled")
    except ValueError:
        ray.shutdown()
        raise


def start_ray(level: int, *, verbose: bool) -> None:
    """A Ray of our own.

    Its parts wait 15 seconds for each other, which cannot be changed, and on a busy machine with cold
    disks that is too short; the next attempt finds the files in memory.

    Raises:
        RayStartError: All attempts failed.
    """
    import ray  # noqa: PLC0415

    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local",  # without it Ray joins one that `ray start` has left on this machine
                num_cpus=own_cpus(),
                object_store_memory=object_store_bytes(),
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
            )
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
            log.warning("Ray did not start in time, attempt %d of %d: the machine is busy", attempt, STARTS)
            ray.shutdown()
        else:
            return
    raise RayStartError(f"Ray did not start in {STARTS} attempts; run again when the machine is less busy")


def keep_token_private(token: Path) -> None:
    """A token file for Ray that nobody else can read; Ray itself would write a readable one."""
    if environment.auth_mode() != "token" or environment.token_source() == "RAY_AUTH_TOKEN":
        return
    token.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token.chmod(0o600)
        return
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
