"""The application: one deployment for each hop, one for HTTP, built from a spec.

    ddiff serve --cascade DIR            `serve.running.run(ServeSpec(cascade=DIR))`
    import_path: serve.app:build         in the config of Ray Serve; `args` are the fields of ServeSpec

A cascade that is already running is replaced replica by replica.
"""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from dd_core import bundle
from dd_core.addresses import is_address
from dd_core.cascade import CascadeSpec
from dd_core.precision import Precision
from dd_core.sealed import MANIFEST
from dd_core.stages import StageSpec
from serve import code
from serve.admission import Door
from serve.fetching import on_this_machine
from serve.files import Files
from serve.guard import Limits
from serve.ingress import Api
from serve.links import ReplicaLink
from serve.metrics import RequestMetrics
from serve.painter import Painter
from serve.replicas import HopReplica
from serve.spec import ReplicaSpec, ServeSpec

APPLICATION = "ddiff"
GRACE_S = 5.0
"""Time beyond the longest for one request after which a replica that is replaced is stopped at its work."""


@ray.serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000, max_surge_percent=100)
@ray.serve.ingress()
class Ingress:
    """HTTP for one cascade; the application is built in the replica, where the handles work.

    Where it replaces another cascade, it is ready only when every hop has changed.  Until then, and for good
    if a hop does not come up, the former ingress answers: with 503 as soon as one of its own hops is gone.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self,
        spec: ServeSpec,
        cascade: CascadeSpec,
        digest: str,
        created: int,
        stages: dict[str, StageSpec],
        hops: dict[str, DeploymentHandle],
    ) -> None:
        links = {one: ReplicaLink(one, handle, digest, spec.precision) for one, handle in hops.items()}
        by_class = hears_classes(cascade, stages)
        painter = Painter(cascade, digest, links, by_class=by_class, stages=stages, precision=spec.precision)
        gone = time.monotonic() + spec.timeout_s + GRACE_S  # replicas that are replaced work no longer
        while await painter.replacing(timeout_s=5, patient=time.monotonic() < gone):  # noqa: ASYNC110
            await asyncio.sleep(0.5)  # hops do not tell when they change
        self.api = Api(
            painter,
            created=created,
            door=Door(spec.room(links), spec.replicas(links)),
            limits=Limits(spec.timeout_s, spec.max_body_bytes, spec.body_s),
            files=Files(spec.files),
            public_url=spec.public_url,
        )
        self.api.tally = RequestMetrics()

    async def drain(self) -> int:
        """Take in no more requests for images; returns how many images are in progress."""
        return self.api.drain()

    def __serve_build_asgi_app__(self) -> Any:
        return self.api.app()


def build(args: dict[str, Any]) -> ray.serve.Application:
    """The application that a config of Ray Serve imports; `args` are the fields of ServeSpec.

    Raises:
        ValueError: A replica spec for a stage that is no hop, or that can have no replica; or other code than
            this was asked for.
        dd_core.sealed.SealError: The cascade is damaged, unfinished or another one.
    """
    spec = ServeSpec.model_validate(args)
    if spec.code and spec.code != (mine := code.digest()):
        raise ValueError(
            f"the nodes have ddiff {mine[:12]}, this config is for {spec.code[:12]}: give the nodes that, "
            "or deploy the cascade again with the ddiff that they have"
        )
    directory = on_this_machine(spec.cascade, spec.digest)
    cascade, digest = bundle.read_cascade(directory, spec.digest)
    refuse_strangers(spec, cascade)
    stages = {hop.stage for hop in cascade.hops}
    place = spec.cascade if is_address(spec.cascade) else str(directory)  # each replica fetches its own copy
    spec = spec.but(files=kept_in(spec, place))
    patience = spec.timeout_s + GRACE_S  # a replica that is replaced finishes what it has begun
    hops = {
        stage: deployment(
            spec.hops.get(stage, spec.hop),
            stage,
            place,
            digest,
            precision=spec.precision,
            patience_s=patience,
        )
        for stage in sorted(stages)
    }
    created = int((directory / MANIFEST).stat().st_mtime)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=spec.ingress_replicas, graceful_shutdown_timeout_s=patience
    )
    judges = {hop.guides["classifier"] for hop in cascade.hops if "classifier" in hop.guides}
    specs = {stage: bundle.checked(bundle.SPEC, directory / stage / "spec.json") for stage in stages | judges}
    return ingress.bind(spec, cascade, digest, created, specs, hops)


def kept_in(spec: ServeSpec, cascade: str) -> str:
    """Where images that are answered by URL are kept: by default beside the cascade, which replicas reach."""
    scheme, mark, path = cascade.rstrip("/").rpartition("://")
    where = spec.files or f"{scheme}{mark}{path.rpartition('/')[0] or path}/files"
    return where if is_address(where) else str(Path(where.removeprefix("file://")).resolve())


def refuse_strangers(spec: ServeSpec, cascade: CascadeSpec) -> None:
    """Raises ValueError if replicas are asked for of a stage that is no hop."""
    stages = {hop.stage for hop in cascade.hops}
    if strangers := spec.hops.keys() - stages:
        raise ValueError(
            f"hops: {min(strangers)!r} is no hop of {cascade.name}; it has {', '.join(sorted(stages))}"
        )


def hears_classes(cascade: CascadeSpec, stages: Mapping[str, StageSpec]) -> bool:
    """Whether a hop of a cascade is conditioned on classes, or guided to them by a classifier."""
    return any(stages[name].classes for hop in cascade.hops for name in hop.told_classes)


def deployment(
    spec: ReplicaSpec, stage: str, cascade: str, digest: str, *, precision: Precision, patience_s: float
) -> ray.serve.Application:
    """A hop with its own replicas.

    It takes whatever the ingress has let in (`ServeSpec.room`).  The only replica is handed as many images as
    it has room for; where there may be several, each is handed few more than it works on, so that those which
    are started later find work; and a few requests that ask after its health.  The others wait in Serve.
    """
    waiting = spec.max_waiting if spec.most_replicas == 1 else min(spec.max_waiting, spec.max_rows)
    options = {
        "name": stage,
        "ray_actor_options": {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus or 0},
        "max_ongoing_requests": spec.max_rows + waiting + 16,
        "max_queued_requests": -1,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=spec.min_replicas,
            max_replicas=spec.most_replicas,
            target_ongoing_requests=spec.target,
            upscale_delay_s=spec.upscale_delay_s,
            downscale_delay_s=spec.downscale_delay_s,
        ),
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": patience_s,
        "health_check_period_s": 2,
        "max_constructor_retry_count": 3,
    }
    hop = HopReplica.options(**options)  # type: ignore[attr-defined]
    return hop.bind(cascade, stage, spec, digest=digest, precision=precision)
