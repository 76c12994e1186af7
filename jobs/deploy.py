"""`ddiff deploy`: a registered cascade onto the Serve of a cluster, and back again.

<storage>/cascades/<digest>/           what was ever deployed, never changed
<storage>/code/<digest>.zip            the ddiff that serves it: the one that deployed it, not the nodes' own
<storage>/deployments/<name>-<12>.yaml  its config; deploying the former one is the way back
"""

import logging
import math
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from dd_core import sealed
from dd_core.addresses import is_address
from jobs import environment
from jobs.artifacts import address_in, code_address, keep_cascade, keep_code
from jobs.config import ConfigError, loaded
from jobs.dashboard import Dashboard, DashboardError, is_here
from jobs.endpoint import serve_spec
from jobs.failures import JobFailedError, words_of
from serve import app, code, running
from serve.spec import ServeSpec
from workflows.registry import Registry, Version, split
from workflows.storage import opened

log = logging.getLogger(__name__)
SERVE = "/api/serve/applications/"
ENTRY = "serve.app:build"
POLL_S, SILENT_S = 0.5, 60.0
"""How often a cluster is asked for its progress, and how long it may leave that unanswered."""
KEPT = "`ddiff deploy` says where it keeps each"
ANSWER_S = 30.0
"""How long the endpoint may take to answer us once Serve runs the cascade; it may be out of our reach."""


class DeployError(JobFailedError):
    """The cascade is not served; what was served before still is, unless the message says otherwise."""


class UnheardError(DeployError):
    """The cluster has fallen silent: the cascade may be served or not, and nothing has been put back."""


class Config(NamedTuple):
    """What Ray Serve is told."""

    fields: dict[str, Any]
    """As ray.serve.schema.ServeDeploySchema has them."""
    about: str = ""
    """Where it comes from, for people."""
    version: Version | None = None
    """In the registry, to be published; None: what the config names is at its address already."""

    @property
    def spec(self) -> ServeSpec:
        """The fields of our application."""
        return ServeSpec.model_validate(self.args)

    @property
    def args(self) -> dict[str, Any]:
        """The same fields as they were written, perhaps by another ddiff."""
        return dict(self.fields["applications"][0]["args"])

    @property
    def code(self) -> str:
        """Where Ray fetches our code; empty: the nodes have it."""
        return str(self.fields["applications"][0].get("runtime_env", {}).get("working_dir", ""))

    def text(self) -> str:
        """As a file."""
        head = f"# {self.about}\n" if self.about else ""
        return head + yaml.safe_dump(self.fields, sort_keys=False, allow_unicode=True)


def resolved(wanted: str, changes: Sequence[str] = (), where: str = "") -> Config:
    """The config for NAME@ALIAS as the registry knows it now: it has an address and a digest, no alias.

    Nothing is changed anywhere; `publish` puts cascade and code at the addresses that it names.

    Args:
        wanted: NAME@ALIAS, or NAME for its current version.
        changes: Of the fields of serve.spec.ServeSpec, such as `hops.base.num_gpus=1`.
        where: The dashboard of the cluster that is to serve it; empty: not known yet.

    Raises:
        RegistryError: There is no such version.
        ConfigError: A change is refused, or the cluster could not see where cascades are kept.
    """
    storage = environment.runs()
    if where and not environment.same_everywhere(storage) and not is_here(where):
        raise ConfigError(
            f"the nodes of {where} do not see {storage!r}, a folder beside this one: set DDIFF_STORAGE to "
            "s3://bucket/runs or to a directory that every node sees"
        )
    version = registry(split(wanted)[0]).version(wanted)
    fields: dict[str, Any] = {
        "cascade": address_in(storage, f"cascades/{version.digest}"),
        "digest": version.digest,
        "code": code.digest(),
    }
    spec = serve_spec(fields, changes)
    about = f"{wanted}: {version.says()}, digest {version.digest[:12]}, code {spec.code[:12]}"
    return Config(serve_fields(spec, code_address(storage)), about, version)


