"""`ddiff doctor`: what a run needs, tried before there is one; every line ok, warn or fail, with the fix."""

import functools
import importlib.metadata
import logging
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dd_core.addresses import is_address
from jobs import environment
from jobs.dashboard import Dashboard, DashboardError, is_dashboard, without_token
from jobs.endpoint import Address, refuse_taken
from jobs.failures import PortTakenError, line_of, trace_of
from jobs.fit import refusals
from jobs.machines import SPARE_BYTES, Finding, State, gpu, seen_everywhere, skewed, told_of
from jobs.nodes import UNSTARTED, Node, amount, free_disk, node_text, nodes_of, unstarted
from jobs.plan import Plan, on, plan_of
from jobs.ray_session import ray_cluster
from workflows.addresses import redacted
from workflows.registry import DELETES, Registry, RegistryError
from workflows.run_spec import RunSpec
from workflows.storage import opened

log = logging.getLogger(__name__)
LISTEN_S = 5.0
"""How long a head of Ray may take to accept a connection."""


def examine(spec: RunSpec | None, address: Address) -> list[Finding]:
    """Run every check; an error in one becomes its finding and stops no other.

    Args:
        spec: The run whose needs are compared with what there is.
        address: Where the endpoint would listen.
    """
    plan = functools.cache(
        lambda: None if spec is None else plan_of(spec, [], run=f"{environment.runs()}/{spec.name}")
    )
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": versions,
        "cluster": cluster,
        "resources": lambda: resources(plan()),
        "storage": storage,
        "disk": lambda: disk(plan()),
        "mlflow": mlflow,
        **({"nodes": lambda: nodes(plan())} if environment.joins_cluster() else {"gpu": gpu}),
        "clock": clock,
        "port": lambda: port(address),
    }
    return [finding for name, check in checks.items() for finding in findings(name, check)]


