"""Who judges own data is fair: true pictures score as true ones, others worse, what is missing is wrong."""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core import images
from dd_core.nets.autoencoder import AutoencoderNetSpec
from dd_core.stages.autoencoder import AutoencoderSpec
from dd_core.stages.clip import ClipSpec
from tests.answering import answering
from tests.own_data import own_data, picture
from tests.unit.workflows.tiny_run import CLIP, saved
from workflows import clip_judge
from workflows.clip_judge import Judge, OwnData, clip_digest, evaluate_own, judge_of
from workflows.evaluation_spec import EvaluationSpec
from workflows.storage import Home

SPEC = EvaluationSpec(captions=12, among=10, concurrency=4, timeout_s=30)


def colours(some: Tensor) -> Tensor:
    return F.normalize((some.mean((2, 3)) + 1) * 127.5 - 127, dim=-1)


def said(captions: Sequence[str]) -> Tensor:
    return F.normalize(torch.tensor([[float(n) for n in one.split()[1:]] for one in captions]) - 127, dim=-1)


class Endpoint(NamedTuple):
    """What is served, and where."""

    url: str
    paint: list[Callable[[str], bytes]]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """Paints what the test says; the judge knows colours, and nothing else."""
    paint: list[Callable[[str], bytes]] = []

    class Painter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {})

        def do_POST(self) -> None:
            prompt = json.loads(self.rfile.read(int(self.headers["content-length"])))["prompt"]
            if png := paint[0](prompt):
                self.answer(200, {"data": [{"b64_json": base64.b64encode(png).decode()}]})
            else:
                self.answer(400, {"error": {"message": "never"}})

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    monkeypatch.setattr(clip_judge, "judge_of", lambda _: Judge(colours, said))
    monkeypatch.setattr(clip_judge, "clip_digest", lambda _: "d")
    monkeypatch.setattr("workflows.painting_client.PAUSE_S", 0.0)
    with answering(Painter) as address:
        yield Endpoint(address, paint)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return own_data(tmp_path_factory.mktemp("own") / "data", pairs=160, held_out=0.3)


