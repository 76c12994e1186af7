"""A folder of pictures becomes tars in which nothing is missing, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jobs.cli import main
from tests.conftest import jpg
from workflows import packing
from workflows.packing import Source, pack, sample
from workflows.pairs import PairsSpec, RejectedError, pair_of
from workflows.shards import Limits, samples, split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, one of them without a caption, a bitmap, a caption without a picture, hidden files."""
    home = tmp_path / "pictures"
    (home / "cats").mkdir(parents=True)
    (home / ".hidden").mkdir()
    for number, name in enumerate(("a.v2.jpg", "b.JPG", "c.jpeg", "cats/a.v2.jpg", "cats/d.jpg")):
        (home / name).write_bytes(jpg(40, 40, number))
        caption = Path(name).with_suffix(".TXT" if name == "c.jpeg" else ".txt")
        if name != "cats/d.jpg":
            (home / caption).write_text(f"caption of {name}")
    (home / "b.json").write_text('{"label": 7}')
    for name in ("x.bmp", "LICENSE", "cats/nothing.txt", ".hidden/e.jpg", ".f.jpg"):
        (home / name).write_bytes(b"-")
    return home


def read(out: Path) -> dict[str, tuple[str | None, bytes, str]]:
    """Caption, picture and json of each sample by the path without number; reads all tars, strictly."""
    found = {}
    for tar in sorted(out.iterdir()):
        for one in samples(str(tar), Limits()):
            assert not one.reject
            assert not one.others
            parts = dict(one.parts)
            texts = [parts.pop(kind, b"").decode() for kind in ("txt", "json")]
            (picture,) = parts.values()
            path, _, name = one.key.rpartition("/")
            found[f"{path}/{name.partition('_')[2]}".strip("/")] = (texts[0] or None, picture, texts[1])
    return found


def test_every_picture_goes_in_with_what_lies_beside_it(folder: Path, tmp_path: Path) -> None:
    facts = pack(folder, tmp_path / "tars", samples_per_shard=2)
    found = read(tmp_path / "tars")
    assert {name: caption for name, (caption, _, _) in found.items()} == {
        "a_v2": "caption of a.v2.jpg",
        "b": "caption of b.JPG",
        "c": "caption of c.jpeg",
        "cats/a_v2": "caption of cats/a.v2.jpg",
        "cats/d": None,
    }
    assert all(found[name][1] == jpg(40, 40, n) for n, name in enumerate(found_in_order(found)))
    assert found["b"][2] == '{"label": 7}'
    assert facts == {
        "samples": 5,
        "without_caption": 1,
        "without_picture": 0,
        "left_out": {".bmp": 1, "LICENSE": 1, ".txt": 1} | facts["left_out"],
        "shards": 3,
        "bytes": sum(tar.stat().st_size for tar in (tmp_path / "tars").iterdir()),
        "out": str(tmp_path / "tars"),
    }
    assert sum(facts["left_out"].values()) == 3


def found_in_order(found: dict[str, object]) -> list[str]:
    """The names in the order in which the fixture made their pictures."""
    return sorted(found, key=["a_v2", "b", "c", "cats/a_v2", "cats/d"].index)


