"""The wire: every request gets images, or an error that the official client understands."""

import asyncio
import base64
import concurrent.futures
import io
import json
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dd_core.cascade import CascadeSpec, CascadeState, HopSpec
from dd_core.consistency import FixedLevels
from dd_core.nets.network import PlainSpec
from dd_core.precision import Precision
from dd_core.samplers import SamplingSpec
from dd_core.stages import StageSpec
from dd_core.stages.chain_spec import ChainSpec
from dd_core.stages.consistency import ConsistencySpec
from dd_core.steering import GradientSpec
from dd_core.text import tokens, too_long
from jobs.recipes import consistency, ddpm, guided
from serve import painter as painting
from serve.engine import Engine, RefusedError
from serve.ingress import Api
from serve.openai_api import EFFORT, GenerationRequest
from serve.painter import HopLostError, Order, Painter, chosen
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
        self.digest = DIGEST
        self.precision: Precision = "auto"
        self.computes = "bf16"

    async def advance(self, state: CascadeState, how: SamplingSpec, timeout_s: float) -> CascadeState:
        self.running = self.running or asyncio.create_task(self.engine.run())
        self.hows.append(how)
        self.labels.append(state.label)
        if self.failing:
            raise self.failing
        return await self.engine.submit(state, how, timeout_s=timeout_s)

    async def ready(self) -> painting.Served:
        if self.failing:
            raise self.failing
        return painting.Served(self.digest, self.precision, self.computes)


class Served:
    """The application over two hops, and its client."""

    def __init__(
        self,
        timeout_s: float = 20,
        *,
        room: int = 16,
        by_class: bool = False,
        cascade: CascadeSpec = CASCADE,
        **more: Any,
    ) -> None:
        self.links = {"base": EngineLink(GaussianHop()), "upsampler": EngineLink(GaussianHop())}
        painter = Painter(cascade, DIGEST, self.links, precision="auto", by_class=by_class, **more)
        self.api = Api(painter, created=1_700_000_000, room=room, timeout_s=timeout_s, max_body_bytes=20_000)
        self.app = self.api.app()
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def post(self, **body: Any) -> Any:
        return self.client.post(URL, json={"prompt": "a red circle"} | body)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    one = Served()
    with one.client:
        yield one


def pngs(answer: Any) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]


