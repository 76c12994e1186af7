"""Checkpoints: the newest good one is found, the old ones go, and a cut at any file leaves a good one."""

import shutil
from pathlib import Path

import pytest
import torch

from dd_core import checkpoint, sealed
from workflows.checkpoints import newest, prune
from workflows.storage import Home


def written(run: Path, step: int) -> Path:
    directory = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.write(directory, {"w": torch.full((4,), float(step))}, {"step": step, "images": 8 * step})
    return directory


def found(run: Path) -> Path:
    """The checkpoint that a run continues from."""
    return run / newest(Home.of(run))


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_the_newest_and_every_nth_stay(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        written(tmp_path, step)
        prune(Home.of(tmp_path), step=step, kept=2, every=40)
    assert steps(tmp_path) == [40, 80, 90]
    assert found(tmp_path) == tmp_path / "checkpoints" / "step-00000090"


@pytest.mark.parametrize(("kept", "left"), [(1, [350]), (2, [300, 350]), (9, [200, 300, 350])])
def test_what_a_lost_attempt_left_at_later_steps_outlives_no_good_one(
    tmp_path: Path, kept: int, left: list[int]
) -> None:
    for step in (200, 300, 400):
        written(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000400" / sealed.MANIFEST).unlink()
    last = written(tmp_path, 350)  # the run went on from 300
    prune(Home.of(tmp_path), step=350, kept=kept, every=400)
    assert steps(tmp_path) == left
    assert found(tmp_path) == last


def test_what_was_never_finished_takes_no_good_ones_place_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        written(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000300" / sealed.MANIFEST).unlink()
    own = tmp_path / "checkpoints" / "step-00000200-good"
    own.mkdir()
    assert found(tmp_path) == tmp_path / "checkpoints" / "step-00000400"
    prune(Home.of(tmp_path), step=400, kept=2)
    assert own.is_dir()
    own.rmdir()
    assert steps(tmp_path) == [200, 400]


@pytest.mark.parametrize("lost", range(1, 4))
def test_a_write_cut_before_any_file_leaves_the_one_before(tmp_path: Path, lost: int) -> None:
    good, cut = written(tmp_path, 1), written(tmp_path, 2)
    files = sorted(cut.iterdir(), key=lambda path: (path.name == sealed.MANIFEST, path.name))
    for path in files[-lost:]:
        path.unlink()
    assert found(tmp_path) == good
    tensors = {"w": torch.zeros(4)}
    assert checkpoint.read(good, tensors) == {"step": 1, "images": 8}
    assert tensors["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("harm", ["flip", "page", "cut", "older", "gone"])
def test_every_harm_to_a_tensor_file_is_found_before_it_is_read(tmp_path: Path, harm: str) -> None:
    good, bad = written(tmp_path, 1), written(tmp_path, 2)
    shard = next(bad.glob("shard-*"))
    data = bytearray(shard.read_bytes())
    match harm:
        case "flip":
            data[-1] ^= 1
        case "page":
            data[-16:] = bytes(16)
        case "cut":
            del data[-1:]
        case "older":
            data = bytearray((good / shard.name).read_bytes())
    shard.unlink() if harm == "gone" else shard.write_bytes(data)
    assert found(tmp_path) == good


def test_a_removal_that_is_cut_leaves_nothing_that_looks_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        written(tmp_path, step)

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(Home.of(tmp_path), step=2, kept=1)
    with pytest.raises(sealed.SealError, match="cut short"):
        sealed.verify(tmp_path / "checkpoints" / "step-00000001")
    prune(Home.of(tmp_path), step=2, kept=1)
    assert steps(tmp_path) == [2]
