"""`ddiff data check` judges as a preparation with the same options would."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs.cli import main
from tests.conftest import jpg, write_shard
from workflows.files import located
from workflows.pairs import PairsSpec, TooManyRejectsError
from workflows.parts import write_part
from workflows.prepare import judge, totals
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


def refused_when_prepared(spec: PairsSpec, out: Path) -> str:
    """What a preparation says at its end; nothing if it is content."""
    parts = []
    out.mkdir(exist_ok=True)
    for number, found in enumerate(located(spec.shards)):
        *_, (_, _, part) = write_part(Home.of(out), number, found.url, spec)
        assert part is not None
        parts.append(part)
    try:
        judge(spec, totals(parts))
    except TooManyRejectsError as error:
        return str(error)
    return ""


def test_shards_that_give_nothing_are_counted_by_both(shards: str, tmp_path: Path) -> None:
    said = "1 of 31 samples rejected (1 shard), 1 of 4 shards unreadable; 5% are allowed; "
    spec = PairsSpec(shards=(shards,), destination="out", sizes=(32,))
    assert refused_when_prepared(spec, tmp_path / "out") == (
        f"{said}see out/refused.json, then mend the shards or raise max_reject_fraction"
    )
    done = check("--shards", shards)
    assert (done.exit_code, done.stderr) == (3, f"ddiff: {said}mend the shards or raise --max-rejected\n")
    assert not refused_when_prepared(spec.but(max_reject_fraction=0.3), tmp_path / "out")
    assert check("--shards", shards, "--max-rejected", "0.3").exit_code == 0


def test_a_check_may_be_told_where_captions_stand_and_how_small_is_too_small(tmp_path: Path) -> None:
    where = ("--shards", str(write_shard(tmp_path / "a.tar", pairs(4, side=20))))
    assert "4 image" in check(*where).stderr
    assert check(*where, "--min-side", "16").exit_code == 0
    assert check(*where, "--min-side", "16", "--caption", "json:about").exit_code == 0
    assert "4 caption-missing" in check(*where, "--min-side", "16", "--caption", "json:title").stderr
    assert check(*where, "--caption", "xml").exit_code == 2
    assert "name --shards" in check().stderr