def test_a_table_names_captions_and_its_rows_travel_as_json(folder: Path, tmp_path: Path) -> None:
    lines = [
        {"file_name": "b.JPG", "text": "first", "author": "me"},
        {"file_name": "b.JPG", "text": "second"},
        {"file_name": "gone.jpg", "text": "third"},
        {"file_name": "c.jpeg", "text": None},
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    facts = pack(folder, tmp_path / "tars")
    assert (facts["samples"], facts["without_caption"], facts["without_picture"]) == (7, 2, 1)
    kept = list(samples(str(tmp_path / "tars" / "00000.tar"), Limits()))
    rows = [json.loads(one.parts["json"]) for one in kept if "json" in one.parts]
    assert sorted(rows, key=str) == sorted(lines, key=str)
    spec, good = PairsSpec(shards=("-",), destination="-"), []
    for one in kept:
        try:
            good.append(pair_of(one, spec).caption)
        except RejectedError as error:
            assert str(error).startswith(("caption-missing", "image-missing"))  # noqa: PT017
    assert sorted(good) == ["caption of a.v2.jpg", "caption of cats/a.v2.jpg", "first", "second"]


def test_a_csv_with_another_column_is_as_good(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    long = "word " * 50_000  # more than Python's reader of CSV takes by itself
    table.write_text(f'\ufefffile_name,prompt\nb.JPG,"a, b"\ncats/../c.jpeg,{long}\n')
    facts = pack(folder, tmp_path / "tars", table=table, column="prompt")
    found = read(tmp_path / "tars")
    assert (found["b"][0], found["c"][0]) == ("a, b", long)
    assert found["a_v2"][0] == "caption of a.v2.jpg"  # in no table
    assert (facts["samples"], facts["without_caption"]) == (5, 1)


def test_every_folder_may_have_its_table(tmp_path: Path) -> None:
    for name in ("train", "test"):
        home = tmp_path / "in" / name
        home.mkdir(parents=True)
        (home / "a.jpg").write_bytes(jpg(40, 40, 1))
        (home / "metadata.csv").write_text(f"file_name,text\na.jpg,of {name}\n")
    facts = pack(tmp_path / "in", tmp_path / "tars")
    assert {name: caption for name, (caption, _, _) in read(tmp_path / "tars").items()} == {
        "train/a": "of train",
        "test/a": "of test",
    }
    assert facts["left_out"] == {}


def test_links_are_followed_once_and_what_is_no_file_is_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "linked").symlink_to(folder / "cats")
    (folder / "cats" / "round").symlink_to(folder)
    (folder / "nothing.jpg").symlink_to(folder / "gone.jpg")
    os.mkfifo(folder / "pipe.jpg")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.jpg").write_bytes(jpg(40, 40, 9))
    (folder / "more").symlink_to(elsewhere)
    facts = pack(folder, tmp_path / "tars")
    assert set(read(tmp_path / "tars")) == {"a_v2", "b", "c", "cats/a_v2", "cats/d", "more/e"}
    assert facts["left_out"][".jpg"] == 2


def test_a_picture_that_a_table_names_by_another_path_is_packed_once(folder: Path, tmp_path: Path) -> None:
    (folder / "another").symlink_to(folder / "cats")
    (folder / "metadata.csv").write_text("file_name,text\nanother/d.jpg,told\n")
    pack(folder, tmp_path / "tars")
    captions = {name: caption for name, (caption, _, _) in read(tmp_path / "tars").items()}
    assert captions.pop("another/d") == "told"
    assert len(captions) == 4  # of five pictures
    assert "cats/d" not in captions


def test_what_lies_beside_a_picture_counts_only_if_it_is_a_file(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "cats" / "d.txt")
    (folder / "c.json").symlink_to(folder / "gone.json")
    facts = pack(folder, tmp_path / "tars")
    assert facts["without_caption"] == 1
    assert facts["left_out"] == {".bmp": 1, "LICENSE": 1, ".txt": 2, ".json": 1}


def test_a_folder_that_cannot_be_looked_into_is_no_empty_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def shut(path: Any) -> Any:
        if str(path).endswith("cats"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", shut)
    with pytest.raises(PermissionError, match="cats"):
        pack(folder, tmp_path / "tars")


def test_two_do_not_pack_into_one_directory_at_once(folder: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib, workflows.packing as p; p.pack(*map(pathlib.Path, sys.argv[1:]))"
    with packing.claimed(tmp_path / "tars"):
        words = [sys.executable, "-c", code, str(folder), str(tmp_path / "tars")]
        said = subprocess.run(words, check=False, capture_output=True, text=True)
        assert "is being packed by process" in said.stderr
        assert not (tmp_path / "tars").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@pytest.mark.parametrize("kind", ["link", "here"])
def test_tars_may_go_into_an_empty_directory_by_whatever_name(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(empty)
    pack(folder, tmp_path / "link" if kind == "link" else Path())
    assert len(read(empty)) == 5
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.jsonl",
            '{"file_name": "b.JPG"}',
            "row 1: there is no 'text', only 'file_name'.*--caption",
        ),
        ("t.jsonl", '{"file_name": "", "text": "x"}', "row 1: 'file_name' is '', not the path"),
        (
            "t.jsonl",
            '{"file_name": "b.JPG", "text": ["x"]}',
            r"row 1: 'text' is \['x'\]; a caption is",
        ),
        ("t.jsonl", '{"file_name": "b.JPG", "text": NaN}', "row 1: 'text' is nan"),
        ("t.csv", "image,text\nb.JPG,x\n", "no 'file_name', only 'image', 'text'"),
        (
            "t.jsonl",
            '{"file_name": "b.JPG", "text": "x"}\n[1]',
            r"after 1 rows: \[1\] is not an object",
        ),
        (
            "t.csv",
            "file_name,text\nb.JPG,x\nb.JPG,a red circle, big\n",
            "row 2 has more fields than the first",
        ),
        ("t.jsonl", "{", "after 0 rows: Expecting property name"),
        ("t.parquet", "", "a .jsonl or a .csv"),
        ("t.csv", b"file_name,text\nb.JPG,\xff\n", "t.csv, after 0 rows: .utf-8. codec"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_and_writes_nothing(
    name: str, text: str | bytes, message: str, folder: Path, tmp_path: Path
) -> None:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message):
        pack(folder, tmp_path / "tars", table=folder / name)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_the_same_folder_gives_the_same_bytes_in_an_order_that_mixes_its_parts(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / "in" / ("cats" if number < 20 else "dogs") / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    for out in ("one", "two"):
        pack(tmp_path / "in", tmp_path / out)
    tars = [(tmp_path / out / "00000.tar").read_bytes() for out in ("one", "two")]
    assert tars[0] == tars[1]
    kinds = [one.key[:4] for one in samples(str(tmp_path / "one" / "00000.tar"), Limits())]
    assert kinds.count("cats") == 20
    assert 5 < kinds[:20].count("cats") < 15


def test_what_stands_at_the_destination_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tars"
    out.mkdir()
    (out / "old.tar").write_bytes(b"old")
    with pytest.raises(ValueError, match="holds files already"):
        pack(folder, out)
    assert [path.name for path in out.iterdir()] == ["old.tar"]


def test_a_pack_that_fails_or_was_killed_leaves_nothing_and_can_be_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / ".tars.packing"
    killed.mkdir()
    (killed / "00000.tar").write_bytes(b"half")
    with monkeypatch.context() as patched:

        def failing(number: int, source: Source) -> tuple[str, dict[str, bytes]]:
            if number == 3:
                raise OSError(28, "No space left on device")
            return sample(number, source)

        patched.setattr(packing, "sample", failing)
        with pytest.raises(OSError, match="No space"):
            pack(folder, tmp_path / "tars")
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    assert pack(folder, tmp_path / "tars")["samples"] == 5
    assert len(read(tmp_path / "tars")) == 5


@pytest.mark.parametrize("name", ["x.bmp", None])
def test_a_folder_without_pictures_says_what_it_has(name: str | None, tmp_path: Path) -> None:
    home = tmp_path / "in"
    home.mkdir()
    if name:
        (home / name).write_bytes(b"-")
    said = CliRunner().invoke(main, ["data", "pack", str(home), "--out", str(tmp_path / "tars")])
    assert said.exit_code == 2
    assert f"holds no picture (jpg, jpeg, png, webp); it has {'1 .bmp' if name else 'no file'}" in said.output


NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)


@given(st.lists(NAME, min_size=1, max_size=4), st.integers(0, 10**8 - 1))
def test_a_key_comes_back_from_the_tar_whatever_the_name(parts: list[str], number: int) -> None:
    path = Path("/".join(part for part in parts if part not in (".", "..")) or "a")
    key, members = sample(number, Source(path, {"jpg": "x"}))
    assert split(f"{key}.jpg") == (key, "jpg")
    assert members == {"jpg": b"x"}
    assert key.rpartition("/")[2].startswith(f"{number:08d}_")
