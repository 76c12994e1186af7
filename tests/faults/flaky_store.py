"""A web server of files that fails on purpose: refuses, cuts, stalls, ends early, swaps its files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FlakyStore(ThreadingHTTPServer):
    """Serves a directory with byte ranges on 127.0.0.1; `faults` says what goes wrong, one a request.

    Args:
        root: The directory.
        faults: For each request of content, in turn and then none: "ok", "503", "cut", "short" or "gone".
        ranges: False for a server that knows no byte ranges.
    """

    daemon_threads = True

    def __init__(self, root: Path, faults: list[str], *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.ranges = root, list(faults), ranges
        self.lock = threading.Lock()
        self.asked: list[str] = []
        self.swaps: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, path: str) -> str:
        """What to do wrong this time."""
        with self.lock:
            self.asked.append(path)
            return self.faults.pop(0) if self.faults else "ok"

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away is what is tested."""


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of one file."""

    protocol_version = "HTTP/1.1"
    server: FlakyStore

    def do_HEAD(self) -> None:
        """Facts about a file."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """A file, or a range of it."""
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        """Send what was asked for, or fail."""
        path = self.server.root / self.path.lstrip("/")
        fault = self.server.fault(self.path) if body else "ok"
        if fault == "gone" or not path.is_file():
            path.unlink(missing_ok=True)
            return self.refuse(404)
        if fault == "503":
            return self.refuse(503)
        data = path.read_bytes()
        first, last = self.span(len(data))
        part = data[first : last + 1]
        self.send_response(206 if "Range" in self.headers and self.server.ranges else 200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{hash(data) & 0xFFFFFFFF:x}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not body:
            return None
        if fault in ("cut", "short"):
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)
        self.wfile.flush()
        if fault == "cut":
            self.connection.close()
        if self.path in self.server.swaps:
            path.write_bytes(self.server.swaps.pop(self.path))
        return None

    def span(self, size: int) -> tuple[int, int]:
        """First and last byte asked for."""
        asked = self.headers.get("Range", "")
        if not asked.startswith("bytes=") or not self.server.ranges:
            return 0, size - 1
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return int(first), min(int(last or size - 1), size - 1)

    def refuse(self, status: int) -> None:
        """An error without content."""
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def flaky_store(root: Path, faults: list[str], *, ranges: bool = True) -> Iterator[FlakyStore]:
    """A running store; closed at the end."""
    store = FlakyStore(root, faults, ranges=ranges)
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
