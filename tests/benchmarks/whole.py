"""A whole run as a user starts it: seconds of every stage, peak memory, scores; seconds of `ddiff --help`.

    python -m tests.benchmarks.whole [--recipe demo] [--set A.B=C] [--here DIRECTORY] [--json FILE]

`ddiff run` in a fresh directory (or in the given one, where it continues), from nothing to its report.
Memory is that of all its processes, Ray's and the endpoint's among them: each counts its own pages and its
share of common ones, so nothing is counted twice.  Installing is not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.data import PeakMemory

ROOT = Path(__file__).parents[2]
DDIFF = (sys.executable, "-m", "jobs.cli")
ELSEWHERE = ("DDIFF_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
"""Variables by which a run would use other machines."""
GOALS = {"wall": 2400.0, "peak_mb": 8000.0, "help": 0.5}
"""Of the demo, on two cores: seconds, MB, seconds."""
SMOKE_S = 240.0


def environment() -> dict[str, str]:
    """The environment of a user who has set nothing, and whose `ddiff` is the code of this repository."""
    kept = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    return kept | {"PYTHONPATH": str(ROOT)}


def help_s(times: int = 5) -> float:
    """Seconds of `ddiff --help`, the median of some."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run([*DDIFF, "--help"], env=environment(), check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def measured(recipe: str, changes: Sequence[str], here: Path) -> dict[str, Any]:
    """One run to its end.

    Raises:
        SystemExit: It failed; what it said has been shown.
    """
    words = [word for change in changes for word in ("--set", change)]
    began = time.monotonic()
    run = subprocess.Popen(
        [*DDIFF, "run", "--recipe", recipe, *words, "--json"],
        cwd=here,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    memory = PeakMemory(run.pid)
    told, _ = run.communicate()
    peak_mb, wall = memory.stop(), time.monotonic() - began
    if run.returncode:
        raise SystemExit(run.returncode)
    facts = json.loads(told)
    judge = "oracle" if "oracle" in facts else "clip"
    return {
        "recipe": recipe,
        "changes": [*changes],
        "wall": wall,
        "seconds": facts["seconds"],
        "peak_mb": peak_mb,
        judge: facts[judge],
        "digest": facts["digest"],
    }


def table(found: Mapping[str, Any]) -> str:
    """All of it as text."""
    goals = GOALS | ({"wall": SMOKE_S} if found["recipe"] == "smoke" else {})
    seconds = dict(found["seconds"])
    lines = [f"{'ddiff --help':24} {found['help']:9.2f} s   (goal {goals['help']:g})"]
    lines += [f"{'ddiff run, in all':24} {found['wall']:9.0f} s   (goal {goals['wall']:g})"]
    lines += [f"  {name:22} {value:9.0f} s" for name, value in seconds.items() if name != "total"]
    lines += [f"{'peak memory':24} {found['peak_mb']:9,.0f} MB  (goal {goals['peak_mb']:g})"]
    scores = found.get("oracle") or found.get("clip") or {}
    lines += [f"judged, n {scores['n']:,}"] if scores else []
    for name, share in scores.items():
        if isinstance(share, float):
            between = scores.get("intervals", {}).get(name)
            lines.append(
                f"  {name:22} {share:9.1%}" + (" ({:.0%} to {:.0%})".format(*between) if between else "")
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="A.B=C")
    parser.add_argument("--here", type=Path, help="where `runs` goes; else a temporary directory, removed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {"help": help_s(), "load": os.getloadavg(), "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(prefix="ddiff-whole-") as temporary:
        found = measured(options.recipe, options.changes, options.here or Path(temporary)) | about
    sys.stdout.write(table(found) + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
