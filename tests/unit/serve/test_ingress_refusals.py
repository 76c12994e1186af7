"""The wire: what cannot be honoured is an error that the official client understands."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dd_core.cascade import HopSpec
from serve.openai_api import GenerationRequest
from tests.unit.serve.endpoint import CASCADE, LAST, URL, Served, Told, pngs, refused

UNABLE: list[tuple[str, Any]] = [
    ("size", "1024x1024"),
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
    ("prompt", "&nbsp;"),
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


def test_steps_and_a_quality_that_is_other_steps_are_not_both_taken(served: Served) -> None:
    message = refused(served.post(num_inference_steps=5, quality="high"), 400, "quality")
    assert message == "quality: is a number of steps, too: leave it or num_inference_steps out"
    assert served.post(num_inference_steps=5, quality="standard").status_code == 200


@pytest.mark.parametrize(
    ("param", "value"), [("num_inference_steps", 5), ("guidance_scale", 2), ("quality", "high")]
)
def test_what_no_hop_hears_is_refused_and_what_clients_send_unasked_is_not(param: str, value: Any) -> None:
    one = Served(cascade=CASCADE.but(hops=tuple(hop.but(follows_request=False) for hop in CASCADE.hops)))
    with one.client:
        message = refused(one.post(**{param: value}), 400, param)
        assert message == f"{param}: no hop uses it; leave it out, or set follows_request of one"
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


def test_a_tally_is_told_how_every_request_for_images_ended(served: Served) -> None:
    served.api.tally = tally = Told()
    served.post(n=2)
    served.post(size="1x1")
    served.post(steps=3)
    served.client.get(URL)
    served.client.post(URL, json={"prompt": "a" * 30_000})
    served.client.get("/v1/models/none")
    served.links["base"].failing = TimeoutError()
    served.post()
    assert tally.told == [
        2,
        "unsupported_value",
        "unknown_parameter",
        "method_not_allowed",
        "body_too_large",
        "deadline_exceeded",
    ]
