"""The embedded world is a function of its seed, and the judge reads it without error."""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from workflows import grammar, oracle, shape_shards, shapes, storage
from workflows.claim import TakenError
from workflows.shape_shards import ShapesSpec, write_shards
from workflows.shapes import UNSEEN, Scene, drawn, place_of, scene_rng
from workflows.storage import Home

Picture = np.ndarray[Any, np.dtype[np.uint8]]


def scenes(count: int) -> list[Scene]:
    return [grammar.training_caption(scene_rng(11, number))[0] for number in range(count)]


def everything(scene: Scene) -> dict[str, Any]:
    """All that could be said of a scene."""
    things = [
        {"shape": t.shape, "colour": t.colour, "size": t.size, "place": list(place_of(t))}
        for t in scene.things
    ]
    return {"things": things, "arrangement": scene.arrangement, "background": scene.background}


def degraded(picture: Picture, number: int) -> Picture:
    """Blurred (1 px), made small and large again, with noise of sigma 0.05."""
    blurred = cv2.GaussianBlur(picture, (0, 0), 1.0)
    small = cv2.resize(blurred, (64, 64), interpolation=cv2.INTER_AREA)
    again = cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC).astype(np.float64)
    noise = np.random.default_rng(number).normal(0, 0.05 * 255, again.shape)
    return np.clip(again + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("degrade", "least"), [(lambda picture, _: picture, 0.995), (degraded, 0.97)], ids=["clean", "degraded"]
)
def test_the_oracle_reads_back_what_was_drawn(
    degrade: Callable[[Picture, int], Picture], least: float
) -> None:
    right: Counter[str] = Counter()
    drawn_scenes = scenes(150)
    for number, scene in enumerate(drawn_scenes):
        right.update(oracle.judged(degrade(drawn(scene), number), everything(scene)))
    assert set(right) == {"count", "background", "colour", "shape", "place", "size", "all"}
    assert {name: share / len(drawn_scenes) >= least for name, share in right.items()} == dict.fromkeys(
        right, True
    )


def test_the_oracle_denies_what_is_not_there() -> None:
    rng = np.random.default_rng(0)
    for number, scene in enumerate(scenes(60)):
        says = everything(scene)
        thing = says["things"][int(rng.integers(len(says["things"])))]
        lie = ["shape", "colour", "size", "background", "count"][number % 5]
        if lie == "background":
            says["background"] = next(g for g in shapes.GROUNDS if g != scene.background)
        elif lie == "count":
            says["things"].append(thing)
        else:
            options: dict[str, Any] = {"shape": shapes.SHAPES, "colour": shapes.COLOURS, "size": shapes.RADII}
            thing[lie] = next(option for option in options[lie] if option != thing[lie])
        verdict = oracle.judged(drawn(scene), says)
        assert not verdict[lie]
        assert not verdict["all"]


def test_a_blank_or_noisy_picture_shows_nothing() -> None:
    says = everything(scenes(1)[0])
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for picture in (np.full((256, 256, 3), 125, np.uint8), noise):
        assert not oracle.judged(picture, says)["all"]


def test_the_two_orders_of_a_relation_say_the_same() -> None:
    scene = next(s for s in scenes(200) if s.arrangement == "beside")
    swapped = everything(scene) | {"things": everything(scene)["things"][::-1]}
    for thing in swapped["things"]:
        del thing["place"]
    assert (
        not oracle.judged(drawn(scene), swapped)["place"]
        or len({(t["shape"], t["colour"], t["size"]) for t in swapped["things"]}) == 1
    )


def test_shards_are_a_function_of_the_seed_and_never_hold_an_unseen_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ShapesSpec(pairs=25, seed=3, pairs_per_shard=10)
    first = [Path(path) for path in write_shards(spec, tmp_path / "a")]
    with monkeypatch.context() as patch:  # drawn by several processes
        patch.setattr(shape_shards, "PROCESS_PAIRS", 1)
        patch.setattr(shape_shards.cpus, "available", lambda: 2)
        again = [Path(path) for path in write_shards(spec, tmp_path / "b")]
    other = [Path(path) for path in write_shards(spec.but(seed=4), tmp_path / "c")]
    assert [path.name for path in first] == ["shapes-00000.tar", "shapes-00001.tar", "shapes-00002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[0].read_bytes() != other[0].read_bytes()
    with tarfile.open(first[0]) as tar:
        names = tar.getnames()
        abouts = [json.loads(tar.extractfile(name).read()) for name in names if name.endswith("json")]
        captions = [tar.extractfile(name).read().decode() for name in names if name.endswith("txt")]
    assert sorted(names[:3]) == ["00000000.json", "00000000.png", "00000000.txt"]
    assert [about["caption"] for about in abouts] == captions
    things = [(thing["shape"], thing["colour"]) for about in abouts for thing in about["objects"]]
    assert things
    assert not set(things) & UNSEEN


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"image_size": 32}, {"pairs_per_shard": 1}, {"pairs": 5}, {"pairs": 3}, {}]
)
def test_shards_of_another_spec_are_made_anew_and_those_of_the_same_left(
    tmp_path: Path, change: dict[str, int]
) -> None:
    spec = ShapesSpec(pairs=4, pairs_per_shard=2, image_size=64)
    before = [Path(path) for path in write_shards(spec, tmp_path / "a")]
    stamps = [path.stat().st_mtime_ns for path in before]
    now = [Path(path) for path in write_shards(spec.but(**change), tmp_path / "a")]
    fresh = [Path(path) for path in write_shards(spec.but(**change), tmp_path / "b")]
    assert [path.read_bytes() for path in now] == [path.read_bytes() for path in fresh]
    assert sorted((tmp_path / "a").glob("*.tar")) == now
    kept = [path.stat().st_mtime_ns for path in now][:2] == stamps[: len(now)]
    assert kept == (change in ({}, {"pairs": 5}))