def serve_fields(spec: ServeSpec, code_at: str = "") -> dict[str, Any]:
    """The whole config of Ray Serve for one cascade; `code_at`: where Ray fetches our code."""
    args = spec.model_dump(mode="json", exclude_defaults=True)
    return fields_round(args | {"cascade": spec.cascade, "digest": spec.digest}, code_at)


def fields_round(args: dict[str, Any], code_at: str) -> dict[str, Any]:
    """The same around these fields of our application, which may be those of another ddiff."""
    usual = ServeSpec.model_fields
    door = {name: args.get(name, usual[name].default) for name in ("host", "port")}
    return {
        "proxy_location": "HeadOnly",
        "http_options": door,
        "logging_config": {"enable_access_log": False},
        "applications": [
            {
                "name": app.APPLICATION,
                "route_prefix": "/",
                "import_path": ENTRY,
                "args": args,
                **({"runtime_env": {"working_dir": code_at}} if code_at else {}),
            }
        ],
    }


def written_before(file: str) -> Config:
    """A config as `ddiff deploy` wrote it, in a file or at an address.

    Raises:
        ConfigError: It is no such config.
    """
    config = Config(fetched(file) if is_address(file) else loaded(Path(file), KEPT))
    try:
        entry, args = config.fields["applications"][0]["import_path"], config.args
    except (KeyError, IndexError, TypeError, ValueError):
        raise ConfigError(f"{file} is no config of `ddiff deploy`") from None
    if entry != ENTRY or not args.get("digest"):
        raise ConfigError(f"{file} is no config of `ddiff deploy`: it needs {ENTRY} and a digest")
    try:
        ServeSpec.model_validate(args)
    except ValidationError as error:
        raise ConfigError(
            f"{file}: {words_of(error, args)}; if another ddiff has written it (its code is "
            f"{str(args.get('code', ''))[:12] or 'not named'}), deploy it with that one"
        ) from None
    return config


def fetched(address: str) -> Any:
    """The fields of a config in a store."""
    files, path = opened(address)
    try:
        return yaml.safe_load(files.cat_file(path))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{address} cannot be read: {' '.join(str(error).split())}") from None


def registry(name: str) -> Registry:
    """MLflow at MLFLOW_TRACKING_URI; without it, the store in the directory of the run of this name.

    Raises:
        ConfigError: There is neither.
    """
    if uri := environment.tracking_uri():
        return Registry(uri)
    store = Path(environment.runs()) / name / "mlflow.db"
    if not store.exists():
        raise ConfigError(
            f"set MLFLOW_TRACKING_URI: {name} is looked up in MLflow, and there is no {store}; of a run of "
            "another name it is sqlite:///RUN/mlflow.db"
        )
    return Registry(f"sqlite:///{store.absolute()}")


def publish(config: Config) -> str:
    """Put cascade and code where a config says they are, and keep the config; return its address.

    Raises:
        SealError: What lies at the address of the version is no longer what was registered.
    """
    storage = environment.runs()
    if config.version:
        keep_cascade(config.version, storage)
        if config.code:
            keep_code(storage)
        else:
            log.warning(
                "Ray fetches no code from %s: nodes without ddiff %s refuse to serve this",
                storage,
                config.spec.code[:12],
            )
    return kept(config, storage)


def kept(config: Config, storage: str) -> str:
    """Write a config where `ddiff deploy --config` finds it again; one cascade and its settings, one file."""
    files, root = opened(storage)
    cascade = str(config.args["cascade"]).rstrip("/").rpartition("/")[2][:12]
    name = f"deployments/{cascade}-{sealed.digest_of(config.fields)[:8]}.yaml"
    if not is_address(storage):
        files.makedirs(f"{root}/deployments", exist_ok=True)
    files.pipe_file(f"{root}/{name}", config.text().encode())
    return address_in(storage, name)


