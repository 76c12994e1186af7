"""Images answered by URL: kept for an hour, for whoever has the URL."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve import app, files
from serve.files import LIFE_S, Files
from serve.spec import ServeSpec
from tests.s3 import s3_server
from tests.unit.serve.endpoint import Served, pngs, refused

HERE = "http://testserver/v1/images/files/"


def urls(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["url"] for item in answer.json()["data"]]


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where files are kept, not made yet."""
    if request.param == "directory":
        yield str(tmp_path / "new" / "files")
        return
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/new/files"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass for files."""
    passed = 0.0
    monkeypatch.setattr(files.time, "time", lambda now=time.time: now() + passed)

    def pass_by(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    return pass_by


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_what_is_behind_a_url_is_what_the_answer_would_have_carried(served: Served, kind: str) -> None:
    asked = {"seed": 5, "n": 2, "output_format": kind}
    answer = served.post(response_format="url", **asked)
    assert answer.json()["data"][0].keys() == {"url", "revised_prompt", "seed"}
    for url, file in zip(urls(answer), pngs(served.post(**asked)), strict=True):
        assert url.startswith(HERE)
        got = served.client.get(url)
        assert got.content == file
        assert got.headers["content-type"] == f"image/{kind}"
        assert got.headers["x-request-id"]


def test_a_url_lives_for_an_hour_and_its_file_little_longer(
    place: str, later: Callable[[float], None]
) -> None:
    store, root = files.store(place)
    with (served := Served(files=place)).client:
        (first,) = urls(served.post(response_format="url"))
        later(LIFE_S - 10)
        age = int(served.client.get(first).headers["cache-control"].removeprefix("private, max-age="))
        assert 8 <= age <= 10
        (second,) = urls(served.post(response_format="url"))
        later(11)
        told = refused(served.client.get(first), 404)
        assert told == "there is no such file; an image is kept for 60 minutes, its seed repeats it"
        assert served.client.get(second).status_code == 200
        store.pipe_file(f"{root}/mine.png", b"not ours to remove")
        assert store.exists(f"{root}/{first.removeprefix(HERE)}")
        later(files.SWEPT_EVERY_S)
        (third,) = urls(served.post(response_format="url"))
    kept = {"mine.png", second.removeprefix(HERE), third.removeprefix(HERE)}
    assert {path.rpartition("/")[2] for path in store.ls(root, detail=False)} == kept


def test_nobody_gets_a_file_by_another_name_or_for_longer(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"no")
    with (served := Served(files=str(tmp_path / "files"))).client:
        (url,) = urls(served.post(response_format="url"))
        expires, _, rest = url.removeprefix(HERE).partition("-")
        longer = f"{int(expires) + 1}-{rest}"
        for name in (
            longer,
            "..%2fsecret.png",
            "%2e%2e/secret.png",
            f"{expires}-..%2f..%2fsecret.png",
            "x",
            "%00",
        ):
            refused(served.client.get(HERE + name), 404)
        assert served.client.get(url).status_code == 200


def test_another_replica_or_a_later_one_has_the_files_too(tmp_path: Path) -> None:
    with (first := Served(files=str(tmp_path))).client:
        (url,) = urls(first.post(response_format="url"))
    with (second := Served(files=str(tmp_path))).client:
        assert second.client.get(url).content.startswith(b"\x89PNG")


def test_urls_begin_as_clients_reach_the_server(served: Served) -> None:
    named = {"host": "images.example.com:8443"}
    answer = served.client.post(
        "/v1/images/generations", json={"prompt": "a", "response_format": "url"}, headers=named
    )
    assert urls(answer)[0].startswith("http://images.example.com:8443/v1/images/files/")
    with (behind := Served()).client:
        behind.api.public_url = "https://images.example.com/"
        (url,) = urls(behind.post(response_format="url"))
    assert url.startswith("https://images.example.com/v1/images/files/")
    with pytest.raises(ValueError, match="public_url"):
        ServeSpec(cascade="c", public_url="images.example.com")


def test_where_nothing_can_be_kept_a_url_is_refused_before_anything_is_painted(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"a file where the directory should be")
    with (served := Served(files=str(tmp_path / "taken"))).client:
        answer = served.post(response_format="url")
        assert "the server's log says why; ask for b64_json" in refused(answer, 503, "response_format")
        assert answer.headers["x-should-retry"] == "false"
        assert not served.links["base"].hows
        assert len(pngs(served.post(response_format="b64_json"))) == 1


def test_a_file_that_is_removed_meanwhile_by_another_replica_is_no_fault(
    tmp_path: Path, later: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Files(str(tmp_path))
    keeper.prepare()
    names = [keeper.keep(b"1", "png") for _ in range(3)]
    later(LIFE_S + files.SWEPT_EVERY_S)
    one, root = files.store(str(tmp_path))
    real = one.rm_file

    def beaten(path: str) -> None:
        real(path)
        real(path)

    monkeypatch.setattr(one, "rm_file", beaten)
    monkeypatch.setattr(files, "store", lambda _: (one, root))
    keeper.prepare()
    assert not list(tmp_path.iterdir())
    assert [keeper.read(name) for name in names] == [None] * 3


@pytest.mark.parametrize(
    ("given", "cascade", "place"),
    [
        ("", "/runs/demo/cascade", "/runs/demo/files"),
        ("", "s3://bucket/runs/demo/cascade/", "s3://bucket/runs/demo/files"),
        ("", "s3://bucket", "s3://bucket/files"),
        ("/var/files", "s3://bucket/runs/demo/cascade", "/var/files"),
        ("file:///var/files", "/runs/demo/cascade", "/var/files"),
        ("s3://other/files", "/runs/demo/cascade", "s3://other/files"),
    ],
)
def test_files_are_kept_beside_the_cascade_unless_told_otherwise(
    given: str, cascade: str, place: str
) -> None:
    assert app.kept_in(ServeSpec(cascade=cascade, files=given), cascade) == place
