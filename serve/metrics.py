"""What Prometheus is told beside Ray Serve's own metrics; every node of Ray exports it, as ray_ddiff_...

Ray Serve adds the tags deployment (of a hop its stage), replica and application.  The sums of histograms are
Ray's estimates from their buckets, their counts are exact (Ray 2.60) but for what a busy machine loses: every
RAY_metrics_report_interval_ms, 10 s unless set, a process collects what is new since the last time and tells
its node's agent, once; what it does not collect within half an interval, or the agent does not take within
OTEL_EXPORTER_OTLP_METRICS_TIMEOUT, 10 s unless set, is lost.
"""

from ray.serve.metrics import Counter, Histogram

WAITING_S = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]
STEP_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10]


class HopMetrics:
    """Of a replica of a hop; made in it.  An engine's `Meter`."""

    def __init__(self) -> None:
        self.waiting = Histogram("ddiff_queue_seconds", "Waited in the replica for the first step", WAITING_S)
        self.step = Histogram("ddiff_denoise_step_seconds", "One step of all samples in work", STEP_S)
        self.samples = Counter("ddiff_denoised_samples_total", "Samples, counted anew at every step")

    def began(self, waited_s: float) -> None:
        """A request has left the queue."""
        self.waiting.observe(waited_s)

    def stepped(self, samples: int, took_s: float) -> None:
        """All samples in work have made a step."""
        self.step.observe(took_s)
        self.samples.inc(samples)


class RequestMetrics:
    """Of a replica of the ingress; made in it.  The application's `Tally`."""

    def __init__(self) -> None:
        self.images = Counter("ddiff_images_total", "Images painted")
        self.rejected = Counter("ddiff_rejected_total", "Requests refused or failed", ("reason",))
        self.late = Counter("ddiff_deadline_exceeded_total", "Requests out of time")
        self.left = Counter("ddiff_cancelled_total", "Requests whose client went away")

    def painted(self, images: int) -> None:
        """A request has been answered with so many images."""
        self.images.inc(images)

    def refused(self, code: str) -> None:
        """A request has been answered with an error of this code."""
        if code == "deadline_exceeded":
            self.late.inc()
        else:
            self.rejected.inc(tags={"reason": code})

    def cancelled(self) -> None:
        """The client went away before the answer."""
        self.left.inc()
