"""A headless Chromium, spoken to over its DevTools protocol."""

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.s3 import stopped


class Tab:
    """One page of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.numbers = socket, itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and take its answer; what happens in between is noted."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while (message := json.loads(self.socket.recv(timeout=60))).get("id") != number:
            self.note(message)
        assert "error" not in message, message["error"]
        result: dict[str, Any] = message["result"]
        return result

    def note(self, message: dict[str, Any]) -> None:
        """Requests and complaints."""
        match message["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(message["params"]))

    def open(self, address: str, *, width: int) -> None:
        """Show a page in a window so many pixels wide, until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self.value("window.left = true")  # the page that is shown now, which may be of the same address
        self.call("Page.navigate", url=address)
        until = time.monotonic() + 120
        while self.value("window.left ? '' : location.href + document.readyState") != f"{address}complete":
            assert time.monotonic() < until, f"{address} does not load"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed (`make browser` tries to)")
    home = tmp_path_factory.mktemp("chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [program, *flags, f"--user-data-dir={home}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with stopped(process), connect(page_of(home), max_size=None, open_timeout=120) as socket:
        yield Tab(socket)


def page_of(home: Path) -> str:
    """Where the first page of a browser that has just been started is spoken to."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        if (note := home / "DevToolsActivePort").exists() and (lines := note.read_text().splitlines()):
            for target in httpx.get(f"http://127.0.0.1:{lines[0]}/json", timeout=60).json():
                if target["type"] == "page":
                    return str(target["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise TimeoutError("the browser does not say where it listens")
