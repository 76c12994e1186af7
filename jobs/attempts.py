"""`python -m jobs.attempts 3 run --config job.yaml`: a ddiff command that is started again when it is killed.

The entry point of a submitted job.  Ray starts a job once: a driver that is killed, by the kernel, a fault
of the node or a person, would end the job, although all its results so far are in the store.  A command
that fails by itself is not repeated: it would fail in the same way each time.
"""

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

log = logging.getLogger("jobs.attempts")
ATTEMPTS = 3
"""How often a driver is started in all, if it is killed each time, before its job has failed."""


def attempted(most: int, words: Sequence[str]) -> int:
    """Run the command until it ends by itself, `most` times at most; return its exit code."""
    told, process = False, None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if process is not None:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, stop)
    for attempt in range(1, most + 1):
        process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *words])  # noqa: S603 our own command
        if told:  # before this process existed
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code >= 0 or told or attempt == most:
            break
        log.warning(
            "the driver was killed by %s; starting it again, attempt %d of %d",
            signal.Signals(-code).name,
            attempt + 1,
            most,
        )
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(attempted(int(sys.argv[1]), sys.argv[2:]))
