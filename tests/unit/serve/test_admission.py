"""The door under more than can be painted: what is let in is painted, and who is sent away is told till when.

The real door, painter and engine, on a clock that jumps from event to event; only the device is none.
"""

import asyncio
import contextlib
import heapq
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import Request
from torch import Tensor

from dd_core.cascade import CascadeSpec, HopSpec
from dd_core.denoiser import Conditioning, Denoised
from dd_core.samplers import SamplingSpec
from serve.admission import Door
from serve.files import Files
from serve.guard import Limits
from serve.ingress import Api
from serve.openai_api import ApiError, GenerationRequest
from serve.painter import Painter
from tests.unit.serve.endpoint import DIGEST, EngineLink
from tests.unit.serve.gaussian import GaussianHop

HOW = SamplingSpec(num_steps=2, guidance_scale=1.0)
CASCADE = CascadeSpec(
    name="one", hops=(HopSpec(stage="base", how=HOW, follows_request=True),), context_length=16, image_size=4
)
ROOM = 72
NOWHERE = Files("memory://nowhere")
SETTLED_S = 360.0


class JumpingLoop(asyncio.SelectorEventLoop):
    """Its time stands still while it works, and is the next timer's when there is nothing else to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        while self._scheduled and self._scheduled[0]._cancelled:  # type: ignore[attr-defined]
            gone = heapq.heappop(self._scheduled)  # type: ignore[attr-defined]
            gone._scheduled = False
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined]
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]

    def run_in_executor(self, _: Any, work: Callable[..., Any], *given: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done = self.create_future()
        done.set_result(work(*given))
        return done


class SlowHop(GaussianHop):
    """A device that needs some seconds for a step of one image, whatever the company."""

    def __init__(self, loop: JumpingLoop, step_s: float) -> None:
        super().__init__()
        self.loop, self.step_s = loop, step_s

    def model(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Denoised:
        self.loop.now += self.step_s * len(x)
        return super().model(x, sigma, cond)


def request() -> Request:
    """Of a client that stays."""
    return Request({"type": "http", "method": "POST", "headers": []}, asyncio.Event().wait)  # type: ignore[arg-type]


def simulated(step_s: float, scenario: Callable[[Api], Awaitable[Any]]) -> Any:
    """What a scenario returns, with the default limits, a device of some seconds a step behind the door."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, JumpingLoop)
        painter = Painter(CASCADE, DIGEST, {"base": EngineLink(SlowHop(loop, step_s))}, precision="auto")
        api = Api(painter, created=0, door=Door(ROOM), limits=Limits(120, 20_000, 10), files=NOWHERE)
        return runner.run(scenario(api))  # type: ignore[arg-type]


async def crowd(api: Api, bodies: list[dict[str, Any]], until: float) -> tuple[list[int], set[int]]:
    """Steps painted for each image finished after settling, and all the times that clients were told."""
    clock, finished, told = asyncio.get_running_loop().time, list[int](), set[int]()

    async def client(**asked: Any) -> None:
        body = GenerationRequest(prompt="a", **asked)
        while clock() < until:
            try:
                await api.generate(body, request())
            except ApiError as error:
                if error.response().status_code == 429:
                    told.add(int(error.response().headers["retry-after"]))
                    await asyncio.sleep(int(error.response().headers["retry-after"]))
            else:
                if SETTLED_S < clock() <= until:
                    finished.extend([body.num_inference_steps or HOW.num_steps] * (body.n or 1))

    await asyncio.gather(*(client(**body) for body in bodies))
    return finished, told


@pytest.mark.parametrize("image_s", [1.0, 1.8, 2.5, 4.0, 12.0])
def test_under_overload_what_is_painted_is_what_the_device_can_paint(image_s: float) -> None:
    finished, told = simulated(image_s / 2, lambda api: crowd(api, [{}] * ROOM, 2 * SETTLED_S))
    assert len(finished) >= 0.95 * SETTLED_S / image_s
    assert all(1 <= after <= 120 for after in told)


def test_the_door_counts_steps_and_not_images() -> None:
    bodies = [{"num_inference_steps": steps, "n": n} for steps in (2, 4, 12) for n in (1, 2, 4)] * 6
    finished, told = simulated(0.6, lambda api: crowd(api, bodies, 2 * SETTLED_S))
    assert sum(finished) >= 0.95 * SETTLED_S / 0.6
    assert len(told) > 1  # more for those who ask for more


def test_a_client_that_goes_at_once_does_not_close_the_door() -> None:
    async def gone(door: Door) -> None:
        with door.let_in(1, 30, 120):
            await asyncio.sleep(0.1)
            raise ConnectionError

    async def burst() -> None:
        door = Door(ROOM)
        with pytest.raises(ConnectionError):
            await gone(door)
        with door.let_in(1, 30, 120), door.let_in(10, 300, 120):
            assert door.images == 11

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(burst())


def test_what_is_slow_is_let_in_beside_others_where_each_may_have_a_replica() -> None:
    async def crowded() -> None:
        door = Door(5, replicas=4)
        with door.let_in(1, 30, 120):
            await asyncio.sleep(60)
        with contextlib.ExitStack() as inside:
            inside.enter_context(door.let_in(1, 30, 120))
            with pytest.raises(ApiError, match="busy"):
                inside.enter_context(door.let_in(5, 30, 120))  # there is no room for so many
            for _ in range(3):
                inside.enter_context(door.let_in(1, 30, 120))
            with pytest.raises(ApiError, match="busy"):
                inside.enter_context(door.let_in(1, 30, 120))

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(crowded())