def deploy(config: Config, address: str) -> dict[str, Any]:
    """Deploy a config and wait until its cascade answers.

    What was served before answers until the new replicas have drawn an image, and is put back if they fail:
    Serve replaces hop by hop, so some of the new ones may run by then.  Other applications stay.  If the
    cluster falls silent nothing is put back: the new cascade may be served.

    Args:
        config: What to deploy.
        address: Of the cluster's dashboard.

    Raises:
        DashboardError: The cluster does not answer.
        SealError: As `publish`; nothing has been changed.
        ConfigError: Serve listens elsewhere there; nothing has been changed.
        DeployError: The cascade did not come up.
    """
    storage = environment.runs()
    with Dashboard(address) as dashboard:
        same_door(dashboard.get(SERVE), config.spec)  # refused before minutes of copying
        path = publish(config)
        details = dashboard.get(SERVE)  # others may have deployed meanwhile
        same_door(details, config.spec)
        former = on_air(details)
        back = kept(former, storage) if former and former.fields != config.fields else ""
        if back:
            log.info("what is on the air now comes back with: ddiff deploy --config %s", back)
        failed = details.get("applications", {}).get(app.APPLICATION, {}).get("status") == "DEPLOY_FAILED"
        again = failed and former is not None and former.fields == config.fields
        dashboard.put(SERVE, beside_others(renewed(config) if again else config, details))
        try:
            url, seen = await_running(dashboard, config.spec, back)
        except UnheardError:
            raise
        except DeployError:
            if back and former:
                put_back(dashboard, former, instead_of=config)
            raise
    spec = config.spec
    facts = {"endpoint": url, "seen": seen, "digest": spec.digest, "code": spec.code}
    return facts | {"config": path, "former": back}


def renewed(config: Config) -> Config:
    """The same config, made to look new to Serve, which does not retry one that has failed for good."""
    ours, *others = config.fields["applications"]
    around = ours.get("runtime_env", {})
    around = around | {"env_vars": around.get("env_vars", {}) | {"DDIFF_ATTEMPT": uuid.uuid4().hex}}
    return config._replace(fields=config.fields | {"applications": [ours | {"runtime_env": around}, *others]})


def put_back(dashboard: Dashboard, former: Config, *, instead_of: Config) -> None:
    """Deploy the former config again, without waiting until it runs; not instead of what others deployed."""
    try:
        details = dashboard.get(SERVE)
        now = on_air(details)
        if now is None or now.args["digest"] not in (former.args["digest"], instead_of.args["digest"]):
            left = f"{now.args['digest'][:12]}, deployed" if now else "what is left, deleted"
            log.warning("%s by another meanwhile, stays; nothing is put back", left)
            return
        dashboard.put(SERVE, beside_others(former, details))
    except DashboardError as error:
        log.warning("%s could not be put back: %s", former.args["digest"][:12], error)
    else:
        log.warning("%s is put back on the air", former.args["digest"][:12])