def findings(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds, or why it could not be made; passwords in addresses are left out."""
    try:
        yield from (finding._replace(says=redacted(finding.says)) for finding in check())
    except Exception as error:  # noqa: BLE001 each check is of something that may be broken in any way
        log.debug("%s could not be tried:\n%s", name, trace_of(error))
        says, _, fix = line_of(error).rpartition("; ")
        yield Finding(name, "fail", says or fix, fix if says else "run again with -v for the traceback")


def versions() -> Iterator[Finding]:
    """Whether the installed packages are in the versions that ddiff requires."""
    if not installed("ddiff"):
        yield Finding("versions", "warn", "ddiff is not installed, only on the path", "pip install -e .")
        return
    wrong = []
    for name, takes in asked_for().items():
        found = installed(name)
        if not found or not takes.contains(found, prereleases=True):
            wrong.append(f"{name} {found or 'missing'}, needs {takes}")
    if wrong:
        yield Finding(
            "versions", "fail", "; ".join(wrong), "pip install -c constraints.txt -e . in the folder of ddiff"
        )
    else:
        main = ", ".join(f"{name} {installed(name)}" for name in ("ddiff", "ray", "torch", "mlflow"))
        yield Finding("versions", "ok", f"Python {platform.python_version()}, {main}")


def asked_for() -> dict[str, SpecifierSet]:
    """Package -> versions that ddiff requires on this machine; empty if ddiff is not installed."""
    if not installed("ddiff"):
        return {}
    all_of_them = map(Requirement, importlib.metadata.requires("ddiff") or [])
    return {
        one.name: one.specifier
        for one in all_of_them
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }


def installed(name: str) -> str:
    """The version of a distribution; empty if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cluster() -> Iterator[Finding]:
    """Whether the cluster at RAY_ADDRESS answers, asks for a token, and has our version of Ray."""
    address = environment.cluster_address()
    if not address:
        yield Finding(
            "cluster", "ok", "RAY_ADDRESS is not set: a run starts a Ray of its own on this machine"
        )
        return
    if not is_dashboard(address):
        refuse_silence(address)
        joined, address = address, environment.dashboard_of_joined()
        at = address or "it has no dashboard, so jobs cannot be handed to it"
        yield Finding("cluster", "ok", f"{joined} was joined, as a run would; {at}")
        if not address:
            return
    yield asks_for_a_token(address)
    with Dashboard(address) as dashboard:
        theirs = str(dashboard.get("/api/version").get("ray_version"))
    ours = installed("ray")
    if theirs == ours:
        yield Finding("cluster", "ok", f"{address} answers, Ray {theirs}")
    else:
        takes = asked_for().get("ray")
        fix = (
            f"pip install ray=={theirs}"
            if takes is not None and takes.contains(theirs, prereleases=True)
            else f"start the cluster with Ray {ours}, or use the ddiff that was made for {theirs}"
        )
        yield Finding("cluster", "fail", f"{address} runs Ray {theirs}, here is Ray {ours}", fix)


def refuse_silence(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would wait a minute for it.

    Raises:
        DashboardError: Nobody listens at its port.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit():  # `auto` and the like are looked up by Ray
        try:
            socket.create_connection((host, int(port)), timeout=LISTEN_S).close()
        except OSError as error:
            raise DashboardError(
                f"nobody listens at RAY_ADDRESS {address} ({error}); start Ray there, or set it to "
                "a dashboard (http://HEAD:8265) or to nothing"
            ) from None


def asks_for_a_token(address: str) -> Finding:
    """Whether a dashboard refuses requests without a token."""
    status = without_token(f"{address}/api/version").status
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Finding("cluster token", "ok", f"{address} asks for a token")
    if status != httpx.codes.OK:
        return Finding(
            "cluster token",
            "fail",
            f"{address}/api/version says {status} to who shows no token, which is neither yes nor no",
            "see that RAY_ADDRESS is the dashboard itself, such as http://HEAD:8265, with nothing behind it",
        )
    mode = without_token(f"{address}/api/authentication_mode").body
    said = mode.get("authentication_mode", "?") if isinstance(mode, dict) else "?"
    return Finding(
        "cluster token",
        "fail",
        f"{address} runs code for anybody who reaches it (authentication mode {said})",
        "start it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (KubeRay: authOptions.mode: token)",
    )


def resources(plan: Plan | None) -> Iterator[Finding]:
    """Whether every stage of the run fits on the nodes that there are."""
    try:
        nodes = nodes_of()
    except DashboardError:
        what = "the nodes are not known: the cluster does not answer"
        yield Finding("resources", "fail", what, "the line of `cluster` says how to mend it")
        return
    there = listed(nodes)
    if plan is None:
        yield Finding("resources", "ok", f"{there}; name a recipe to compare with what it needs")
        return
    if unstarted(nodes):
        fix = "the job compares before it starts; to do it here, set DDIFF_NODE_GROUPS as its pods have it"
        yield Finding("resources", "warn", f"{there}: {UNSTARTED}", fix)
        return
    lacking = [line for line in refusals(on(plan, nodes)) if not line.startswith("disk: ")]
    for line in lacking:
        what, _, fix = line.rpartition("; ")
        yield Finding("resources", "fail", what, fix)
    if not lacking:
        yield Finding("resources", "ok", f"every stage of {plan.run} fits on {there}")


def listed(nodes: list[Node]) -> str:
    """A few nodes, and how many more."""
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return "; ".join(map(node_text, nodes[:4])) + more if nodes else "no node at all"


def storage() -> Iterator[Finding]:
    """Whether a file can be written where runs are kept, read back, and removed."""
    place = environment.runs()
    files, root = opened(place)
    directory = not is_address(place)  # a bucket is never created here: that would hide a misspelt name
    fresh = directory and not files.exists(root)
    name, content = f"{root}/.ddiff-doctor-{uuid.uuid4().hex}", uuid.uuid4().bytes
    began = time.time()
    step = "made"
    try:
        if directory:
            files.makedirs(root, exist_ok=True)
        step = "written to"
        files.pipe_file(name, content)
        step = "read"
        same = files.cat_file(name) == content
        step = "deleted from"
        files.rm_file(name)
        if fresh:
            files.rmdir(root)
    except Exception as error:  # noqa: BLE001 each store has errors of its own
        fix = "check the address in DDIFF_STORAGE, its permissions and, for s3://, AWS_* and AWS_ENDPOINT_URL"
        yield Finding("storage", "fail", f"{place} cannot be {step}: {line_of(error)}", fix)
        return
    if not same:
        yield Finding(
            "storage", "fail", f"{place} gave back other bytes than were written", "use another store"
        )
        return
    took = time.time() - began
    yield Finding("storage", "ok", f"{place}: written, read and deleted in {took:.2f} s")
    if environment.cluster_address() and not is_address(place):
        yield Finding(
            "storage",
            "warn",
            f"{place} is a directory: every node of the cluster must see it under this name",
            "set DDIFF_STORAGE to s3://... or to a shared directory",
        )


def disk(plan: Plan | None) -> Iterator[Finding]:
    """Whether there is room for what the run writes."""
    place = environment.runs()
    if is_address(place):
        needed = f"; in TMPDIR of each node up to {amount(plan.scratch_bytes)}" if plan else ""
        yield Finding("disk", "ok", f"{place} is a store; how full it may get is its own affair{needed}")
        return
    free = free_disk(Path(place).absolute())
    if plan is not None:
        for line in refusals(plan):
            if line.startswith("disk: "):
                what, _, fix = line.removeprefix("disk: ").rpartition("; ")
                yield Finding("disk", "fail", what, fix)
                return
        needed = f"{plan.run} will hold {amount(sum(plan.disk.values()))}"
        yield Finding("disk", "ok", f"{amount(free)} free at {place}, {needed}")
    elif free < SPARE_BYTES:
        yield Finding("disk", "warn", f"{amount(free)} free at {place}", "free some or set DDIFF_STORAGE")
    else:
        yield Finding("disk", "ok", f"{amount(free)} free at {place}")


def mlflow() -> Iterator[Finding]:
    """Whether a run can be begun, filled, registered and deleted."""
    uri = environment.tracking_uri()
    if not uri:
        state: State = "warn" if environment.cluster_address() else "ok"
        fix = "set MLFLOW_TRACKING_URI to a server that the cluster reaches" if state == "warn" else ""
        yield Finding(
            "mlflow", state, "MLFLOW_TRACKING_URI is not set: each run keeps its own mlflow.db", fix
        )
        return
    if uri.startswith("http"):
        yield from mlflow_server(uri)
    refused = Registry(uri).probe(environment.experiment())
    for what, why in refused.items():
        fix = "check MLFLOW_TRACKING_USERNAME and _PASSWORD and this user's permissions on the server"
        wrong: State = "warn" if what == DELETES else "fail"
        yield Finding("mlflow", wrong, f"{redacted(uri)}: cannot {what}: {why}", fix)
    if not refused:
        yield Finding("mlflow", "ok", f"{redacted(uri)}: began a run, logged, stored, registered, deleted")


def mlflow_server(uri: str) -> Iterator[Finding]:
    """Whether the server has our major version; if it refuses our user, the probe after this says why."""
    answer = without_token(f"{uri.rstrip('/')}/version", user=environment.tracking_user())
    theirs, ours = str(answer.body).strip(), installed("mlflow")
    if answer.status == httpx.codes.UNAUTHORIZED or (
        answer.status == httpx.codes.FORBIDDEN and "Host header" not in theirs
    ):
        return
    if not theirs[:1].isdigit():
        raise RegistryError(
            f"{redacted(uri)} is no MLflow server, or does not know this host name: {theirs:.120}"
        )
    if theirs.split(".")[0] != ours.split(".")[0]:
        yield Finding(
            "mlflow", "warn", f"the server is MLflow {theirs}, here is {ours}", "use one major version"
        )


def nodes(plan: Plan | None) -> Iterator[Finding]:
    """What every node of the cluster says of its disk, its GPU and its clock."""
    if not environment.joins_by_ray():
        says = "their disks, GPUs and clocks are not seen from here: `ddiff submit doctor --follow` asks each"
        yield Finding("nodes", "ok", says)
        return
    with ray_cluster():
        found = seen_everywhere()
    for name, seen in found.items():
        yield from told_of(name, seen, plan.scratch_bytes if plan else 0)


def clock() -> Iterator[Finding]:
    """Whether our clock agrees with those of the servers that we use."""
    servers = [environment.cluster_address(), environment.tracking_uri() or "", environment.store_endpoint()]
    asked = [server for server in servers if is_dashboard(server)]
    if not asked:
        yield Finding("clock", "ok", "no server to compare with")
    for server in asked:
        try:
            skew = without_token(server).skew_s
        except DashboardError as error:
            yield Finding("clock", "warn", str(error), "see the lines about this server")
            continue
        if skew is None:
            yield Finding("clock", "ok", f"{redacted(server)} does not say what time it is")
            continue
        yield skewed(redacted(server), skew)


def port(address: Address) -> Iterator[Finding]:
    """Whether an endpoint can listen here; on a cluster, what Serve already runs there."""
    where = environment.cluster_address()
    if is_dashboard(where):
        with Dashboard(where) as dashboard:
            details = dashboard.get("/api/serve/applications/")
        running, http = ", ".join(details.get("applications") or {}), details.get("http_options") or {}
        if running or (http.get("port") == address.port):
            yield on_the_air(running or "nothing", http, address)
            return
        if not environment.in_a_job():
            says = (
                f"Serve on the cluster runs nothing; port {address.port} of its nodes is not tried from here"
            )
            yield Finding("port", "ok", says)
            return
    try:
        refuse_taken(address)
    except PortTakenError as error:
        yield Finding(
            "port", "fail", str(error).rpartition("; ")[0], "stop what listens there, or use --port"
        )
    else:
        yield Finding("port", "ok", f"{address.host}:{address.port} is free")


def on_the_air(running: str, http: dict[str, Any], address: Address) -> Finding:
    """What Serve runs, and whether at our port: it keeps the port that it was started with."""
    says = f"Serve on the cluster runs {running} at {http.get('host')}:{http.get('port')}"
    if http.get("port") == address.port:
        return Finding("port", "ok", says)
    where = f"--set host={http.get('host')} --set port={http.get('port')}"
    fix = f"deploy with {where}, or `serve shutdown` first"
    return Finding("port", "warn", f"{says}, and not at port {address.port}", fix)


def told(found: list[Finding]) -> str:
    """For people."""
    lines = []
    for finding in found:
        lines.append(f"{finding.state:<5} {finding.check:<14} {finding.says}")
        if finding.fix:
            lines.append(f"{'':<20} fix: {finding.fix}")
    return "\n".join(lines)


def facts_of(found: list[Finding]) -> dict[str, Any]:
    """For programs."""
    worst = "fail" if failed(found) else "warn" if any(one.state == "warn" for one in found) else "ok"
    return {"state": worst, "findings": [finding._asdict() for finding in found]}


def failed(found: list[Finding]) -> bool:
    """Whether a run would fail."""
    return any(finding.state == "fail" for finding in found)
