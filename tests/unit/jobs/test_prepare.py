"""`ddiff data check` judges as a preparation with the same options would."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from jobs.cli import main
from jobs.prepare import COUNTED, check_shards, middle
from tests.conftest import jpg, write_shard
from workflows.census import TooManyRejectsError, judge, totals
from workflows.files import located
from workflows.pairs import PairsSpec
from workflows.parts import Part, looked_at, write_part
from workflows.storage import Home


def check(*words: str) -> Result:
    return CliRunner().invoke(main, ["data", "check", *words])


def pairs(count: int, side: int = 40) -> dict[str, bytes]:
    return {
        f"{n}.{suffix}": data
        for n in range(count)
        for suffix, data in (("jpg", jpg(side, side, n)), ("txt", b"a"), ("json", b'{"about": "b"}'))
    }


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Four tars of which one cannot be read: few of the samples, many of the shards."""
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", pairs(10))
    (tmp_path / "3.tar").write_bytes(b"no tar" * 200)
    return f"{tmp_path}/*.tar"


def written(spec: PairsSpec, out: Path) -> list[Part]:
    """The parts of a preparation."""
    parts = []
    out.mkdir(exist_ok=True)
    for number, found in enumerate(located(spec.shards)):
        *_, (_, _, part) = write_part(Home.of(out), number, found.url, spec)
        assert part is not None
        parts.append(part)
    return parts


def refused_when_prepared(spec: PairsSpec, out: Path) -> str:
    """What a preparation says at its end; nothing if it is content."""
    try:
        judge(spec, totals(written(spec, out)))
    except TooManyRejectsError as error:
        return str(error)
    return ""


def test_shards_that_give_nothing_are_counted_by_both(shards: str, tmp_path: Path) -> None:
    said = "1 of 31 samples rejected (1 shard), 1 of 4 shards broken; 5% are allowed; "
    said += f"first {tmp_path}/3.tar: shard: bad header at byte 0 "
    spec = PairsSpec(shards=(shards,), destination="out", sizes=(32,))
    ours, done = refused_when_prepared(spec, tmp_path / "out"), check("--shards", shards)
    assert ours.startswith(said)
    assert ours.endswith("; see out/refused.json, then mend the shards or raise max_reject_fraction")
    assert done.exit_code == 3
    assert done.stderr.startswith(f"ddiff: {said}")
    assert done.stderr.endswith("; mend the shards or raise --max-rejected\n")
    assert not refused_when_prepared(spec.but(max_reject_fraction=0.3), tmp_path / "out")
    assert check("--shards", shards, "--max-rejected", "0.3").exit_code == 0


def test_both_say_where_each_reason_came_first_and_which_shards_broke(shards: str, tmp_path: Path) -> None:
    bad = {"a.txt": b"no picture", "b.txt": b"nor here", "c.jpg": jpg(40, 40), "c.txt": b" "}
    write_shard(tmp_path / "1.tar", pairs(10) | bad)
    counted = {f"{name}_stats.json": {"successes": 12} for name in "02"}
    for name, content in counted.items():
        (tmp_path / name).write_text(json.dumps(content))
    done = check("--shards", shards, "--max-rejected", "0.5", "--json")
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    firsts = facts["first_rejects"]
    assert {reason: (Path(one["shard"]).name, one["key"]) for reason, one in firsts.items()} == {
        "missing": ("0.tar", ""),
        "image-missing": ("1.tar", "a"),
        "caption-empty": ("1.tar", "c"),
        "shard": ("3.tar", ""),
    }
    assert firsts["image-missing"]["why"] == "image-missing: none among ['txt']"
    assert firsts["missing"]["why"] == "10 samples, 0_stats.json says 12"
    assert [Path(one["shard"]).name for one in facts["damaged_shards"]] == ["0.tar", "2.tar", "3.tar"]

    spec = PairsSpec(shards=(shards,), destination="out", sizes=(32,))
    prepared = totals(written(spec, tmp_path / "out"))
    assert {name: prepared[name] for name in COUNTED} == {name: facts[name] for name in COUNTED}

    text = check("--shards", shards, "--max-rejected", "0.5").stdout
    assert f"first {tmp_path}/1.tar, sample 'a': image-missing: none among ['txt']\n" in text
    assert f"damaged {tmp_path}/2.tar: 10 samples, 2_stats.json says 12\n" in text