def beside_others(config: Config, details: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config with the applications of others: Serve deletes what a config does not list.

    Applications deployed without a config, or being deleted, have no fields to list and are left alone.
    """
    others = [
        found["deployed_app_config"]
        for name, found in (details.get("applications") or {}).items()
        if name != app.APPLICATION and found.get("deployed_app_config")
    ]
    return config.fields | {"applications": [*config.fields["applications"], *others]}


def same_door(details: dict[str, Any], spec: ServeSpec) -> None:
    """Refuse another address than that of a running Serve, which keeps it: the wait would be in vain."""
    http = details.get("http_options") or {}
    running = (http.get("host"), http.get("port"))
    if http.get("port") and running != (spec.host, spec.port):
        raise ConfigError(
            f"Serve on this cluster listens at {running[0]}:{running[1]}, not at {spec.host}:{spec.port}; "
            f"--set host={running[0]} --set port={running[1]}, or `serve shutdown` first"
        )


def on_air(details: dict[str, Any]) -> Config | None:
    """What Serve runs now, if it is ours; its fields unchanged, since another ddiff may have written them."""
    ours = details.get("applications", {}).get(app.APPLICATION, {}).get("deployed_app_config")
    if not ours or not ours.get("args", {}).get("digest"):
        return None
    code_at = (ours.get("runtime_env") or {}).get("working_dir", "")
    return Config(fields_round(ours["args"], code_at), "what was on the air before")


def await_running(dashboard: Dashboard, spec: ServeSpec, back: str = "") -> tuple[str, bool]:
    """Wait until Serve runs the cascade and its endpoint answers.

    What Serve says decides: the endpoint may be out of our reach, or another one may answer where we look, as
    when only the port of the dashboard is forwarded.  After ANSWER_S that is logged and counts as served.

    Args:
        dashboard: Of the cluster.
        spec: What it was told to serve.
        back: Address of the former config, for the messages; empty: there is none.

    Returns:
        The address of the endpoint for who reaches the cluster's machines, and whether it has answered us.

    Raises:
        UnheardError: The cluster has not answered for SILENT_S.
        DeployError: It does not come up.
    """
    way = f" (back to the former: ddiff deploy --config {back})" if back else ""
    url = endpoint_of(dashboard.address, spec)
    heard = time.monotonic()
    until, runs_since = heard + spec.startup_s, math.inf
    while True:
        try:
            ours = dashboard.get(SERVE).get("applications", {}).get(app.APPLICATION, {})
        except DashboardError as error:  # a head that is busy starting replicas
            if time.monotonic() - heard > SILENT_S:
                raise UnheardError(
                    f"nobody knows whether {spec.digest[:12]} is served; nothing is put back{way}: {error}"
                ) from None
            time.sleep(POLL_S)
            continue
        heard = time.monotonic()
        if given_up(ours):
            why = running.cause(ours.get("message", ""))
            raise DeployError(f"{spec.digest[:12]} is not served{way}: {why}")
        why = state_of(ours, spec)
        runs_since = math.inf if why else min(runs_since, time.monotonic())
        if not why and not (why := running.missing(url, spec.digest, spec.precision) if url else ""):
            return (url, True) if url else (f"http://{spec.host}:{spec.port}", False)
        if time.monotonic() - runs_since > ANSWER_S:
            log.warning(
                "Serve runs %s, but %s does not show it to us (%s)", spec.digest[:12], url, why.strip()
            )
            return f"http://{spec.host}:{spec.port}", False
        if heard > until and runs_since == math.inf:
            raise DeployError(
                f"{spec.digest[:12]} is not ready after {spec.startup_s:g} s{way}: {why}; "
                "`serve status` says more"
            )
        time.sleep(POLL_S)


def given_up(ours: dict[str, Any]) -> bool:
    """Whether Serve has given up; not if replicas only fail their health check: it replaces those."""
    bad = ("DEPLOY_FAILED", "UNHEALTHY")
    if ours.get("status") not in bad:
        return False
    failed = [part for part in (ours.get("deployments") or {}).values() if part["status"] in bad]
    return not failed or any(part["status_trigger"] != "HEALTH_CHECK_FAILED" for part in failed)


def state_of(ours: dict[str, Any], spec: ServeSpec) -> str:
    """What Serve still has to do; empty if it runs this very cascade."""
    running = (ours.get("deployed_app_config") or {}).get("args", {})
    of = (running.get("digest"), running.get("code", ""), running.get("precision", "auto"))
    if of != (spec.digest, spec.code, spec.precision):
        return "Serve has not taken the config yet"
    return (
        "" if ours["status"] == "RUNNING" else f"Serve says {ours['status']}: {ours.get('message', '')[:200]}"
    )


def endpoint_of(dashboard: str, spec: ServeSpec) -> str:
    """Where clients reach the endpoint; empty if it is on the loopback of another machine."""
    head = urlsplit(dashboard).hostname or ""
    loopback = {"127.0.0.1", "localhost"}
    if spec.host in loopback and head not in loopback:
        return ""
    host = head if spec.host in {"0.0.0.0", "::"} else spec.host  # noqa: S104 compared, not listened at
    return f"http://{host}:{spec.port}"
