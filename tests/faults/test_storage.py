"""A run that lives in a store and nowhere else: nothing that a machine keeps of it is ever needed again."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from dd_core import sealed
from dd_core.stage import Budget
from tests.conftest import small_ray
from tests.faults.test_resume import SPEC, assert_same, clip_in, embed_for, reached, signal_a_worker
from tests.prepared import write_prepared
from tests.s3 import s3_server
from tests.when import when
from workflows import storage
from workflows.journal import JOURNAL, curves
from workflows.storage import Home, StorageError
from workflows.training import PreemptedError, train_stage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.fault,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore"),  # Ray's, botocore's and aiohttp's, of themselves
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 address, in the environment."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))
        patch.setattr("tempfile.tempdir", None)
        storage.store.cache_clear()
        yield "s3://bucket/runs"
        storage.store.cache_clear()


@pytest.fixture(scope="module")
def ray_of_store(store: str) -> Iterator[None]:
    """A Ray of our own: its workers know the way to the store."""
    with small_ray():
        yield


@pytest.fixture(scope="module")
def data(store: str, tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = write_prepared(tmp_path_factory.mktemp("d") / "prepared", files=3, size=32)
    home = Home.of(f"{store}/data")
    shutil.copytree(made, home.here)
    home.send(*(path.name for path in made.iterdir()))
    shutil.rmtree(home.here)
    return home


def forgotten(home: Home) -> None:
    """This machine is another one."""
    shutil.rmtree(storage.scratch(home.root), ignore_errors=True)


def test_what_is_sent_is_fetched_whole_or_not_at_all(store: str) -> None:
    home = Home.of(f"{store}/files").at("bundle")
    home.here.mkdir(parents=True)
    (home.here / "a.txt").write_text("a")
    (home.here / "inner").mkdir()
    (home.here / "inner" / "b.txt").write_text("b")
    digest = sealed.seal(home.here, sealed.digests(home.here), {"step": 1})
    above = Home(home.root)
    above.send("bundle")
    forgotten(home)
    assert sealed.verify(home.fetched()).digest == digest
    (home.here / "a.txt").write_text("c")  # a copy that has been spoilt is fetched again
    assert sealed.verify(home.fetched()).digest == digest
    assert home.names() == ["a.txt", "inner", "manifest.json"]
    assert (home.size("a.txt"), home.size("b.txt"), home.text("nothing")) == (1, None, "")
    storage.store(home.root).pipe_file(home.at("a.txt").address, b"x")
    forgotten(home)
    with pytest.raises(sealed.SealError, match=r"a\.txt: sha256 is"):
        sealed.verify(home.fetched())
    home.unseal()
    with pytest.raises(sealed.SealError, match=r"s3://.*/bundle has no manifest.json"):
        home.fetched()
    above.drop("bundle")
    assert above.names() == []


def test_a_store_that_cannot_be_used_is_named_in_one_line(store: str) -> None:
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/run/a: .*check .* credentials$"):
        Home.of("s3://no-such-bucket/run").at("a").write("b", "c")
    with pytest.raises(StorageError, match=r"nostore://x cannot be opened"):
        Home.of("nostore://x").names()


def test_a_journal_that_goes_on_elsewhere_is_not_mixed_with_what_was_never_sent(store: str) -> None:
    home = Home.of(f"{store}/journal")
    home.write(JOURNAL, "1\n2\n")
    (home.here / JOURNAL).write_text("1\n2\n3\n")
    home.rejoin(JOURNAL)
    assert (home.here / JOURNAL).read_text() == "1\n2\n3\n"  # nobody has written since
    storage.store(home.root).pipe_file(home.at(JOURNAL).address, b"1\n2\n4\n")
    home.rejoin(JOURNAL)
    assert (home.here / JOURNAL).read_text() == "1\n2\n4\n"


def test_stopped_killed_and_moved_to_another_machine_it_is_the_unbroken_run(
    store: str, data: Home, ray_of_store: None, tmp_path: Path
) -> None:
    # long enough for a sign in the store to be seen: it is looked for once in a while
    budget = Budget(steps=400, checkpoint_every=50, report_every=1)
    spec = SPEC.but(name="cut", restarts=2, budget=budget)
    local = tmp_path / "data"
    data.fetch(*data.names())
    shutil.copytree(data.here, local)
    clip_in(tmp_path / "whole")
    embed_for(tmp_path / "whole", local)
    whole = train_stage(spec, run=tmp_path / "whole", data=local)
    run = Home.of(f"{store}/run")
    clip_in(run.here)
    run.send("clip")
    forgotten(run)
    embed_for(run, data)
    forgotten(run)
    beside = run.at("clip/embeddings/32").names()
    assert beside == ["manifest.json", *(f"part-{number:05d}.parquet" for number in range(3))]
    stage = run.at("cut")
    sigterm = when(reached(stage.here, 10), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with sigterm, pytest.raises(PreemptedError, match=r"cut: stopped at step \d+ of 400") as stopped:
        train_stage(spec, run=run, data=data)
    stopped_at = int(re.findall(r"at step (\d+)", str(stopped.value))[0])
    assert [name for name in stage.names() if name in ("checkpoints", "stop")] == ["checkpoints"]
    forgotten(run)
    killed: list[int] = []
    with when(reached(stage.here, stopped_at + 70), lambda: killed.append(signal_a_worker())):
        made = train_stage(spec, run=run, data=data)
    assert any(killed)
    assert_same(made / "weights.safetensors", whole / "weights.safetensors")
    forgotten(run)
    stage.fetch(JOURNAL)
    lines = (stage.here / JOURNAL).read_text().splitlines()
    steps = [line for line in lines if '"train/loss"' in line]
    assert len(steps) == 400  # none lost, none twice
    assert list(curves(stage.here / JOURNAL)["train/loss"]) == list(range(1, 401))
    assert len(stage.at("checkpoints").names()) == spec.checkpoints_kept
    before = storage.store(run.root).info(stage.at("bundle/manifest.json").address)["ETag"]
    assert train_stage(spec, run=run, data=data).name == "bundle"
    assert storage.store(run.root).info(stage.at("bundle/manifest.json").address)["ETag"] == before
