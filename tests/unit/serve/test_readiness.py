"""When an endpoint says that it can serve, and what it says of its hops."""

import asyncio
import concurrent.futures
import io
import time

import pytest
from PIL import Image

from serve import painter as painting
from serve.painter import Painter
from tests.unit.serve.endpoint import CASCADE, DIGEST, Served, pngs, refused


def test_ready_means_that_every_hop_answers_and_live_does_not() -> None:
    one = Served()
    with one.client:
        ready = one.client.get("/health/ready")
        assert ready.json() == {
            "status": "ready",
            "model": "demo",
            "version": DIGEST,
            "precision": "bf16",
        }
        one.links["upsampler"].failing = RuntimeError()
        message = refused(one.client.get("/health/ready"), 503)
        assert message == "not ready: upsampler: RuntimeError"
        assert one.client.get("/health/live").json() == {"status": "live"}


def test_a_hop_too_busy_to_say_so_is_ready_as_long_as_it_paints(monkeypatch: pytest.MonkeyPatch) -> None:
    async def queued() -> painting.Served:
        raise TimeoutError

    one = Served()
    with one.client:
        monkeypatch.setattr(one.links["base"], "ready", queued)
        assert refused(one.client.get("/health/ready"), 503) == "not ready: base: no answer yet"
        monkeypatch.undo()
        one.post()  # after which every hop is asked what it serves
        monkeypatch.setattr(one.links["base"], "ready", queued)
        assert one.client.get("/health/ready").json()["status"] == "ready"
        monkeypatch.setattr(painting, "ANSWERED_S", 0.0)
        assert refused(one.client.get("/health/ready"), 503) == "not ready: base: no answer yet"
        monkeypatch.undo()
        one.links["base"].failing = RuntimeError()
        assert refused(one.client.get("/health/ready"), 503) == "not ready: base: RuntimeError"


def test_a_server_that_stops_finishes_what_it_has_begun_and_begins_nothing() -> None:
    one = Served()
    base = one.links["base"]
    with one.client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        base.hop.gate.clear()
        begun = pool.submit(one.post, seed=1)
        while not base.engine.active:
            time.sleep(0.01)
        assert one.api.drain() == 1
        assert refused(one.post(), 503) == "the server is stopping"
        assert refused(one.client.get("/health/ready"), 503) == "not ready: it is stopping"
        base.hop.gate.set()
        assert len(pngs(begun.result())) == 1
    assert one.api.drain() == 0


def test_a_replica_of_another_cascade_is_not_ready() -> None:
    one = Served()
    painter = Painter(CASCADE, DIGEST, one.links, precision="auto")
    assert not asyncio.run(painter.replacing(1))
    one.links["base"].digest = "cd" * 32
    one.links["upsampler"].failing = RuntimeError()
    assert asyncio.run(painter.replacing(1))
    one.links["base"].digest = DIGEST
    assert not asyncio.run(painter.replacing(1))
    one.links["base"].others = [painting.Served("cd" * 32, "auto", ""), RuntimeError()]  # one of its replicas
    assert asyncio.run(painter.replacing(1))
    one.links["base"].others = [TimeoutError()]  # it runs, and has no time to say what it serves
    assert asyncio.run(painter.replacing(1))
    assert not asyncio.run(painter.replacing(1, patient=False))
    one.links["base"].digest = "cd" * 32
    with one.client:
        assert "base: serves cascade cdcdcdcdcdcd, not abababababab" in one.client.get("/health/ready").text


def test_a_replica_of_the_same_cascade_in_other_numbers_is_not_ready() -> None:
    one = Served()
    painted_by = Painter(CASCADE, DIGEST, one.links, precision="auto")
    one.links["base"].precision = "fp32"
    assert asyncio.run(painted_by.replacing(1))
    with one.client:
        assert "base: was told precision fp32, not auto" in one.client.get("/health/ready").text


def test_a_replica_of_former_code_is_not_ready_and_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def former() -> str:
        return DIGEST

    one = Served()
    monkeypatch.setattr(one.links["base"], "ready", former)
    assert asyncio.run(Painter(CASCADE, DIGEST, one.links, precision="auto").replacing(1))
    with one.client:
        assert "base: serves by other code" in one.client.get("/health/ready").text


def test_a_file_says_unknown_until_every_hop_has_said_what_it_computes_in() -> None:
    one = Served()
    whole = asyncio.run(Painter(CASCADE, DIGEST, one.links, precision="auto").served(1))
    assert Painter(CASCADE, DIGEST, one.links, precision="auto").computes(whole) == "bf16"
    assert (
        Painter(CASCADE, DIGEST, one.links, precision="auto").computes(whole | {"base": TimeoutError()})
        == "unknown"
    )
    one.links["base"].computes = ""  # as a prior
    assert (
        Painter(CASCADE, DIGEST, one.links, precision="auto").computes(asyncio.run(one.api.painter.served(1)))
        == "bf16"
    )


def test_a_file_says_that_its_hops_computed_in_different_numbers() -> None:
    one = Served()
    one.links["base"].computes = "fp32"
    with one.client:
        (file,) = pngs(one.post(prompt="a"))
    assert Image.open(io.BytesIO(file)).info["precision"] == "bf16+fp32"
