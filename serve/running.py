"""The application run from this machine: put on the air, awaited, and taken off again in good order."""

import errno
import json
import logging
import math
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid

import ray.serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.handle import DeploymentHandle

from dd_core import bundle
from dd_core.cascade import CascadeSpec
from dd_core.precision import Precision
from serve.app import APPLICATION, build
from serve.fetching import on_this_machine
from serve.spec import ReplicaSpec, ServeSpec

log = logging.getLogger(__name__)
OWNER = b"ddiff-serve-owner"
"""Key under which Ray keeps who deployed what is running."""
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens what is served here without the environment's proxies, to which its address is another machine's."""
ASKED, ANSWER_S = 6, 10.0
"""How often an ingress that has images in progress is asked for them, and how long each answer may take."""
SENDING_S = 1.0
"""Time for the last images to pass Serve's proxy after all have been drawn."""


class ServeError(RuntimeError):
    """The cascade cannot be served; the message says what to do."""


class PortError(ServeError):
    """Serve cannot listen at the address that was asked for."""


def run(spec: ServeSpec, *, blocking: bool = False) -> str:
    """Serve a cascade from this machine and return its address once every hop has drawn an image.

    Ray is started if it is not running.  A Serve that is already running keeps its own address.

    Args:
        spec: What and how.
        blocking: Return only after a signal, when everything is stopped.

    Raises:
        PortError: The port is taken.
        ServeError: The hops do not come up in time.
        ValueError, dd_core.sealed.SealError: As `build` does.
    """
    cascade, digest = bundle.read_cascade(on_this_machine(spec.cascade, spec.digest), spec.digest)
    url = f"http://{spec.host}:{spec.port}"
    if not serving(url):
        refuse_taken_port(spec.host, spec.port)
    ray.serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=spec.host, port=spec.port),
        logging_config={"enable_access_log": False},
    )
    placed = on_gpus(spec, cascade, ray.cluster_resources().get("GPU", 0))
    target = ray.serve.RunTarget(build(placed.model_dump()), name=APPLICATION, route_prefix="/")
    fresh = APPLICATION not in ray.serve.status().applications
    _internal_kv_put(OWNER, me := uuid.uuid4().bytes)
    ray.serve.run_many([target], wait_for_applications_running=False)
    mine = (me, owner()[1])
    try:
        await_ready(url, digest, spec)
    except BaseException as error:
        if fresh and owner() == mine:  # it would be served later, with nobody there to stop it
            leave()
        if isinstance(error, ServeError) and not fresh:
            raise ServeError(f"{error}; what was on the air may be half replaced: serve it again") from None
        raise
    log.info("serving %s at %s", digest[:12], url)
    if blocking:
        wait(spec.timeout_s, mine)
    return url


def owner() -> tuple[bytes | None, float]:
    """Identifies what is deployed: changes with each `ddiff serve`, and with each config deployed."""
    found = ray.serve.status().applications.get(APPLICATION)
    return _internal_kv_get(OWNER), found.last_deployed_time_s if found else 0.0


def on_gpus(spec: ServeSpec, cascade: CascadeSpec, gpus: float) -> ServeSpec:
    """The spec with a share of a GPU for each replica that does not say what it wants.

    They fit into what is left by those that do.

    Raises:
        ServeError: That is nothing.
    """
    asked = [spec.hops.get(stage, spec.hop) for stage in {hop.stage for hop in cascade.hops}]
    named = sum(hop.most_replicas * (hop.num_gpus or 0) for hop in asked)
    sharing = [hop.most_replicas for hop in asked if hop.num_gpus is None]
    left, most = round(gpus - named, 4), max(1, sum(sharing) + len(sharing))
    part = named and 0 < left < 1  # what they leave of a GPU
    share = math.floor(10_000 * left / most) / 10_000 if part else gpu_share(left, most)
    if named and sharing and gpus and not share:
        raise ServeError(
            f"the hops that name num_gpus may take {named:g} of {gpus:g} GPUs; name it of the others, too: "
            "0 for CPUs"
        )

    def placed(hop: ReplicaSpec) -> ReplicaSpec:
        return hop.but(num_gpus=share) if hop.num_gpus is None else hop

    return spec.but(hop=placed(spec.hop), hops={name: placed(hop) for name, hop in spec.hops.items()})


def gpu_share(gpus: float, replicas: int) -> float:
    """A replica's share of one GPU.

    Args:
        gpus: With less than a whole one there is no share.
        replicas: That must fit: as many as autoscaling may start, and one of each hop that replaces another
            while that answers.

    Returns:
        The largest that lets so many fit, none on two GPUs, in Ray's unit of 1 / 10,000.
    """
    return 0.0 if gpus < 1 else math.floor(10_000 / math.ceil(replicas / math.floor(gpus))) / 10_000


