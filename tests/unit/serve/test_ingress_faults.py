"""What a request gets when hops fail, time runs out, the room is full or the client goes."""

import asyncio
import concurrent.futures
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import torch

from dd_core.cascade import CascadeState
from serve.painter import HopLostError
from tests.unit.serve.endpoint import LAST, URL, Served, Told, pngs, refused


@pytest.mark.parametrize(
    ("error", "status", "code", "header"),
    [
        (TimeoutError(), 504, "deadline_exceeded", ("x-should-retry", "false")),
        (HopLostError("no replica", again=True), 503, "unavailable", ("retry-after", "2")),
        (torch.OutOfMemoryError("CUDA out of memory"), 503, "unavailable", ("retry-after", "2")),
        (HopLostError("two died", again=False), 500, "replica_died", ("x-should-retry", "false")),
        (FloatingPointError(), 500, "not_finite", ("x-should-retry", "false")),
    ],
)
def test_each_failure_of_a_hop_says_whether_to_come_back(
    error: Exception, status: int, code: str, header: tuple[str, str]
) -> None:
    one = Served()
    with one.client:
        one.links["upsampler"].failing = error
        answer = one.post(n=2)
    refused(answer, status)
    assert answer.json()["error"]["code"] == code
    assert answer.headers[header[0]] == header[1]


def test_a_fault_of_ours_shows_nothing_of_the_inside_and_logs_no_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = Served()
    with one.client, caplog.at_level(logging.DEBUG):
        one.links["base"].failing = RuntimeError("/secret/path says: a red circle")
        answer = one.post()
    message = refused(answer, 500)
    assert message == f"internal error; the server's log has it as {answer.headers['x-request-id']}"
    assert answer.headers["x-request-id"] in caplog.text
    assert "RuntimeError" in caplog.text
    assert "red circle" not in caplog.text


@pytest.mark.parametrize("patience", ["0.2", "5", "-1", "nan", "inf", "soon"])
def test_the_deadline_is_the_shorter_of_the_server_s_and_the_client_s(patience: str) -> None:
    one = Served(timeout_s=0.4)
    with one.client:
        one.links["base"].hop.gate.clear()
        answer = one.client.post(URL, json={"prompt": "a"}, headers={"x-stainless-read-timeout": patience})
        one.links["base"].hop.gate.set()
        assert refused(answer, 504) == f"not finished in {'0.1' if patience == '0.2' else '0.4'} s"


def test_images_are_let_in_at_one_door_and_what_is_let_in_is_refused_by_no_hop() -> None:
    one = Served(room=4)
    base, last = (one.links[stage] for stage in ("base", "upsampler"))
    with one.client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        last.hop.gate.clear()
        begun = [pool.submit(one.post, n=3)]
        while not last.engine.active:
            time.sleep(0.01)
        asked = len(base.hows)
        answer = one.post(n=2)
        assert refused(answer, 429) == "busy: too many images wait; try again later"
        assert (answer.json()["error"]["code"], answer.headers["retry-after"]) == ("busy", "1")
        refused(one.post(n=2, style="vivid"), 400, "style")  # which no later time would mend
        assert len(base.hows) == asked
        begun.append(pool.submit(one.post, n=1))
        while one.api.door.images < 4:
            time.sleep(0.01)
        last.hop.gate.set()
        assert [len(pngs(request.result())) for request in begun] == [3, 1]
        assert len(pngs(one.post(n=9))) == 9  # alone


def test_one_failing_image_of_several_stops_the_others() -> None:
    one = Served(timeout_s=60)
    base = one.links["base"]
    base.failing_of = {5: HopLostError("gone", again=True)}
    with one.client:
        base.hop.gate.clear()
        refused(one.post(n=8, seed=5, num_inference_steps=250), 503)
        assert base.engine.load() == 0
        base.hop.gate.set()
        assert len(pngs(one.post())) == 1
    assert base.hop.batches[0] == 7  # the one that was being computed
    assert set(base.hop.batches[1:]) == {1}  # nothing beside the next request


def test_a_body_that_never_arrives_is_waited_for_no_longer_than_the_limit_and_others_are_answered() -> None:
    one = Served(body_s=0.2)

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(3600)

    async def scenario() -> list[Any]:
        transport = httpx.ASGITransport(one.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"content-type": "application/json"}
            return [
                await client.post(URL, content=slow(), headers=headers),
                await client.post(URL, json={"prompt": "a"}),
            ]

    late, good = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert refused(late, 408) == "the body is not here after 0.2 s; send all of it at once"
    assert (late.json()["error"]["code"], late.headers["x-should-retry"]) == ("body_too_slow", "false")
    assert len(pngs(good)) == 1


def test_painting_may_take_longer_than_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Served(body_s=0.05)
    whole = one.links["base"].advance

    async def late(*told: Any) -> CascadeState:
        await asyncio.sleep(0.5)
        return await whole(*told)

    monkeypatch.setattr(one.links["base"], "advance", late)
    with one.client:
        assert len(pngs(one.post())) == 1


def test_a_client_that_goes_away_frees_every_hop_whatever_its_headers_say() -> None:
    body = json.dumps({"prompt": "a", "n": 4, "num_inference_steps": 250}).encode()
    one = Served()
    one.api.tally = tally = Told()
    base = one.links["base"]

    async def scenario() -> int:
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            while len(base.hop.batches) < 5:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        headers = [(b"content-type", b"application/json"), (b"x-request-disconnect-disabled", b"?1")]
        scope = {"type": "http", "method": "POST", "path": URL, "headers": headers, "query_string": b""}
        await one.app(scope, receive, send)
        seen = len(base.hop.batches)
        await base.engine.submit(CascadeState([0], torch.zeros(1, 16).long()), LAST, timeout_s=9)
        return len(base.hop.batches) - seen

    assert asyncio.run(scenario()) <= 1 + 2
    assert base.engine.load() == 0
    assert tally.told == [None]
