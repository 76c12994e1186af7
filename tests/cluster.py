"""A cluster on one machine: a head and two nodes with addresses, folders and variables of their own.

They share nothing but Ray's token, an S3 store and an MLflow server with users, on PostgreSQL.
Where the tests run as root and have `ip`, each worker node is in a network namespace of its own.
"""

import contextlib
import glob
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from jobs.environment import PATIENCE
from tests.ray_head import agent_ports, free_ports
from tests.s3 import answers, free_port, s3_server, stopped, until

CANARIES = {
    "RAY_AUTH_TOKEN": "canary-token-" + secrets.token_hex(16),
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow-12",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "canary-of-the-mlflow-server",
    "HF_TOKEN": "canary-of-somebody-else",
}
PLACES = "/usr/lib/postgresql/*/bin/pg_ctl"
"""On Debian, one for each version; the Makefile looks there too."""
ZONES = ("a", "b")
"""Labels of the two worker nodes."""


def postgres_at() -> Path | None:
    """The directory of PostgreSQL's programs, of several versions the newest; None without PostgreSQL."""
    if found := shutil.which("pg_ctl"):
        return Path(found).resolve().parent
    there = sorted(map(Path, glob.glob(PLACES)), key=lambda path: float(path.parts[-3]))
    return there[-1].parent if there else None


def demoted() -> dict[str, object]:
    """Another user for a subprocess, if we are root, as whom PostgreSQL refuses to run."""
    if os.getuid():
        return {}
    user = pwd.getpwnam("postgres" if "postgres" in {one.pw_name for one in pwd.getpwall()} else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL on this machine only, with empty databases `tracking` and `users`; yields its address."""
    programs, user, port = postgres_at(), demoted(), free_port()
    assert programs is not None
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    password = directory / "password"
    password.write_text("canary-of-postgres")
    if user:
        for path in (directory, password):
            os.chown(path, int(str(user["user"])), int(str(user["group"])))
    data = directory / "data"
    quiet = {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **user}
    subprocess.run(
        [
            programs / "initdb",
            "-D",
            data,
            "-U",
            "mlflow",
            "-A",
            "scram-sha-256",
            f"--pwfile={password}",
            "-N",
        ],
        check=True,
        **quiet,  # type: ignore[call-overload]
    )
    settings = [
        "-c",
        "fsync=off",
        "-c",
        f"unix_socket_directories={directory}",
        "-c",
        "listen_addresses=127.0.0.1",
    ]
    process = subprocess.Popen([programs / "postgres", "-D", data, "-p", str(port), *settings], **quiet)  # type: ignore[call-overload]
    try:
        with stopped(process):
            ready = [programs / "pg_isready", "-p", str(port), "-h", "127.0.0.1"]
            until(lambda: subprocess.run(ready, check=False, **quiet).returncode == 0)  # type: ignore[call-overload]
            for name in ("tracking", "users"):
                subprocess.run(
                    [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", name],
                    check=True,
                    env={"PGPASSWORD": "canary-of-postgres", "PATH": os.environ["PATH"]},
                    **quiet,  # type: ignore[call-overload]
                )
            yield f"postgresql+psycopg2://mlflow:canary-of-postgres@127.0.0.1:{port}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Mlflow(NamedTuple):
    """A tracking server that has been started."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def wait(self) -> None:
        """Wait until it answers."""
        until(lambda: answers(f"{self.url}/health") or self.process.poll() is not None, 600)
        assert self.process.poll() is None, self.log.read_text()[-2000:]


@contextlib.contextmanager
def mlflow_server(database: str, host: str, directory: Path) -> Iterator[Mlflow]:
    """A server with users and allowed hosts, started as README says; it creates its tables first."""
    directory.mkdir()
    port = free_port(host)
    users = directory / "users.ini"
    users.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = {database}/users\nadmin_username = trainer\n"
        f"admin_password = {CANARIES['MLFLOW_TRACKING_PASSWORD']}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 300\n"  # a password is hashed once, not with every request
    )
    users.chmod(0o600)
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(users),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": CANARIES["MLFLOW_FLASK_SERVER_SECRET_KEY"],
        "MLFLOW_BACKEND_STORE_URI": f"{database}/tracking",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    words = ["server", "--app-name", "basic-auth", "--host", host, "--port", str(port), "--workers", "1"]
    words += ["--allowed-hosts", f"{host}:{port}", "--artifacts-destination", str(directory / "artifacts")]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words], env=environment, cwd=directory, stdout=log, stderr=log
        )
        with stopped(process):
            yield Mlflow(f"http://{host}:{port}", process, directory / "log")