def wait(limit_s: float, mine: tuple[bytes | None, float]) -> None:
    """Until Ctrl-C or SIGTERM; then stop serving, letting requests in progress finish.

    Args:
        limit_s: Longest time for these; a second signal cuts it short.
        mine: What `owner` says unless somebody else has taken over; in that case theirs is left as it is.
    """
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()
    stopped.clear()
    if owner() != mine:
        log.warning("another has taken over what was served here; theirs stays on the air")
        return
    drain(limit_s, hurried=stopped)
    leave()


def drain(limit_s: float, *, hurried: threading.Event) -> None:
    """Begin no more images, and wait for those in progress, at most so long and until `hurried` is set."""
    until = time.monotonic() + limit_s
    try:
        ingress = ray.serve.get_deployment_handle("Ingress", APPLICATION)
        while drained(ingress, hurried) and time.monotonic() < until:
            if hurried.wait(0.2):
                return
    except Exception as error:  # noqa: BLE001 - whatever has gone wrong with it, serving must stop
        log.warning("stopping at once: %s", type(error).__name__)
    else:
        hurried.wait(SENDING_S)


def drained(ingress: DeploymentHandle, hurried: threading.Event) -> int:
    """Tell each replica of the ingress to begin no more images; how many are in progress.

    Raises:
        TimeoutError: Not all have answered, however often they were asked, or it is to be hurried.
    """
    for left in reversed(range(ASKED)):
        try:
            return sum(ingress.broadcast("drain").results(timeout_s=ANSWER_S))
        except TimeoutError:  # its images are worth some patience with a busy machine
            if not left or hurried.is_set():
                raise
    raise AssertionError


def leave() -> None:
    """Stop serving; a Serve that has applications of others as well goes on with them."""
    if ray.serve.status().applications.keys() - {APPLICATION}:
        ray.serve.delete(APPLICATION)
    else:
        ray.serve.shutdown()


def serving(url: str) -> bool:
    """Whether one of ours answers there already: this run will replace what it serves."""
    try:
        with DIRECT.open(f"{url}/health/live", timeout=10) as response:
            return bool(json.load(response) == {"status": "live"})
    except (OSError, ValueError):
        return False


def refuse_taken_port(host: str, port: int) -> None:
    """Refuse a port that is taken or not ours, on which Serve would try for ever to listen.

    Raises:
        PortError: Somebody listens there, or this machine has no such address, or keeps the port for root;
            or no host is named, which would be every address.
    """
    if not host:
        raise PortError(f"port {port}: no host is named; use 127.0.0.1, or 0.0.0.0 for every address")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = {
                errno.EADDRINUSE: "stop what listens there or choose another port",
                errno.EACCES: "this machine keeps ports below 1024 for root; choose another port",
            }.get(error.errno or 0, f"{host} is no address of this machine; use 127.0.0.1 or 0.0.0.0")
            raise PortError(f"port {port} of {host}: {error.strerror}; {fix}") from None


def await_ready(url: str, digest: str, spec: ServeSpec) -> None:
    """Until the cascade with this digest answers, and as many replicas of each hop are up as are to be.

    Raises:
        ServeError: It cannot, or did not in time; the message says what is missing.
    """
    until, reason = time.monotonic() + spec.startup_s, ""
    while time.monotonic() < until:
        state = ray.serve.status().applications[APPLICATION]
        reason = missing(url, digest, spec.precision)
        if not reason and state.status == "RUNNING":  # else the former may answer, with other settings
            return
        if state.status == "DEPLOY_FAILED":
            raise ServeError(f"the cascade cannot be served: {cause(state.message)}")
        time.sleep(0.2)
    whys = filter(None, (reason, *(one.message for one in state.deployments.values())))
    why = "; ".join(dict.fromkeys(whys)) or state.status
    raise ServeError(f"{url} is not ready after {spec.startup_s:g} s: {why}; `serve status` says more")


def missing(url: str, digest: str, precision: Precision | None = None) -> str:
    """Why the cascade with this digest does not answer there yet, or nothing; a precision of None is any."""
    try:
        with DIRECT.open(f"{url}/health/ready", timeout=10) as response:
            found = str(response.headers.get("x-model-version"))
            told = response.headers.get("x-precision", "auto")
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")[:300]
    except OSError as error:
        return str(error)
    if found != digest:
        return f"cascade {found[:12]} answers, not {digest[:12]}"
    return "" if precision in (None, told) else f"it answers in {told}, not {precision}"


def cause(message: str) -> str:
    """The line that matters of what Serve says about a replica whose constructor failed."""
    errors = [line.strip() for line in message.splitlines() if "Error: " in line]
    return errors[-1] if errors else message[:300]