def number_of(prompt: str) -> int:
    digits = [(int(n) - 25) // 25 for n in prompt.split()[1:]]
    return sum(digit * 9**place for place, digit in enumerate(digits))


def judged(endpoint: Endpoint, data: Home, paint: Callable[[str], bytes], **kept: Path) -> dict[str, Any]:
    endpoint.paint[:] = [paint]
    return evaluate_own(endpoint.url, SPEC, OwnData(data.address, "judge"), **kept)


def test_an_endpoint_that_paints_the_true_pictures_scores_as_they_do(
    endpoint: Endpoint, data: Home, tmp_path: Path
) -> None:
    found = judged(endpoint, data, lambda prompt: picture(number_of(prompt)), keep=tmp_path)
    assert (found["n"], found["failed"], found["among"], found["held_out"]) == (12, 0, 10, True)
    for name in ("cosine", "r_precision"):
        assert found[name] == found[f"true_{name}"] == pytest.approx(1, abs=1e-3)
        assert found["intervals"][name] == found["intervals"][f"true_{name}"]
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    for line in lines:
        png = (tmp_path / line["picture"]).read_bytes()
        true = (tmp_path / line["picture"].replace(".png", "-true.png")).read_bytes()
        assert (images.decoded(png) == images.decoded(true)).all()


def test_pictures_of_other_captions_are_found_by_nobody_and_true_ones_stay_as_good(
    endpoint: Endpoint, data: Home
) -> None:
    found = judged(endpoint, data, lambda prompt: picture(728 - number_of(prompt)))  # the opposite colour
    assert (found["r_precision"], found["true_r_precision"]) == (0, 1)
    assert found["cosine"] == pytest.approx(-found["true_cosine"], abs=0.05)
    assert found["judge"] == {"name": "judge", "digest": "d", "taught": False}


def test_what_is_missing_or_torn_counts_as_wrong_and_is_told(endpoint: Endpoint, data: Home) -> None:
    true = judged(endpoint, data, lambda prompt: picture(number_of(prompt)))
    for bad in (b"", picture(0)[:40]):
        found = judged(
            endpoint,
            data,
            lambda prompt, bad=bad: bad if number_of(prompt) % 2 else picture(number_of(prompt)),
        )
        assert 0 < found["failed"] < 12
        share = 1 - found["failed"] / 12
        assert found["r_precision"] == pytest.approx(share)
        assert found["cosine"] == pytest.approx(share * true["cosine"], abs=1e-3)
        assert found["true_cosine"] == true["true_cosine"]


def test_of_the_pictures_one_is_decoded_at_a_time_and_all_are_kept_before_they_are_judged(
    endpoint: Endpoint, data: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: WeakSet[Tensor] = WeakSet()
    alive: list[int] = []

    def unit(png: bytes) -> Tensor:
        picture = clip_judge.images.to_unit(torch.from_numpy(images.decoded(png).copy())[None])
        decoded.add(picture)
        return picture

    def counting(some: Tensor) -> Tensor:
        alive.append(len(decoded))
        if len(alive) > 24:
            raise KeyboardInterrupt
        return colours(some)

    monkeypatch.setattr(clip_judge, "unit", unit)
    monkeypatch.setattr(clip_judge, "judge_of", lambda _: Judge(counting, said))
    judged(endpoint, data, lambda prompt: picture(number_of(prompt)), keep=tmp_path)
    assert alive == [1] * 24
    with pytest.raises(KeyboardInterrupt):
        judged(endpoint, data, lambda _: picture(0), keep=tmp_path)
    assert {(tmp_path / f"{number:05d}.png").read_bytes() for number in range(12)} == {picture(0)}
    assert not (tmp_path / "verdicts.jsonl").exists()  # what it said was said of others


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles")
    saved(directory, "clip", ClipSpec(net=CLIP), {})
    small = AutoencoderNetSpec(width=8, channel_mult=(1, 1), blocks=1, groups=4, stem=4, mid_attention=False)
    saved(
        directory,
        "autoencoder",
        AutoencoderSpec(net=small, image_size=64, crop=16, perceptual="none"),
        {},
    )
    return directory


def test_a_judge_reads_pictures_and_captions_of_any_size_each_as_if_alone(bundles: Path) -> None:
    judge = judge_of(str(bundles / "clip" / "bundle"))
    captions = ["a dog", "two cats on a very long red sofa " * 9]
    some = torch.rand(2, 3, 48, 48) * 2 - 1
    for read, things in ((judge.captions, captions), (judge.pictures, some)):
        together = read(things)  # type: ignore[operator]
        assert together.norm(dim=1).allclose(torch.ones(2))
        assert torch.equal(together, torch.cat([read(things[:1]), read(things[1:])]))  # type: ignore[operator]
    assert not torch.equal(judge.captions(captions[:1]), judge.captions(captions[1:]))


def test_what_is_no_clip_is_refused_by_its_name(bundles: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AutoencoderSpec, it must be a CLIP"):
        judge_of(str(bundles / "autoencoder" / "bundle"))
    for named in ("no/such/bundle", f"ViT-B-32:{tmp_path}/absent.pt"):
        with pytest.raises(ValueError, match=f"evaluation.judge: '{named}' is no bundle"):
            judge_of(named)


def test_a_judge_is_known_by_its_weights_and_not_by_where_they_lie(bundles: Path, tmp_path: Path) -> None:
    digest = clip_digest(str(bundles / "clip" / "bundle"))
    (tmp_path / "copy").symlink_to(bundles / "clip" / "bundle")
    assert clip_digest(str(tmp_path / "copy")) == digest
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    one.write_bytes(b"weights")
    other.write_bytes(b"weights")
    assert clip_digest(f"ViT-B-32:{one}") == clip_digest(f"ViT-B-32:{other}") != digest
    assert clip_digest("ViT-B-32/openai") == "ViT-B-32/openai"
