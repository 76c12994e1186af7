"""The application over two hops in this process, and what its answers must look like."""

import asyncio
import base64
from typing import Any

import torch
from fastapi.testclient import TestClient

from dd_core.cascade import CascadeSpec, CascadeState, HopSpec
from dd_core.precision import Precision
from dd_core.samplers import SamplingSpec
from serve import painter as painting
from serve.admission import Door
from serve.engine import Engine
from serve.files import Files
from serve.guard import Limits
from serve.ingress import Api
from serve.painter import Painter
from tests.unit.serve.gaussian import GaussianHop

DIGEST = "ab" * 32

BASE = SamplingSpec(num_steps=3, guidance_scale=1.0)

LAST = SamplingSpec(num_steps=2, guidance_scale=1.0)

CASCADE = CascadeSpec(
    name="demo",
    hops=(HopSpec(stage="base", how=BASE, follows_request=True), HopSpec(stage="upsampler", how=LAST)),
    context_length=16,
    image_size=4,
)

URL = "/v1/images/generations"


class EngineLink:
    """A hop in this process: its engine, without Ray in between."""

    def __init__(self, hop: GaussianHop) -> None:
        self.hop, self.engine = hop, Engine(hop, max_rows=8)
        self.running: asyncio.Task[None] | None = None
        self.hows: list[SamplingSpec] = []
        self.labels: list[torch.Tensor | None] = []
        self.failing: Exception | None = None
        self.failing_of: dict[int, Exception] = {}
        """Of single seeds, as soon as the hop computes for the others."""
        self.digest = DIGEST
        self.precision: Precision = "auto"
        self.computes = "bf16"
        self.others: list[object] = []
        """What further replicas serve."""

    async def advance(self, state: CascadeState, how: SamplingSpec, timeout_s: float) -> CascadeState:
        self.running = self.running or asyncio.create_task(self.engine.run())
        self.hows.append(how)
        self.labels.append(state.label)
        if self.failing:
            raise self.failing
        if error := self.failing_of.get(state.seeds[0]):
            while not self.hop.asked:
                await asyncio.sleep(0.01)
            raise error
        return await self.engine.submit(state, how, timeout_s=timeout_s)

    async def ready(self) -> painting.Served:
        if self.failing:
            raise self.failing
        return painting.Served(self.digest, self.precision, self.computes)

    async def all_ready(self, timeout_s: float) -> list[object]:
        return [await asyncio.wait_for(self.ready(), timeout_s), *self.others]


class Served:
    """The application over two hops, and its client."""

    def __init__(
        self,
        timeout_s: float = 20,
        *,
        room: int = 16,
        body_s: float = 10,
        by_class: bool = False,
        cascade: CascadeSpec = CASCADE,
        files: str = "memory://files",
        **more: Any,
    ) -> None:
        self.links = {"base": EngineLink(GaussianHop()), "upsampler": EngineLink(GaussianHop())}
        painter = Painter(cascade, DIGEST, self.links, precision="auto", by_class=by_class, **more)
        limits = Limits(timeout_s, max_body_bytes=20_000, body_s=body_s)
        door = Door(room)
        self.api = Api(painter, created=1_700_000_000, door=door, limits=limits, files=Files(files))
        self.app = self.api.app()
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def post(self, **body: Any) -> Any:
        return self.client.post(URL, json={"prompt": "a red circle"} | body)


class Told:
    """What an application's tally is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def painted(self, images: int) -> None:
        self.told.append(images)

    def refused(self, code: str) -> None:
        self.told.append(code)

    def cancelled(self) -> None:
        self.told.append(None)


def pngs(answer: Any) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]


def refused(answer: Any, status: int, param: str | None = None) -> str:
    """The message of an error, whose form is checked."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    kinds = {429: "rate_limit_error"} | dict.fromkeys(range(400, 429), "invalid_request_error")
    assert error["type"] == kinds.get(status, "server_error")
    assert answer.headers["x-request-id"]
    return error["message"]
