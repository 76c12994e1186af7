"""The journal of a run: metrics and all else to show of it, as lines on disk; the courier sends them.

Writing a line is all that a training step waits for.  One thread of the driver sends what the
journals hold and notes how far it got.  So while the server is away, nothing waits for it and
nothing is lost: the rest is sent when it is back, or by the next start of the same run.  A line
may be sent twice; the server keeps one of equal points, and one of equal pictures.
"""

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dd_core.addresses import is_address
from workflows.addresses import redacted
from workflows.storage import Home

logger = logging.getLogger(__name__)
BATCH_BYTES = 256 * 2**10
PARAM_CHARACTERS = 6000
JOURNAL = "metrics.jsonl"
SENT = ("metrics.sent", "metrics.run")
"""How much of a journal has been sent, and the run that it was sent to."""
MARKS = (JOURNAL, *SENT)


class Entry(NamedTuple):
    """One line of a journal."""

    kind: Literal["metric", "params", "tags", "picture", "artifact", "dataset", "model", "status"]
    name: str
    value: Any
    step: int
    at_ms: int


Send = Callable[[list[Entry]], None]


class Journal:
    """An append-only file, written by one process at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):  # a kill cut its last line
            self.append("\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write down the metrics of a step; never blocks on the network."""
        self.write([("metric", name, value, step) for name, value in metrics.items()])

    def params(self, fields: Mapping[str, Any]) -> None:
        """The settings of the run, flattened to dotted names."""
        self.write([("params", "", dict(flat(fields)), 0)])

    def tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run, to search by."""
        self.write([("tags", "", dict(tags), 0)])

    def picture(self, name: str, path: Path | str, step: int) -> None:
        """An image file, shown on a slider over steps; its path may be relative to the journal."""
        self.write([("picture", name, str(path), step)])

    def artifact(self, path: Path | str) -> None:
        """A small file to keep with the run; its path may be relative to the journal, or an address."""
        self.write([("artifact", Path(path).name, str(path), 0)])

    def dataset(self, name: str, source: str, digest: str) -> None:
        """What the run was trained on."""
        self.write([("dataset", name, {"source": source, "digest": digest}, 0)])

    def model(self, name: str, source: Path | str, *, alias: str, tags: Mapping[str, str]) -> None:
        """A version of a registered model, and the alias that points to it."""
        self.write([("model", name, {"source": str(source), "alias": alias, "tags": dict(tags)}, 0)])

    def status(self, status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]) -> None:
        """The status of the run."""
        self.write([("status", "", status, 0)])

    def write(self, entries: list[tuple[Any, ...]]) -> None:
        """Append entries, with the time, in one write."""
        at_ms = int(time.time() * 1000)
        self.append("".join(json.dumps([*entry, at_ms]) + "\n" for entry in entries))

    def append(self, text: str) -> None:
        """Add text at the end of the file, in one piece."""
        with self.path.open("a") as file:
            file.write(text)


def flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """{"a": {"b": 1}} -> ("a.b", "1"), without passwords of addresses, cut to what the server takes."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{name}", redacted(text)[:PARAM_CHARACTERS]


