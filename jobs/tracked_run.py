"""The record of a run in MLflow, as it is opened by whatever makes the run."""

from collections.abc import Iterator
from contextlib import contextmanager

from jobs.environment import experiment, tracking_uri
from jobs.failures import StoppedError
from jobs.source_tags import source_tags
from workflows.storage import Home
from workflows.tracking import Tracked, tracked
from workflows.training import PreemptedError

TOLD_TO_STOP = (StoppedError, PreemptedError)


@contextmanager
def tracked_run(home: Home) -> Iterator[Tracked]:
    """The run in MLflow, on the server and in the experiment of this environment, tagged with its code."""
    uri = tracking_uri() or ""
    with tracked(home, uri=uri, experiment=experiment(), stopped=TOLD_TO_STOP) as tracking:
        tracking.journal.tags(source_tags())
        yield tracking
