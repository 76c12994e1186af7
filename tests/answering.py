"""A server of a few lines at 127.0.0.1, where a test needs one that says something in particular."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(answers: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Its address, while inside; requests are not logged."""
    quiet = type(answers.__name__, (answers,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
