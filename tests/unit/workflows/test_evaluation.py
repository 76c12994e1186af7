"""The judge of an endpoint is fair: what is right counts, what is missing is wrong, nothing is left out."""

import base64
import io
import json
import re
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from serve import running
from tests.answering import answering
from workflows import painting_client
from workflows.evaluation import evaluate_endpoint, keep_pictures, scores, verdict, wilson
from workflows.evaluation_spec import EvaluationSpec
from workflows.grammar import Case, training_caption
from workflows.labels import LabelSpec
from workflows.painting_client import Answer, NoPainterError, Wish, client_of, computed_in
from workflows.shapes import COLOURS, drawn

HEADER = struct.pack(">II5B", 30_000, 30_000, 8, 2, 0, 0, 0)
CHECK = struct.pack(">I", zlib.crc32(b"IHDR" + HEADER))
BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 13, b"IHDR") + HEADER + CHECK
"""A picture of 30,000 x 30,000 pixels, by its own account."""


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_true_pictures_score_one_and_pictures_of_another_caption_do_not() -> None:
    told = [training_caption(np.random.default_rng(seed)) for seed in range(24)]
    cases = [Case("one_object", caption, says) for _, caption, says in told]
    answers = [Answer(png(drawn(scene))) for scene, _, _ in told]
    right = scores([verdict(case, answer) for case, answer in zip(cases, answers, strict=True)])
    assert {right[name] for name in ("all", "colour", "shape", "place", "count")} == {1.0}
    rolled = zip(cases, [*answers[1:], answers[0]], strict=True)
    assert scores([verdict(case, answer) for case, answer in rolled])["all"] < 0.2


def test_no_picture_and_a_torn_picture_are_wrong_in_everything_that_was_said() -> None:
    scene, caption, says = training_caption(np.random.default_rng(5))
    case, whole = Case("one_object", caption, says), png(drawn(scene))
    good = verdict(case, Answer(whole))
    for answer in (Answer(b"", "HTTP 500"), Answer(whole[:100]), Answer(b"<html>"), Answer(BOMB)):
        bad = verdict(case, answer)
        assert bad.truth.keys() == good.truth.keys()
        assert not any(bad.truth.values())
        assert bad.failure


def test_an_endpoint_that_is_not_there_is_an_error_at_once() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(NoPainterError, match=f"{url} does not answer .*; give the address"):
            evaluate_endpoint(url, EvaluationSpec(captions=320))


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:port"])
def test_what_is_no_address_is_an_error_that_names_it(url: str) -> None:
    with pytest.raises(NoPainterError, match=f"^'{re.escape(url)}' is no address .*; give the address"):
        evaluate_endpoint(url, EvaluationSpec(captions=4))


def test_the_address_that_clients_of_openai_are_given_is_that_of_the_server(moody_url: str) -> None:
    with client_of(f"{moody_url}/v1/", 20) as client:
        assert str(client.base_url).rstrip("/") == moody_url


