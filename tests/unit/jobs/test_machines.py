"""What nodes say of themselves becomes lines with a fix, and a doctor on a laptop says who can ask them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs import environment
from jobs import nodes as there
from jobs.doctor import nodes, on_the_air
from jobs.endpoint import Address
from jobs.machines import SPARE_BYTES, Finding, Machine, Seen, free_for, gpu, skew, told_of
from jobs.nodes import available_memory
from workflows.storage import Home

GPU = Finding("gpu", "fail", "torch sees no GPU", "install a torch")


def test_a_machine_says_how_much_room_it_has_where_it_keeps_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Machine().seen()
    assert Path(seen.scratch).is_dir()
    assert seen.free > 0
    assert {line.check for line in seen.gpu} == {"gpu"}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA driver is here, as the kernel tells of it."""
    version = tmp_path / "version"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version:\n"
    )
    monkeypatch.setattr("jobs.machines.DRIVER", version)


@pytest.fixture
def two_gpus(driver: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each of two GPUs adds to the sum of any numbers."""
    wrong = [0.0, 0.0]
    about = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)

    def ones(size: int, *, device: str) -> torch.Tensor:
        return torch.full((size,), 1 + wrong[int(device.removeprefix("cuda:"))] / size)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(wrong))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: about)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.ones", ones)
    return wrong


@pytest.mark.parametrize(
    ("cuda", "said"), [(None, "torch has no CUDA"), ("12.8", "torch is built for CUDA 12.8")]
)
def test_a_driver_whose_gpu_torch_does_not_see_is_a_failure(
    driver: None, cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", cuda)
    (line,) = gpu()
    assert (line.check, line.state) == ("gpu", "fail")
    assert line.says == f"driver 570.86.15 is here, but torch sees no GPU: {said}"
    assert line.fix.startswith("install a torch whose CUDA the driver knows, or a newer driver")


def test_gpus_that_add_rightly_are_told_with_their_memory_and_driver(two_gpus: list[float]) -> None:
    says = "NVIDIA H100, 80.0 GiB, driver 570.86.15, CUDA 12.8"
    assert list(gpu()) == [Finding("gpu", "ok", says)] * 2


def test_one_gpu_that_adds_wrongly_is_a_failure(two_gpus: list[float]) -> None:
    two_gpus[1] = 0.5
    well, broken = gpu()
    assert (well.state, broken.state) == ("ok", "fail")
    assert broken.fix == "it adds wrongly: take it out of service"


@pytest.mark.parametrize(
    ("free", "needed", "skew", "states"),
    [
        (SPARE_BYTES, 0, 0.4, ("ok", "ok")),
        (SPARE_BYTES - 1, 0, 0.0, ("warn", "ok")),
        (2**30, 2**30, -6.0, ("ok", "warn")),
        (2**30, 2**30 + 1, 601.0, ("fail", "fail")),
    ],
)
def test_a_node_lacks_room_or_its_clock_is_off(
    free: int, needed: int, skew: float, states: tuple[str, str]
) -> None:
    disk, clock, gpu = told_of("10.0.0.2", Seen([GPU], "/scratch", free, skew), needed)
    assert (disk.state, clock.state) == states
    assert all(line.state == "ok" or line.fix for line in (disk, clock, gpu))
    assert all(line.says.startswith("10.0.0.2") for line in (disk, clock, gpu))
    assert (gpu.state, gpu.fix) == (GPU.state, GPU.fix)


def test_a_node_that_says_nothing_is_a_failure() -> None:
    (line,) = told_of("10.0.0.2", "the actor died", 0)
    assert (line.state, line.says) == ("fail", "10.0.0.2 says nothing of itself: the actor died")


def test_what_a_run_in_a_store_has_fetched_before_is_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("jobs.machines.free_disk", lambda _: 1000)
    run = Home.of("memory://bucket/runs/fetched")
    for name in ("clip/bundle/a", "clip/samples/a", "evaluation/a"):
        (run.here / name).parent.mkdir(parents=True)
        (run.here / name).write_bytes(bytes(7))
    assert free_for(run.address, ["clip/checkpoints", "clip/bundle", "cascade/clip"]) == 1007


def test_a_laptop_looks_at_no_node_and_says_who_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    (line,) = nodes(None)
    assert (line.state, "`ddiff submit doctor --follow` asks each" in line.says) == ("ok", True)
    for address, joined in {"head:6379": True, "auto": True, "": False, "ray://head:10001": False}.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert environment.joins_by_ray() is joined


def test_a_serve_that_is_on_the_air_keeps_its_port() -> None:
    http = {"host": "0.0.0.0", "port": 8000}
    assert on_the_air("ddiff", http, Address()).state == "ok"
    other = on_the_air("ddiff", http, Address(port=9000))
    assert (other.state, other.fix) == (
        "warn",
        "deploy with --set host=0.0.0.0 --set port=8000, or `serve shutdown` first",
    )


def test_what_a_container_has_taken_of_its_memory_is_not_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, meminfo = tmp_path / "own", tmp_path / "meminfo"
    monkeypatch.setattr(there, "MEMINFO", meminfo)
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert available_memory(own, tmp_path) == 8000 * 1024
    own.write_text("0::/slice/pod\n")
    pod, older = tmp_path / "slice" / "pod", tmp_path / "memory"
    for place, files in {
        pod: {"memory.max": "max", "memory.current": "7000000", "memory.stat": "inactive_file 1"},
        pod.parent: {"memory.max": "5000000", "memory.current": "3000000", "memory.stat": "file 9"},
        older: {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1"},
    }.items():
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name).write_text(f"{text}\n")
    assert available_memory(own, tmp_path) == 2_000_000
    (pod / "memory.max").write_text("4000000\n")
    (pod / "memory.current").write_text("3900000\n")
    (pod / "memory.stat").write_text("anon 2900000\ninactive_file 1000000\n")  # which the kernel gives up
    assert available_memory(own, tmp_path) == 1_100_000
    (older / "memory.limit_in_bytes").write_text("1000000\n")
    (older / "memory.usage_in_bytes").write_text("900000\n")
    (older / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 300000\n")
    assert available_memory(own, tmp_path) == 400_000
    (older / "memory.usage_in_bytes").write_text("1400000\n")
    assert available_memory(own, tmp_path) == 0


def test_a_clock_is_compared_by_the_fastest_of_three_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = iter([100.0, 104.0, 200.0, 200.2, 300.0, 301.0])
    theirs = iter([110.0, 207.1, 309.0])
    monkeypatch.setattr("jobs.machines.time.time", lambda: next(ours))
    assert skew(lambda: next(theirs)) == pytest.approx(7.0)
