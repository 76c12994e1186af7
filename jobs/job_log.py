"""The log of a job, read for people: the lines of all its processes, and the first error of our own code."""

import re
from collections.abc import Iterator

MOST_LINES = 15
"""Shown of a job that failed: an empty line, a heading, the error with its frames, how the job ended."""
PREFIX = re.compile(
    r"^(?:\x1b\[\d+m)?\((?P<who>[\w.]+)[^)]*pid=(?P<pid>\d+)(?:, ip=(?P<ip>[\d.]+))?\)(?:\x1b\[0m)? ?"
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")
FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<where>.+)$')
ERROR = re.compile(r"^(?!ddiff:)[A-Za-z_][\w.]*(?::|$)")
"""The line that ends a traceback: the kind of the error and what it says."""
WRAPPED = re.compile(r"^[\w.]+\.RayTaskError\(")
"""The line that ends a traceback of Ray's; the traceback of another process follows it."""
BEGINS, AGAIN = "Traceback (most recent call last)", re.compile(r"; starting (?:it|them) again, ")
"""AGAIN: a lost driver or lost workers are started again, which mends the errors before."""
OURS = ("dd_core/", "workflows/", "serve/", "jobs/")
NOISE = (
    "PlacementGroupCleaner",
    "Failed to query Ray Train Controller actor state",
    "Progress bars disabled",
    "Execution plan of Dataset",
    "Starting execution of Dataset",
    "INFO job_manager.py",
    "INFO worker.py",
    "UserWarning: The maximum number of concurrent tasks",
    "warnings.warn(",
    "execution finished in",
    "Attempting to start training worker group",
    "Moving model to device",
    "Wrapping provided model in",
    "has constructor arguments in the object store",
    "worker processes have been started on node",
    "The hostname of the client socket cannot be retrieved",
    "Found credentials in",
    "Found endpoint for s3",
)
"""Parts of lines in which Ray speaks of itself."""


def merged(lines: Iterator[str]) -> Iterator[str]:
    """The lines of all processes as one log: where each comes from, without what Ray says of itself."""
    for raw in lines:
        line = COLOUR.sub("", raw.rstrip("\r"))
        if found := PREFIX.match(line):
            where = f" {found['ip']}" if found["ip"] else ""
            line = f"{found['who']}{where} | {REPEATED.sub('', line[found.end() :])}"
        if line.strip() and not noise(line):
            yield line


def noise(line: str) -> bool:
    """What Ray says of itself, which nobody who trains a model asked for."""
    return any(part in line for part in NOISE)


def first_error(log: str) -> list[str]:
    """The first error of our own code and its cause, in few lines; nothing if there is none.

    A worker's error is followed by those it brings about elsewhere: the ranks that lost it, Ray's own
    wrappers.  So the first traceback with a frame of ours in it is the one to read: its innermost frames
    of ours, and the line that says what was wrong.  Errors before the last restart of workers or driver are
    not why the job has failed, unless none came after it.
    """
    lines = [COLOUR.sub("", line) for line in log.splitlines()]
    mended = max((number for number, line in enumerate(lines, 1) if AGAIN.search(line)), default=0)
    return error_in(lines[mended:]) or error_in(lines)


def error_in(lines: list[str]) -> list[str]:
    """The first error in these lines; the tracebacks of each process are read separately."""
    said: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(lines):
        found = PREFIX.match(line)
        who = f"{found['pid']} {found['ip']}" if found else ""
        said.setdefault(who, []).append((number, line[found.end() :] if found else line))
    found_at: list[tuple[int, list[str]]] = []
    for own in said.values():
        texts = [text for _, text in own]
        starts = [place for place, text in enumerate(texts) if text.startswith(BEGINS)]
        for place, end in zip(starts, [*starts[1:], len(texts)], strict=False):
            if told := told_of(texts[place:end]):
                found_at.append((own[place][0], told))
                break
    plain = [text for _, text in said.get("", []) if text.startswith("ddiff: ")]
    if found_at:
        return [*min(found_at)[1], *plain[-1:]]
    return plain[:1]


def told_of(lines: list[str]) -> list[str]:
    """One traceback in short; nothing if none of its frames is ours, or if its last line is missing."""
    frames: list[str] = []
    for number, line in enumerate(lines[1:], 1):
        if found := FRAME.match(line):
            file = found["file"]
            ours = next((part for part in OURS if f"/{part}" in file), "")
            if ours and "site-packages" not in file:
                place = ours + file.rpartition(f"/{ours}")[2]
                code = lines[number + 1].strip() if number + 1 < len(lines) else ""
                frames.append(f"  {place}:{found['line']} in {found['where']}: {code}"[:200])
        elif line.strip() and not line[0].isspace() and not WRAPPED.match(line):
            # five of MOST_LINES are no frames: this line, and four that others print
            return [line[:500], *frames[-(MOST_LINES - 5) :]] if frames and ERROR.match(line) else []
    return []
