"""Workers agree to stop at one step, soon enough for what has told them to."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import ray.train.torch
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from workflows import agreement
from workflows.agreement import Agreed, Agreement

if TYPE_CHECKING:
    from workflows.stopping import StopSign

GO_ON, STOP = Agreed(stop=False, node_will_go=False), Agreed(stop=True, node_will_go=False)


def asked_at(seconds: float, monkeypatch: pytest.MonkeyPatch, *, steps: int = 40) -> list[int]:
    """The steps at which workers ask each other that take so long for a step."""
    clock, found = [0.0], list[int]()
    monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Agreement, "most", lambda _, *own: found.append(len(found)) or list(own))
    sign = cast("StopSign", SimpleNamespace(up=lambda: False))
    workers, at = Agreement(sign, ranks=2, drainable=False), list[int]()
    for step in range(101, 101 + steps):
        clock[0] += seconds if step > 101 else 90.0  # the first one compiles
        before = len(found)
        assert workers.after(step) == GO_ON
        at += [step] * (len(found) - before)
    return at


def test_workers_ask_each_other_every_few_seconds_but_not_more_often_than_after_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert asked_at(0.1, monkeypatch) == [101, 102, 112, 122, 132]
    assert asked_at(12.0, monkeypatch) == list(range(101, 141))
    assert asked_at(2.0, monkeypatch, steps=6) == [101, 102, 104, 106]


def test_a_worker_alone_stops_at_once_and_is_told_of_a_node_as_often_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, looked = [False], list[int]()
    sign = cast("StopSign", SimpleNamespace(up=lambda: told[0]))
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: looked.append(1))
    alone = Agreement(sign, ranks=1, drainable=True)
    assert [alone.after(step) for step in range(1, 8)] == [GO_ON] * 7
    assert len(looked) == 2
    told[0] = True
    assert alone.after(8) == STOP


def test_the_slowest_worker_and_any_that_is_told_decide_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sign = cast("StopSign", SimpleNamespace(up=lambda: False))
    monkeypatch.setattr(Agreement, "most", lambda _, *own: [1.0, 60.0])  # of another
    workers = Agreement(sign, ranks=2, drainable=False)
    assert workers.after(1) == STOP
    assert workers.pause == 1


def rank_main(rank: int, root: Path) -> None:
    """The second of two workers is told to stop after its fifth step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(root / "store"), 2), rank=rank, world_size=2)
    ray.train.torch.get_device = lambda: torch.device("cpu")
    told = [False]
    workers = Agreement(
        cast("StopSign", SimpleNamespace(up=lambda: told[0] and rank == 1)), ranks=2, drainable=False
    )
    for step in range(1, 100):
        told[0] = step >= 5
        if workers.after(step).stop:
            break
    (root / f"{rank}.json").write_text(json.dumps(step))
    dist.barrier()
    os._exit(0)  # gloo on CPU sometimes aborts in its own teardown


@pytest.mark.slow
def test_two_workers_of_which_one_is_told_stop_at_the_same_step(tmp_path: Path) -> None:
    run_ranks(rank_main, (tmp_path,), 2)
    stopped = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert stopped[0] == stopped[1]
    assert 5 <= stopped[0] <= 5 + agreement.ASK_EVERY_STEPS