class Nowhere(BaseHTTPRequestHandler):
    """Answers, and has nothing of what is asked for."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.send_error(404)


def test_a_server_that_paints_no_pictures_is_named_and_not_judged() -> None:
    with (
        answering(Nowhere) as url,
        pytest.raises(NoPainterError, match=f"{url} paints no pictures .HTTP 404"),
    ):
        evaluate_endpoint(url, EvaluationSpec(captions=4))


def test_a_server_that_is_back_but_busy_is_no_longer_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def busy(request: httpx.Request) -> httpx.Response:
        if now[0] == 0:
            raise httpx.ConnectError("away", request=request)
        if now[0] < painting_client.LOST_S + 30:
            return httpx.Response(503, headers={"retry-after": "30"})
        return httpx.Response(200, json={"data": [{"b64_json": base64.b64encode(b"a picture").decode()}]})

    monkeypatch.setattr(painting_client, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    client = httpx.Client(transport=httpx.MockTransport(busy), base_url="http://here")
    assert painting_client.painted(client, Wish("a"), 0, EvaluationSpec(timeout_s=600)) == Answer(
        b"a picture"
    )


class Easel(BaseHTTPRequestHandler):
    """Paints black pictures, and keeps what it was asked for."""

    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        black = base64.b64encode(png(np.zeros((64, 64, 3), np.uint8))).decode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"b64_json": black}]}).encode())


def test_a_cascade_of_classes_is_asked_for_the_class_of_each_scene_and_no_other_for_any() -> None:
    label = LabelSpec(path="objects.0.colour", classes=tuple(COLOURS))
    with answering(Easel) as url:
        for spec in (EvaluationSpec(captions=8, label=label), EvaluationSpec(captions=8)):
            Easel.asked.clear()
            assert evaluate_endpoint(url, spec)["failed"] == 0
            asked = {body["prompt"]: body.get("label") for body in Easel.asked}
            scenes = {case.caption: json.loads(case.meta)["objects"] for case in spec.cases()}
            colours = {caption: things[0]["colour"] for caption, things in scenes.items()}
            assert len(set(colours.values())) > 1
            wanted = {
                one: label.classes.index(colour) if spec.label else None for one, colour in colours.items()
            }
            assert asked == wanted


class Changing(Easel):
    """Has another cascade after some pictures."""

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(code, message)
        if self.command == "POST":
            self.send_header("x-model-version", ("a" if len(self.asked) < 3 else "b") * 64)


def test_pictures_of_two_cascades_are_no_judgement_of_either() -> None:
    Changing.asked.clear()
    with (
        answering(Changing) as url,
        pytest.raises(
            NoPainterError, match=r"was changed while it was asked: a{12} and b{12} painted; ask again"
        ),
    ):
        evaluate_endpoint(url, EvaluationSpec(captions=8, concurrency=1))


def test_a_cascade_that_was_not_to_be_judged_is_not() -> None:
    with (
        answering(Easel) as url,
        pytest.raises(NoPainterError, match=r"another painted, e{12} was to be asked; ask again"),
    ):
        evaluate_endpoint(url, EvaluationSpec(captions=4), digest="e" * 64)


def test_wilson_interval_has_its_known_values() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson(90, 100)
    assert (1 - high, 1 - low) == pytest.approx(wilson(10, 100))


def test_captions_are_as_many_as_asked_in_three_groups() -> None:
    groups = Counter(case.group for case in EvaluationSpec(captions=320).cases())
    assert groups == {"one_object": 120, "two_object": 120, "unseen": 80}


class Moody(BaseHTTPRequestHandler):
    """Is busy once for every prompt, with a time to come back, and then fails once; refuses those of an even
    length for ever.
    """

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.answer(200, {"status": "live"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked[body["prompt"]] += 1
        if len(body["prompt"]) % 2 == 0:
            self.answer(400, {"error": {"message": "an even prompt"}})
        elif self.asked[body["prompt"]] == 1:
            self.answer(429, {"error": {"message": "busy"}})
        elif self.asked[body["prompt"]] == 2:
            self.answer(500, {"error": {"message": "a replica died"}})
        else:
            picture = base64.b64encode(png(np.zeros((64, 64, 3), np.uint8))).decode()
            self.answer(200, {"data": [{"b64_json": picture}]})

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("retry-after", "0.05")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def moody_url() -> Iterator[str]:
    with answering(Moody) as address:
        yield address


def test_an_endpoint_here_is_asked_past_the_proxies_of_the_environment(
    moody_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with client_of(moody_url, 20) as client:
        assert client.get("/health/live").json() == {"status": "live"}
    assert running.serving(moody_url)


def test_a_picture_that_did_not_come_is_not_that_of_the_cascade_judged_before(tmp_path: Path) -> None:
    keep_pictures(tmp_path, [Answer(b"first"), Answer(b"second")])
    keep_pictures(tmp_path, [Answer(b"", "HTTP 500"), Answer(b"other")])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == {"00001.png": b"other"}


def file_told(precision: str | None) -> Answer:
    told, file = PngInfo(), io.BytesIO()
    if precision is not None:
        told.add_text("precision", precision)
    Image.new("RGB", (1, 1)).save(file, "PNG", pnginfo=told)
    return Answer(file.getvalue())


@pytest.mark.parametrize(
    ("precisions", "wanted"),
    [
        (["bf16", "bf16"], "bf16"),
        (["fp32", None, "bf16"], "bf16+fp32"),
        (["bf16+fp32", "bf16"], "bf16+fp32"),
        ([None], ""),
        ([], ""),
    ],
)
def test_pictures_say_what_their_cascade_computed_in(precisions: list[str | None], wanted: str) -> None:
    nothing, torn = Answer(b"", "HTTP 500"), Answer(b"\x89PNG")
    assert computed_in([nothing, *map(file_told, precisions), torn]) == wanted


def test_what_fails_is_asked_again_and_a_refusal_counts_as_wrong_at_once(
    moody_url: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workflows.painting_client.PAUSE_S", 0.0)
    spec = EvaluationSpec(captions=16, concurrency=4, timeout_s=30)
    keep = tmp_path_factory.mktemp("kept")
    found = evaluate_endpoint(moody_url, spec, keep=keep)
    refused = sum(len(case.caption) % 2 == 0 for case in spec.cases())
    assert 0 < refused < 16
    assert (found["n"], found["failed"], found["all"]) == (16, refused, 0.0)
    once = Counter(case.caption for case in spec.cases() if len(case.caption) % 2 == 0)
    assert {caption: Moody.asked[caption] for caption in once} == once
    assert len(list(keep.glob("*.png"))) == 16 - refused
    lines = [json.loads(line) for line in (keep / "verdicts.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [case.caption for case in spec.cases()]
    assert all("an even prompt" in line["failure"] for line in lines if line["failure"])