class Node(NamedTuple):
    """One node of the cluster."""

    ip: str
    process: "subprocess.Popen[bytes]"
    home: Path
    """HOME, TMPDIR and working directory, not shared with another node."""


class TestCluster(NamedTuple):
    """The running cluster, as tests use it."""

    __test__ = False
    url: str
    """Of the dashboard."""
    token: str
    head: Node
    nodes: list[Node]
    mlflow: str
    environment: dict[str, str]
    """Of the nodes."""
    directory: Path
    head_port: int
    spaces: bool
    """Whether each worker node has a network namespace of its own."""

    def add(self, name: str, ip: str, zone: str) -> None:
        """One more worker node."""
        place = Place(name, ip, self.directory, self.spaces)
        words = ["--address", f"{self.head.ip}:{self.head_port}", "--labels", f"zone={zone}"]
        words += ["--resources", json.dumps({f"zone_{zone}": 1})]
        self.nodes.append(start_node(place, self.environment, words, cpus=1))

    def outside(self) -> dict[str, str]:
        """The environment of a laptop: addresses, token and storage."""
        keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        return keep | {
            "RAY_ADDRESS": self.url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "DDIFF_STORAGE": "s3://bucket/runs",
            "HF_TOKEN": CANARIES["HF_TOKEN"],
            "HOME": str(self.directory / "laptop"),
            "OMP_NUM_THREADS": "1",
        }


class Place(NamedTuple):
    """Where a node will run."""

    name: str
    ip: str
    directory: Path
    space: bool
    """Whether it is in a network namespace of its own, called `name`."""


def start_node(place: Place, environment: dict[str, str], words: list[str], *, cpus: int) -> Node:
    """`ray start` in the foreground, in a folder of its own."""
    name, ip = place.name, place.ip
    home = place.directory / name
    home.mkdir()
    own = environment | {"HOME": str(home), "TMPDIR": str(home), "RAY_TMPDIR": str(home)}
    if place.space:
        own["GLOO_SOCKET_IFNAME"] = "eth0"  # by the host name it would take 127.0.0.1, from /etc/hosts
    inside = ["ip", "netns", "exec", name] if place.space else []
    command = [
        *inside, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        "--node-ip-address", ip, "--num-cpus", str(cpus), "--object-store-memory", "200000000",
        "--temp-dir", str(home), *(str(word) for option in agent_ports().items() for word in option), *words,
    ]  # fmt: skip
    with (home / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, env=own, cwd=home, stdout=log, stderr=log, start_new_session=True)
    return Node(ip, process, home)


def kill_node(node: Node) -> None:
    """Kill all processes of a node at once, as when a machine is lost."""
    os.killpg(node.process.pid, signal.SIGKILL)
    mine = str(node.home).encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if b"TMPDIR=" + mine in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
    node.process.wait()


def sh(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True)


@contextlib.contextmanager
def networks(names: list[str]) -> Iterator[list[str] | None]:
    """Addresses: the head's on a bridge, each other node's in its own namespace; None without the rights.

    Some users may make a bridge but no namespace: whichever step is refused, what was made before is removed.
    """
    tag = secrets.token_hex(2)
    bridge, prefix = f"dd{tag}", f"10.{77 + secrets.randbelow(100)}.{secrets.randbelow(250)}"
    try:
        try:
            sh(f"ip link add {bridge} type bridge")
            sh(f"ip addr add {prefix}.1/24 dev {bridge}")
            sh(f"ip link set {bridge} up")
            for number, name in enumerate(names):
                sh(f"ip netns add {name}")
                sh(f"ip link add v{tag}{number} type veth peer name eth0 netns {name}")
                sh(f"ip link set v{tag}{number} master {bridge}")
                sh(f"ip link set v{tag}{number} up")
                sh(f"ip netns exec {name} ip addr add {prefix}.{number + 2}/24 dev eth0")
                sh(f"ip netns exec {name} ip link set eth0 up")
                sh(f"ip netns exec {name} ip link set lo up")
            ips: list[str] | None = [f"{prefix}.{number + 1}" for number in range(len(names) + 1)]
        except (OSError, subprocess.CalledProcessError):
            ips = None
        yield ips
    finally:
        with contextlib.suppress(OSError):  # there is no `ip`
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