def test_a_shard_whose_samples_have_been_counted_is_not_broken(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "0.tar", pairs(10))
    tar.write_bytes(tar.read_bytes().rstrip(b"\0"))  # cut in the padding of its last member
    words = ("--shards", str(tar), "--max-rejected", "0.2")
    assert "1 of 10 samples rejected (1 shard), 1 of 1 shards broken; 20% are allowed" in check(*words).stderr
    (tmp_path / "0_stats.json").write_text('{"successes": 10}')
    assert check(*words).exit_code == 0


def test_a_source_without_a_usable_pair_is_refused_by_both(tmp_path: Path) -> None:
    for name in ("empty-0.tar", "empty-1.tar"):
        write_shard(tmp_path / name, {})
    shards = f"{tmp_path}/*.tar"
    said = "no pair to train on in 2 shards: of 0 samples 0 rejected (none); name other shards"
    done = check("--shards", shards, "--max-rejected", "1")
    assert (done.exit_code, done.stderr) == (3, f"ddiff: {said}\n")
    spec = PairsSpec(shards=(shards,), destination="out", sizes=(32,), max_reject_fraction=1)
    assert refused_when_prepared(spec, tmp_path / "out") == said
    write_shard(tmp_path / "empty-1.tar", pairs(3))
    assert not refused_when_prepared(spec, tmp_path / "out")
    held = spec.but(held_out=0.999999)
    assert "3 held out; name other shards or lower held_out" in refused_when_prepared(held, tmp_path / "out")


def test_a_check_may_be_told_where_captions_stand_and_how_small_is_too_small(tmp_path: Path) -> None:
    where = ("--shards", str(write_shard(tmp_path / "a.tar", pairs(4, side=20))))
    assert "4 image" in check(*where).stderr
    assert check(*where, "--min-side", "16").exit_code == 0
    assert check(*where, "--min-side", "16", "--caption", "json:about").exit_code == 0
    assert "4 caption-missing" in check(*where, "--min-side", "16", "--caption", "json:title").stderr
    assert check(*where, "--caption", "xml").exit_code == 2
    assert "name --shards" in check().stderr


def test_a_check_says_what_a_preparation_would_enlarge_and_cut(tmp_path: Path) -> None:
    tar = write_shard(tmp_path / "a.tar", pairs(4, side=100))
    said = check("--shards", str(tar)).stdout
    assert "enlarged: 4" in said
    assert "cut" not in said
    fitting, short = tmp_path / "fitting.yaml", tmp_path / "short.yaml"
    spec = PairsSpec(shards=(str(tar),), destination="out", sizes=(64,))
    fitting.write_text(json.dumps(spec.model_dump(mode="json")))
    short.write_text(json.dumps(spec.but(context_length=2).model_dump(mode="json")))
    assert "enlarged" not in check("--config", str(fitting)).stdout
    assert "captions_cut: 4" in check("--config", str(short)).stdout
    assert "leave out --min-side" in check("--config", str(short), "--min-side", "16").stderr


def test_processes_find_in_shards_what_one_finds(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = check_shards([shards], max_rejected=0.5)
    monkeypatch.setattr("jobs.prepare.PROCESS_BYTES", 1)
    monkeypatch.setattr("workflows.cpus.available", lambda: 2)
    monkeypatch.setattr("jobs.prepare.looked_at", in_another_process)
    assert check_shards([shards], max_rejected=0.5) == alone


def in_another_process(number: int, url: str, spec: PairsSpec) -> Part:
    """`looked_at`, refused in the process of the test."""
    assert multiprocessing.parent_process() is not None
    return looked_at(number, url, spec)


@given(st.lists(st.integers(0, 9), max_size=20))
def test_the_middle_of_counted_numbers_is_that_of_the_numbers(numbers: list[int]) -> None:
    assert middle(Counter(numbers)) == (sorted(numbers)[len(numbers) // 2] if numbers else 0)