def refused(answer: Any, status: int, param: str | None = None) -> str:
    """The message of an error, whose form is checked."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["type"] == ("invalid_request_error" if status < 429 else "server_error")
    assert answer.headers["x-request-id"]
    return error["message"]


def test_a_seed_is_an_image_however_many_are_asked_for(served: Served) -> None:
    together = served.post(seed=7, n=3)
    alone = [served.post(seed=seed) for seed in (7, 8, 9)]
    assert pngs(together) == [pngs(one)[0] for one in alone]
    assert [item["seed"] for item in together.json()["data"]] == [7, 8, 9]
    assert len(set(pngs(together))) == 3


def test_without_a_seed_the_answer_names_one_that_repeats_the_image(served: Served) -> None:
    first = served.post()
    assert first.headers["x-seed"] == str(first.json()["data"][0]["seed"])
    assert pngs(served.post(seed=int(first.headers["x-seed"]))) == pngs(first)


def test_seeds_run_over_the_top_back_to_zero(served: Served) -> None:
    assert [item["seed"] for item in served.post(seed=2**32 - 1, n=2).json()["data"]] == [2**32 - 1, 0]


def test_a_png_says_what_paints_it_again(served: Served) -> None:
    asked = {"num_inference_steps": 4, "guidance_scale": 2, "negative_prompt": "blue"}
    answer = served.post(prompt="ein Kreis, größer als ☃", seed=3, **asked)
    text = Image.open(io.BytesIO(pngs(answer)[0])).text  # type: ignore[attr-defined]
    assert text["prompt"] == "ein Kreis, größer als ☃"
    assert (text["negative_prompt"], text["seed"], text["cascade"]) == ("blue", "3", DIGEST)
    assert text["precision"] == "bf16"
    assert [SamplingSpec(**how) for how in json.loads(text["how"])] == [
        BASE.but(num_steps=4, guidance_scale=2.0),
        LAST,
    ]
    assert answer.headers["x-model-version"] == DIGEST


def test_a_request_changes_the_hop_that_follows_it_and_no_other(served: Served) -> None:
    served.post(num_inference_steps=5, guidance_scale=2)
    assert served.links["base"].hows[-1] == BASE.but(num_steps=5, guidance_scale=2.0)
    assert served.links["upsampler"].hows[-1] == LAST
    served.post(quality="high")
    assert served.links["base"].hows[-1] == BASE.but(num_steps=6)


def test_a_negative_prompt_changes_a_guided_image(served: Served) -> None:
    plain = pngs(served.post(seed=1, guidance_scale=3))
    assert pngs(served.post(seed=1, guidance_scale=3, negative_prompt="")) == plain
    assert pngs(served.post(seed=1, guidance_scale=3, negative_prompt="blue")) != plain


@pytest.mark.parametrize(
    ("form", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")]
)
def test_the_file_has_the_format_that_was_asked_for(served: Served, form: str, magic: bytes) -> None:
    answer = served.post(output_format=form)
    assert pngs(answer)[0].startswith(magic)
    assert answer.json()["output_format"] == form


def test_everything_the_client_can_leave_open_may_be_null(served: Served) -> None:
    optional = GenerationRequest.model_fields.keys() - {"prompt"}
    assert len(pngs(served.post(**dict.fromkeys(optional)))) == 1


def test_what_says_nothing_about_the_image_is_taken_and_ignored(served: Served) -> None:
    answer = served.post(
        seed=4, moderation="low", user="u", safety_identifier="s", background="opaque", stream=False
    )
    assert pngs(answer) == pngs(served.post(seed=4))
    assert answer.json()["safety_identifier"] == "s"


UNABLE: list[tuple[str, Any]] = [
    ("size", "1024x1024"),
    ("response_format", "url"),
    ("background", "transparent"),
    ("output_format", "gif"),
    ("output_compression", 50),
    ("stream", True),
    ("partial_images", 2),
    ("style", "vivid"),
    ("n", 0),
    ("n", 11),
    ("n", "3"),
    ("n", True),
    ("prompt", ""),
    ("prompt", " \n"),
    ("prompt", "a" * 1001),
    ("prompt", "nul \0"),
    ("prompt", None),
    ("seed", -1),
    ("seed", 2**32),
    ("guidance_scale", 51),
    ("num_inference_steps", 251),
    ("negative_prompt", "a" * 1001),
    ("quality", "best"),
    ("mask", "x"),
]


@pytest.mark.parametrize(("param", "value"), UNABLE, ids=str)
def test_what_cannot_be_honoured_is_refused_by_name(served: Served, param: str, value: Any) -> None:
    message = refused(served.post(**{param: value}), 400, param)
    assert message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("param", "value"), [("num_inference_steps", 5), ("guidance_scale", 2), ("quality", "high")]
)
def test_what_no_hop_hears_is_refused_and_what_clients_send_unasked_is_not(param: str, value: Any) -> None:
    one = Served(cascade=CASCADE.but(hops=tuple(hop.but(follows_request=False) for hop in CASCADE.hops)))
    with one.client:
        message = refused(one.post(**{param: value}), 400, param)
        assert message == f"{param}: no hop hears it; leave it out, or set follows_request of one"
        usual = [one.post(seed=1, quality=quality) for quality in ("auto", "standard", None)]
    assert len({pngs(answer)[0] for answer in usual}) == 1


def test_a_negative_prompt_is_refused_where_nothing_is_guided(served: Served) -> None:
    message = refused(served.post(negative_prompt="blue"), 400, "negative_prompt")
    assert message == (
        "negative_prompt: no hop is guided away from it; leave it out, or set a guidance_scale above 1"
    )
    fixed = CASCADE.but(hops=tuple(HopSpec(stage=stage, how=LAST) for stage in ("base", "upsampler")))
    with Served(cascade=fixed).client as client:
        told = refused(client.post(URL, json={"prompt": "a", "negative_prompt": "b"}), 400, "negative_prompt")
    assert told.endswith("leave it out")


def test_a_negative_prompt_is_refused_where_what_is_guided_reads_no_captions() -> None:
    stages = {hop.stage: CHAIN for hop in CASCADE.hops}  # told classes alone
    with Served(stages=stages).client as client:
        body = {"prompt": "a", "negative_prompt": "b", "guidance_scale": 3}
        told = refused(client.post(URL, json=body), 400, "negative_prompt")
    assert told == "negative_prompt: no hop is guided away from it; leave it out"


def test_an_unknown_model_is_404_and_the_known_one_is_listed(served: Served) -> None:
    message = refused(served.post(model="dall-e-3"), 404, "model")
    assert message == "model: there is no 'dall-e-3'; demo is served"
    listed = served.client.get("/v1/models").json()
    entry = {"id": "demo", "object": "model", "created": 1_700_000_000, "owned_by": "ddiff"}
    assert listed == {"object": "list", "data": [entry]}
    assert served.client.get("/v1/models/demo").json() == entry
    refused(served.client.get("/v1/models/other"), 404, "model")
    assert len(pngs(served.post(model="demo", size="4x4"))) == 1


def test_a_prompt_longer_than_the_context_is_cut_and_says_so(served: Served) -> None:
    fits, cut = " ".join(["red"] * 14), " ".join(["red"] * 15)
    assert not too_long(fits, 16)
    assert too_long(cut, 16)
    assert "x-prompt-truncated" not in served.post(prompt=fits).headers
    assert served.post(prompt=cut).headers["x-prompt-truncated"] == "prompt"
    both = served.post(prompt=cut, negative_prompt=cut, guidance_scale=2)
    assert both.headers["x-prompt-truncated"] == "prompt, negative_prompt"


def test_texts_are_read_once_an_order_and_never_in_the_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(captions: Iterable[str], context_length: int) -> list[list[int]]:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        read.extend(captions)
        return tokens(captions, context_length)

    def measured(caption: str, context_length: int) -> bool:
        counted([caption], context_length)
        return too_long(caption, context_length)

    monkeypatch.setattr("dd_core.cascade.tokens", counted)
    monkeypatch.setattr("serve.painter.too_long", measured)
    served.post(n=3, guidance_scale=2, negative_prompt="blue")
    assert read == ["a red circle", "blue"] * 2  # to be painted, and to be told whether they were cut


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", URL, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/models/", 405),
    ],
)
def test_wrong_addresses_get_json_too(served: Served, method: str, path: str, status: int) -> None:
    answer = served.client.request(method, path)
    refused(answer, status)
    assert status != 405 or answer.headers["allow"]


def test_a_body_over_the_cap_is_413_announced_or_not(served: Served) -> None:
    body = json.dumps({"prompt": "a" * 30_000}).encode()
    headers = {"content-type": "application/json"}
    refused(served.client.post(URL, content=body, headers=headers), 413)
    refused(served.client.post(URL, content=iter([body[:15_000], body[15_000:]]), headers=headers), 413)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 9000,
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"n": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_request_is_400(served: Served, body: bytes) -> None:
    answer = served.client.post(URL, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (None, "the body has no Content-Type; "),
        (
            "application/x-www-form-urlencoded",
            "Content-Type 'application/x-www-form-urlencoded' is not taken; ",
        ),
        ("multipart/form-data; boundary=a", "Content-Type 'multipart/form-data' is not taken; "),
    ],
)
def test_a_body_that_is_not_said_to_be_json_is_told_what_is_taken(
    served: Served, kind: str | None, said: str
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = served.client.post(URL, content=b'{"prompt": "a"}', headers=headers)
    told = "send the body as JSON, with the header Content-Type: application/json"
    assert refused(answer, 415) == said + told
    assert answer.json()["error"]["code"] == "unsupported_content_type"
    kind = "Application/JSON; charset=utf-8"
    assert served.client.post(URL, content=b'{"prompt": "a"}', headers={"content-type": kind}).is_success


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)
FIELDS = {name: ANYTHING for name in GenerationRequest.model_fields if name != "num_inference_steps"}
LIKELY = {
    "n": st.integers(-1, 3),
    "size": st.sampled_from(["auto", "4x4", "256x256"]),
    "seed": st.integers(-1, 2**32),
    "guidance_scale": st.floats(-1, 60),
    "quality": st.sampled_from(["low", "hd", "ultra"]),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "num_inference_steps": st.integers(-1, 6),
    "negative_prompt": st.text(max_size=20),
}
BODIES = st.fixed_dictionaries({"prompt": st.text(max_size=20)}, optional=LIKELY) | st.fixed_dictionaries(
    {}, optional=FIELDS
)


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # the server does, in its own thread
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES)
def test_any_json_gets_its_images_or_a_reason(served: Served, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    answer = served.client.post(URL, content=content, headers={"content-type": "application/json"})
    if answer.status_code == 200:
        assert len(pngs(answer)) == (body.get("n") or 1)
    else:
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["message"]


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
        assert refused(answer, 504) == f"not finished in {'0.2' if patience == '0.2' else '0.4'} s"


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
    one = Served(timeout_s=20)
    with one.client:
        one.links["upsampler"].failing = HopLostError("gone", again=True)
        refused(one.post(n=8, num_inference_steps=3), 503)
        time.sleep(0.1)
        assert one.links["base"].engine.load() == 0


def test_a_client_that_goes_away_frees_every_hop_whatever_its_headers_say() -> None:
    body = json.dumps({"prompt": "a", "n": 4, "num_inference_steps": 250}).encode()
    one = Served()
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


def test_a_class_reaches_every_hop_and_the_file_and_is_refused_where_none_hears_it(served: Served) -> None:
    assert "label: must be left out: no hop is told classes" in refused(served.post(label=2), 400, "label")
    one = Served(by_class=True)
    with one.client:
        answer = one.post(label=2, seed=1)
        (file,) = pngs(answer)
        assert Image.open(io.BytesIO(file)).text["label"] == "2"
        assert [link.labels for link in one.links.values()] == [[torch.tensor([2])]] * 2
        one.links["base"].failing = RefusedError("it paints by class; give a label")
        assert refused(one.post(), 400) == "it paints by class; give a label"
        refused(one.post(label=-1), 400, "label")


@pytest.mark.parametrize(
    ("own", "quality", "steps"),
    [(100, "max", 250), (100, "low", 50), (1000, "auto", 1000), (1000, "high", 1000), (1000, "low", 500)],
)
def test_effort_asks_for_no_more_steps_than_a_request_may_and_cuts_none_of_a_hop_s_own(
    own: int, quality: Any, steps: int
) -> None:
    order = Api(
        Painter(CASCADE, DIGEST, {}, precision="auto"), created=0, room=1, timeout_s=1, max_body_bytes=1
    ).order(GenerationRequest(prompt="a", quality=quality))
    hop = HopSpec(stage="base", how=BASE.but(num_steps=own), follows_request=True)
    assert chosen(hop, order).num_steps == steps


CHAIN = ChainSpec(net=PlainSpec(unet=ddpm.UNET.but(labels=4)), told_dropout=0.1)


@pytest.mark.parametrize(
    ("how", "quality", "steps"),
    [
        ({"spacing": "ldm_plus_one", "num_steps": 50}, "xhigh", 125),  # 150 divides no 1000
        ({"spacing": "ldm_plus_one", "num_steps": 50}, "low", 25),
        ({"spacing": "ddim_leading", "num_steps": 25}, "xhigh", 77),
        ({"spacing": "karras", "num_steps": 25}, "xhigh", 75),
    ],
)
def test_effort_is_rounded_to_steps_that_the_hop_can_take(
    how: dict[str, Any], quality: Any, steps: int
) -> None:
    hop = HopSpec(stage="base", how=SamplingSpec(sampler="ddim", **how), follows_request=True)
    order = Order("a", "", [0], None, EFFORT[quality], None)
    assert chosen(hop, order, CHAIN).num_steps == steps


def test_effort_is_rounded_to_the_jumps_of_a_path_in_segments() -> None:
    jumping = consistency.classes()
    (hop,) = jumping.cascade.hops
    stage = jumping.stage(hop.stage).stage
    assert isinstance(stage, ConsistencySpec)
    stage = stage.but(levels=FixedLevels(num_levels=17))
    efforts = (0.5, 1, 2, 3, 4)
    found = [chosen(hop, Order("a", "", [0], None, effort, None), stage).num_steps for effort in efforts]
    assert found == [4, 4, 8, 16, 16]


def test_steps_that_a_hop_cannot_take_are_refused_before_any_hop_is_asked() -> None:
    how = SamplingSpec(sampler="ddim", spacing="ldm_plus_one", num_steps=50)
    hops = (HopSpec(stage="upsampler", how=LAST), HopSpec(stage="base", how=how, follows_request=True))
    one = Served(cascade=CASCADE.but(hops=hops), stages={"base": CHAIN})
    with one.client:
        told = refused(one.post(num_inference_steps=30), 400)
        assert told == "hop base: ldm_plus_one needs num_steps below 1000 that divides it, got 30"
        assert [link.hows for link in one.links.values()] == [[], []]


UNTOLD = ChainSpec(net=PlainSpec(unet=ddpm.UNET), told_dropout=0.0)
BY_CLASS = ChainSpec(
    net=PlainSpec(unet=ddpm.UNET.but(labels=4, image_channels=3)), image_size=256, factor=4, told_dropout=0.0
)
LED = CASCADE.hops[1].but(
    how=LAST.but(gradient=GradientSpec(classes=2.0)), guides={"classifier": "classifier"}
)


@pytest.mark.parametrize(
    ("second", "stages", "lacking", "unknown"),
    [
        (
            CASCADE.hops[1],
            {"upsampler": BY_CLASS},
            "hop upsampler: it paints by class, and the request names none; give a label",
            "hop upsampler: label [8]: classes are 0 to 3",
        ),
        (
            LED,
            {"upsampler": UNTOLD, "classifier": guided.classifier().stage},
            "hop upsampler: it paints by class, and the request names none; give a label",
            "hop upsampler: label [8] is no class of the classifier; there are 0 to 7",
        ),
    ],
    ids=["told", "led"],
)
def test_a_class_that_a_later_hop_lacks_or_does_not_know_is_refused_before_any_hop_is_asked(
    second: HopSpec, stages: dict[str, StageSpec], lacking: str, unknown: str
) -> None:
    cascade = CASCADE.but(hops=(CASCADE.hops[0], second))
    one = Served(cascade=cascade, by_class=True, stages=stages | {"base": UNTOLD})
    with one.client:
        assert refused(one.post(), 400) == lacking
        assert refused(one.post(label=8), 400) == unknown
        assert [link.hows for link in one.links.values()] == [[], []]
        assert len(pngs(one.post(label=3))) == 1


def test_quality_is_refused_where_steps_are_fixed() -> None:
    how = SamplingSpec(sampler="ddim", spacing="fast27", num_steps=27)
    hops = (HopSpec(stage="base", how=how, follows_request=True), CASCADE.hops[1])
    one = Served(cascade=CASCADE.but(hops=hops), stages={"base": CHAIN})
    with one.client:
        told = refused(one.post(quality="high"), 400, "quality")
        assert told == "quality: no hop takes any other number of steps; leave it out"
