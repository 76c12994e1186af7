"""How long `ddiff submit smoke` takes to be accepted, from the command's start, on a cluster on this machine.

    python -m tests.benchmarks.submission [ROUNDS]

Each round is a process of its own in an empty folder; the job is stopped and deleted before the next.
Prints seconds and the command's own CPU-seconds of each round, and the medians.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.ray_head import ROOT, Head, ray_head


def ddiff(head: Head, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user gives it on a laptop."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= head.environment | {"PYTHONPATH": str(ROOT), "DDIFF_STORAGE": str(folder / "runs")}
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip


def processor_s() -> float:
    """CPU-seconds of all child processes that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def say(line: str) -> None:
    """One line on stdout."""
    sys.stdout.write(line + "\n")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    walls, processors = [], []
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with ray_head(variables={"PATH": path}) as head, tempfile.TemporaryDirectory() as name:
        for _ in range(rounds):
            began, spent = time.monotonic(), processor_s()
            job = ddiff(head, Path(name), "submit", "smoke").stdout.strip()
            walls.append(time.monotonic() - began)
            processors.append(processor_s() - spent)
            say(f"{job}: accepted after {walls[-1]:.2f} s, {processors[-1]:.2f} CPU-seconds of its own")
            ddiff(head, Path(name), "stop", job)
            ddiff(head, Path(name), "delete", job)
            time.sleep(5)
    say(f"median {statistics.median(walls):.2f} s, {statistics.median(processors):.2f} CPU-seconds")


if __name__ == "__main__":
    main()