def test_a_change_of_spec_that_is_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ShapesSpec(pairs=3, pairs_per_shard=1, image_size=32)
    write_shards(spec, tmp_path / "a")
    drop = Home.drop

    def killed(home: Home, name: str) -> None:
        drop(home, name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Home, "drop", killed)
        with pytest.raises(KeyboardInterrupt):
            write_shards(spec.but(seed=1), tmp_path / "a")
    now = [Path(path).read_bytes() for path in write_shards(spec.but(seed=1), tmp_path / "a")]
    assert now == [Path(path).read_bytes() for path in write_shards(spec.but(seed=1), tmp_path / "b")]


def test_shards_without_a_note_of_their_spec_are_taken_as_they_are(tmp_path: Path) -> None:
    spec = ShapesSpec(pairs=2, image_size=32)
    (tar,) = (Path(path) for path in write_shards(spec, tmp_path))
    (tmp_path / "shapes.json").unlink()
    before = tar.stat().st_mtime_ns
    write_shards(spec, tmp_path)
    assert tar.stat().st_mtime_ns == before


def test_a_shard_has_its_name_when_its_bytes_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, named = set[int](), list[int]()
    fsync, rename = os.fsync, Path.rename

    def noted(file: int) -> None:
        fsync(file)
        synced.add(os.fstat(file).st_ino)

    def renamed(path: Path, target: Path) -> Path:
        named.append(path.stat().st_ino)
        assert path.stat().st_ino in synced
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    (tar,) = write_shards(ShapesSpec(pairs=2, image_size=32), tmp_path)
    assert named == [Path(tar).stat().st_ino]


def test_two_processes_never_write_into_one_directory_and_drafts_of_killed_ones_go(tmp_path: Path) -> None:
    spec = ShapesSpec(pairs=2, image_size=32)
    (tmp_path / ".shapes-00000.tar.1a2b.tmp").write_bytes(b"cut")
    hold = "import sys; from pathlib import Path; from workflows import claim, storage\n"
    hold += "with claim.claim(storage.Home.of(sys.argv[1]), '.shapes.lock'): print('in', flush=True), input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(TakenError, match=f"{tmp_path} is being written by process {other.pid} on"):
        write_shards(spec, tmp_path)
    other.communicate(b"\n")
    write_shards(spec, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".shapes.lock",
        "shapes-00000.tar",
        "shapes.json",
    ]


def test_what_a_machine_keeps_of_shards_that_a_store_has_not_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    home, spec = Home("memory://shapes"), ShapesSpec(pairs=2, image_size=32)
    home.here.mkdir(parents=True)
    (home.here / "shapes-00000.tar").write_bytes(b"of another time")
    (address,) = write_shards(spec, home)
    (good,) = write_shards(spec, tmp_path / "local")
    assert storage.store(home.root).cat_file(address) == Path(good).read_bytes()


def test_no_judged_caption_says_what_a_training_caption_says() -> None:
    trained = [grammar.training_caption(scene_rng(seed, number)) for seed in (0, 1) for number in range(3000)]
    statements = {grammar.statement(says) for _, _, says in trained}
    captions = {caption for _, caption, _ in trained}
    counts = {"one_object": 60, "two_object": 60, "three_object": 20, "unseen": 40}
    judged = grammar.cases(counts, seed=7)
    assert Counter(case.group for case in judged) == counts
    assert not {grammar.statement(case.says) for case in judged} & statements
    assert not {case.caption for case in judged} & captions
    shown = [{(thing["shape"], thing["colour"]) for thing in case.says["things"]} for case in judged]
    assert [bool(pairs & set(UNSEEN)) for pairs in shown] == [case.group == "unseen" for case in judged]
    assert judged == grammar.cases(counts, seed=7) != grammar.cases(counts, seed=8)


def test_the_language_is_rich() -> None:
    assert sum(len(templates) for templates in grammar.TEMPLATES.values()) >= 30
    assert len(shapes.SHAPES) >= 6
    assert len(shapes.COLOURS) >= 8
    captions = [grammar.training_caption(scene_rng(0, number))[1] for number in range(2000)]
    assert len(set(captions)) > 1900
    words = {word for options in grammar.WORDS.values() for option in options for word in option.split()}
    said = {word.strip(",:") for caption in captions for word in caption.split()}
    assert words <= said
