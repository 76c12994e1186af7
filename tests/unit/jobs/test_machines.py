"""What nodes say of themselves becomes lines with a fix, and a doctor on a laptop says who can ask them."""

from pathlib import Path

import pytest

from jobs import environment
from jobs.deploy import Address
from jobs.doctor import nodes, on_the_air
from jobs.machines import SPARE_BYTES, Finding, Machine, Seen, told_of

GPU = Finding("gpu", "fail", "torch sees no GPU", "install a torch")


def test_a_machine_says_how_much_room_it_has_where_it_keeps_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Machine().seen()
    assert Path(seen.scratch).is_dir()
    assert seen.free > 0
    assert {line.check for line in seen.gpu} == {"gpu"}


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
