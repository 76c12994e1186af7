"""How a cascade is served: the fields that a config of Ray Serve hands to `serve.app:build`."""

from collections.abc import Iterable

from pydantic import Field

from dd_core.precision import Precision
from dd_core.spec import SafeName, Spec


class ReplicaSpec(Spec):
    """What a replica of a hop may use, and how many there are."""

    num_cpus: float = Field(0.5, ge=0)
    """Reserved in Ray."""
    num_gpus: float | None = Field(None, ge=0)
    """Reserved in Ray; with any, the hop runs on the GPU.  None: its `gpu_share` if `ddiff serve` or
    `ddiff run` finds GPUs in Ray; in a config of Ray Serve, which has to say what it wants, no GPU."""
    threads: int = Field(0, ge=0)
    """Of PyTorch on the CPU; 0: as many as num_cpus, at least one."""
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    """A value below min_replicas counts as min_replicas."""
    busy_requests: float | None = Field(None, gt=0)
    """Images in progress per replica above which another replica is started.  None: max_rows where requests
    share calls, otherwise 2: one is drawn while the other waits."""
    upscale_delay_s: float = Field(30, ge=0)
    """How long there must be more than busy_requests for each replica before another one is started."""
    downscale_delay_s: float = Field(600, ge=0)
    """How long one replica fewer must have been enough before one is stopped."""
    max_rows: int = Field(8, ge=1)
    """Images in progress at once, what fits the memory of the device; where requests do not share calls,
    samples (a prior may draw several for an image)."""
    max_waiting: int = Field(64, ge=0)
    """Images that may wait for room among these."""
    shared: bool | None = None
    """Whether requests share calls of the network.  None: on a GPU; on a CPU it would gain little and an
    image would no longer be the same to the last bit whatever is served beside it."""

    @property
    def most_replicas(self) -> int:
        """How many replicas there may be."""
        return max(self.min_replicas, self.max_replicas)

    @property
    def target(self) -> float:
        """Images in progress per replica that autoscaling aims at.

        Few where each is drawn by itself: admission keeps no more waiting than can be drawn in time, which of
        a slow cascade is less than a GPU's batch, so that no further replica would ever be started.
        """
        shares = bool(self.num_gpus) if self.shared is None else self.shared
        return self.busy_requests or (self.max_rows if shares else 2.0)

    @property
    def room(self) -> int:
        """Images that all replicas together may have, in work or waiting."""
        return self.most_replicas * (self.max_rows + self.max_waiting)


class ServeSpec(Spec):
    """A cascade and how it is served."""

    cascade: str
    """Directory of the cascade, or its address in a store, such as s3://bucket/runs/demo/cascade."""
    digest: str = ""
    """Serve this cascade only; empty: whatever is in the directory."""
    code: str = ""
    """Serve with this code only (its `serve.code.digest()`); empty: with whatever code a node has."""
    precision: Precision = "auto"
    """Of the networks that paint (`dd_core.stages.load_hop`); auto: bfloat16 where a replica's device
    computes in it, so set it where the machines of a cluster differ in that."""
    host: str = Field("127.0.0.1", min_length=1)
    """Not empty, which would mean every address of the machine: for that, say 0.0.0.0."""
    port: int = Field(8000, ge=1, le=65535)
    timeout_s: float = Field(120, gt=0)
    """Longest time for one request."""
    startup_s: float = Field(900, gt=0)
    """Longest time until every hop has drawn its first image."""
    max_body_bytes: int = Field(64_000, ge=1)
    body_s: float = Field(10, gt=0)
    """Longest time until the body of a request has arrived."""
    files: str = ""
    """Directory or address of a store in which images that are answered by URL are kept for an hour; every
    replica of the ingress must reach it.  Empty: `files` beside the cascade."""
    public_url: str = Field("", pattern="^(https?://.+)?$")
    """Where clients reach the server, as https://images.example.com, for the URLs of images; empty: where a
    request says that it was sent."""
    ingress_replicas: int = Field(1, ge=1)
    hop: ReplicaSpec = ReplicaSpec()
    """For the hops that `hops` does not name."""
    hops: dict[SafeName, ReplicaSpec] = Field(default_factory=dict)
    """Stage -> its replicas."""

    def room(self, stages: Iterable[str]) -> int:
        """Images that one ingress lets in at once; further requests are told to come back later.

        As many as the hop with the least room takes, so that no hop of these stages has to refuse an image
        on which those before it have worked.
        """
        least = min(self.hops.get(stage, self.hop).room for stage in stages)
        return max(1, least // self.ingress_replicas)

    def replicas(self, stages: Iterable[str]) -> int:
        """Most replicas, for one ingress, that the hop with the fewest of these stages may have."""
        least = min(self.hops.get(stage, self.hop).most_replicas for stage in stages)
        return max(1, least // self.ingress_replicas)
