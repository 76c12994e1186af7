"""An HTTP server at 127.0.0.1 that answers as a test needs it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering(answers: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with this handler during the block; yields the address.  Requests are not logged."""
    quiet = type(answers.__name__, (answers,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
