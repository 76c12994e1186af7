"""The wire: what a request that can be honoured gets."""

import asyncio
import io
import json
from collections.abc import Iterable

import pytest
from PIL import Image

from dd_core.samplers import SamplingSpec
from dd_core.text import tokens, too_long
from serve.openai_api import GenerationRequest
from tests.unit.serve.endpoint import BASE, DIGEST, LAST, URL, Served, pngs, refused


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


def test_the_same_idempotency_key_gets_the_same_images_unless_a_seed_is_given(served: Served) -> None:
    def asked(key: str, **body: int) -> list[bytes]:
        whole = {"prompt": "a red circle"} | body
        return pngs(served.client.post(URL, json=whole, headers={"Idempotency-Key": key}))

    assert asked("one") == asked("one") != asked("two")
    assert asked("one", seed=5) == pngs(served.post(seed=5))


def test_the_schema_says_how_errors_look(served: Served) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    for path in paths.values():
        for operation in path.values():
            assert operation["responses"].keys() == {"200", "default"}
            content = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert content == {"$ref": "#/components/schemas/ErrorAnswer"}


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