@contextlib.contextmanager
def cluster() -> Iterator[TestCluster]:
    """Start everything and wait until it is up; afterwards end and remove everything."""
    directory = Path(tempfile.mkdtemp(prefix="ddc-", dir="/tmp"))  # sockets need short paths
    (directory / "laptop").mkdir()
    tag = secrets.token_hex(2)
    names = [f"n{number}{tag}" for number in (1, 2)]
    with contextlib.ExitStack() as services, ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as stack:
        services.callback(shutil.rmtree, directory, ignore_errors=True)
        found = services.enter_context(networks(names))
        ips = found or ["127.0.0.1"] * 3

        def tracking() -> Mlflow:
            database = services.enter_context(postgres())
            return services.enter_context(mlflow_server(database, ips[0], directory / "mlflow"))

        starting = beside.submit(tracking)  # while the store and the head come up
        keys = stack.enter_context(s3_server(ips[0]))
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **keys,
            **PATIENCE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": CANARIES["RAY_AUTH_TOKEN"],
            "MLFLOW_TRACKING_USERNAME": "trainer",
            "MLFLOW_TRACKING_PASSWORD": CANARIES["MLFLOW_TRACKING_PASSWORD"],
            "HF_TOKEN": CANARIES["HF_TOKEN"],
            "OMP_NUM_THREADS": "1",
            "RAY_num_workers_soft_limit": "4",  # idle processes are kept for the next task, as on a real node
            "RAY_prestart_worker_first_driver": "0",  # but none is started before it is needed
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # here nodes are lost without warning
            "RAY_enable_metrics_collection": "0",  # nobody reads the figures
            "REPORTER_UPDATE_INTERVAL_MS": "60000",
            "METRICS_RECORD_INTERVAL_S": "60",
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "60000",  # a lost node refuses at once; this is for a starved one
            "RAY_health_check_failure_threshold": "2",
            "RAY_worker_maximum_startup_concurrency": "4",  # in parallel
        }
        port, dashboard, client = free_ports(3, ips[0])
        words = [
            "--head",
            "--port",
            str(port),
            "--dashboard-host",
            ips[0],
            "--dashboard-port",
            str(dashboard),
        ]
        words += ["--no-monitor"]  # nothing is autoscaled
        words += ["--ray-client-server-port", str(client)]
        head = start_node(Place("head", ips[0], directory, False), environment, words, cpus=0)
        stack.callback(lambda: kill_node(head) if head.process.poll() is None else None)
        mlflow = starting.result()
        made = TestCluster(
            f"http://{ips[0]}:{dashboard}",
            CANARIES["RAY_AUTH_TOKEN"],
            head,
            [],
            mlflow.url,
            environment,
            directory,
            port,
            bool(found),
        )
        stack.callback(lambda: [kill_node(node) for node in made.nodes if node.process.poll() is None])
        until(lambda: answers(f"{made.url}/api/version") or head.process.poll() is not None, 600)
        assert head.process.poll() is None, (head.home / "ray.log").read_text()[-2000:]
        for number in (0, 1):
            made.add(names[number], ips[number + 1], ZONES[number])
        until(lambda: alive_nodes(made) == 3 or any(node.process.poll() for node in made.nodes), 600)
        assert alive_nodes(made) == 3
        mlflow.wait()
        yield made


def alive_nodes(made: TestCluster) -> int:
    """How many nodes the head reports as alive; 0 if it does not answer."""
    request = urllib.request.Request(
        f"{made.url}/nodes?view=summary", headers={"Authorization": f"Bearer {made.token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found = json.load(answer)["data"]["summary"]
    except OSError:
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in found)