def entries(path: Path, *, start: int = 0, size: int = -1) -> Iterator[Entry]:
    """The complete lines of a journal from a byte on; a line that a kill cut short is skipped."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        piece = file.read(size)
    for line in piece[: piece.rfind(b"\n") + 1].splitlines():
        try:
            yield Entry(*json.loads(line))
        except (ValueError, TypeError):
            logger.warning("%s: passing over a damaged line: %.40r", path, line)


def found(entry: Entry, home: Home) -> Path | None:
    """The file that an entry names, fetched from its store; None: it is gone."""
    directory, _, name = str(entry.value).rpartition("/")
    there = Home.of(directory) if is_address(directory) or directory[:1] == "/" else home.at(directory)
    path = there.here / name
    if there.root != home.root or not path.exists():
        there.fetch(name)
    if not path.exists():
        logger.warning("%s is gone, and will be missing in MLflow", path)
    return path if path.exists() else None


def curves(path: Path) -> dict[str, dict[int, float]]:
    """Metric -> step -> value, the last one where a step was repeated; for reports."""
    found: dict[str, dict[int, float]] = {}
    for entry in entries(path):
        if entry.kind == "metric":
            found.setdefault(entry.name, {})[entry.step] = entry.value
    return found


class Courier:
    """The thread that sends the lines of journals.

    Args:
        every_s: Pause between rounds: the lines written meanwhile are sent together.
        retry_s: Pause after a failure.
    """

    def __init__(self, *, every_s: float = 2.0, retry_s: float = 5.0) -> None:
        self.every_s, self.retry_s = every_s, retry_s
        self.closing, self.stop_at = threading.Event(), math.inf
        self.routes: dict[Path, Send] = {}
        self.failing: dict[Path, float] = {}
        """Journals whose last piece could not be sent, and when that was."""
        self.joining = threading.Lock()
        self.thread = threading.Thread(target=self.deliver, name="tracking", daemon=True)
        self.thread.start()

    def carry(self, journal: Path, send: Send) -> None:
        """From now on, deliver the lines of this journal; if `send` raises, it is called again later."""
        with self.joining:  # stages that train side by side may call this at once
            self.routes = self.routes | {journal: send}

    def deliver(self) -> None:
        """Send until closed, a bounded piece of a journal at a time."""
        while time.monotonic() < self.stop_at:
            closing = self.closing.is_set()  # read first, so that all written before it was set is seen
            waiting = [(journal, send) for journal, send in self.routes.items() if backlog(journal)]
            waiting.sort(key=lambda route: self.failing.get(route[0], 0.0))
            moved = self.sent_of(waiting)
            if closing and not moved:  # a server that is away when a run ends is not waited for
                return
            well = [journal for journal, _ in waiting if journal not in self.failing]
            behind = moved and any(backlog(journal) >= BATCH_BYTES for journal in well)
            stuck = self.failing and not moved
            self.closing.wait(0 if behind else self.retry_s if stuck else self.every_s)

    def sent_of(self, waiting: list[tuple[Path, Send]]) -> int:
        """Send a piece of each journal; return the bytes that have arrived.

        A refused piece holds up no other journal.  Journals that failed before come last: if one fails again
        and none was sent before it, the server is away, and the remaining ones are not tried.
        """
        moved = 0
        for journal, send in waiting:
            known = journal in self.failing
            try:
                moved += send_some(journal, send)
                self.failing.pop(journal, None)
            except Exception as error:  # noqa: BLE001 - tracking must never stop a run
                self.complain(error)
                self.failing[journal] = time.monotonic()
                if known and not moved:
                    break
        return moved

    def complain(self, error: Exception) -> None:
        """Log one line each time the server goes away."""
        if not self.failing:
            logger.warning("tracking: %.300s; the run goes on, its metrics wait in the journal", said(error))

    def close(self, timeout_s: float = 30.0) -> int:
        """Try to send the rest; return the bytes that stay in the journals for the next start."""
        self.stop_at = time.monotonic() + timeout_s
        self.closing.set()
        self.thread.join(timeout_s)
        return sum(backlog(journal) for journal in self.routes)


def said(error: Exception) -> str:
    """The first line of an error, without passwords."""
    return redacted((str(error).strip() or repr(error)).splitlines()[0])


def unreachable(error: BaseException | None) -> str:
    """Why a server was not reached, by the system's message among the causes; empty for other errors."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return ""


def send_some(journal: Path, send: Send) -> int:
    """Send one piece, then set the mark: a crash between repeats it and loses nothing.  Returns its bytes."""
    start = sent(journal)
    with journal.open("rb") as file:
        file.seek(start)
        piece = file.read(BATCH_BYTES) + file.readline()
    whole = piece.rfind(b"\n") + 1
    send(list(entries(journal, start=start, size=whole)))
    mark(journal, start + whole)
    return whole


def mark(journal: Path, position: int) -> None:
    """Write down that a journal has been delivered up to here."""
    draft = journal.with_suffix(".sent.new")
    draft.write_text(str(position))
    draft.replace(journal.with_suffix(".sent"))


def settle(journal: Path) -> None:
    """Set a mark that is ahead of its journal back to the journal's end, before new lines are written.

    A lost machine may have stored the mark but not the lines before it; the new lines that take their place
    have not been delivered.
    """
    size = journal.stat().st_size if journal.exists() else 0
    if noted(journal) > size:
        mark(journal, journal.read_bytes().rfind(b"\n") + 1 if size else 0)


def noted(journal: Path) -> int:
    """The position that the mark of a journal says; 0 without one, or if a lost machine has left it empty."""
    try:
        return int(journal.with_suffix(".sent").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def sent(journal: Path) -> int:
    """Bytes of a journal that have been delivered."""
    size = journal.stat().st_size if journal.exists() else 0
    return min(noted(journal), size)  # a copy of the journal may be older than that of its mark


def backlog(journal: Path) -> int:
    """Bytes written and not yet sent."""
    return journal.stat().st_size - sent(journal) if journal.exists() else 0
