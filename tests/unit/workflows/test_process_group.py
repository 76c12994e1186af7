"""The process group of a training: made by the workers, and the process that tells them to has no torch."""

import subprocess
import sys
from typing import Any

import pytest
import ray

from workflows.process_group import Joining, ProcessGroup, join, leave


class Workers:
    """Stands for Ray's group of workers: answers at once and remembers what it was told."""

    def __init__(self, count: int) -> None:
        self.count, self.told = count, list[tuple[Any, ...]]()

    def __len__(self) -> int:
        return self.count

    def execute_single(self, rank: int, function: Any) -> tuple[str, int]:
        return "fe80::1", 7001

    def execute_single_async(self, rank: int, function: Any, *words: Any) -> str:
        self.told.append((rank, function, *words))
        return "done"

    def execute_async(self, function: Any, *words: Any) -> list[str]:
        self.told.append((function, *words))
        return ["done"]


def test_ray_s_controller_needs_no_torch() -> None:
    asked = "import sys, workflows.process_group; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_every_worker_joins_one_group_under_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda refs, timeout=None: refs)
    group, workers = ProcessGroup(), Workers(2)
    group.backend = "gloo"
    Joining().on_start(workers, group)
    how = {"backend": "gloo", "init_method": "env://", "timeout_s": 1800, "world_size": 2}
    where = {"MASTER_ADDR": "fe80::1", "MASTER_PORT": "7001"}
    assert workers.told == [(rank, join, where, how | {"world_rank": rank}) for rank in (0, 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_a_group_of_several_is_left_and_who_does_not_leave_is_not_waited_for(
    count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hang(refs: list[str], timeout: float) -> None:
        raise ray.exceptions.GetTimeoutError

    workers = Workers(count)
    monkeypatch.setattr(ray, "get", hang)
    Joining().on_shutdown(workers, ProcessGroup())
    assert workers.told == [(leave, count > 1)]
    assert "workers did not leave their process group within 5 s" in caplog.text


def test_it_stands_for_ray_s_own_config() -> None:
    from ray.train.torch.config import TorchConfig, _TorchBackend  # noqa: PLC0415 with torch

    ours, theirs = ProcessGroup(), TorchConfig(init_method="env")
    assert ours.to_dict() == theirs.to_dict()
    assert ours.framework == theirs.framework
    assert ours.train_func_context is theirs.train_func_context
    assert Joining.share_cuda_visible_devices == _TorchBackend.share_cuda_visible_devices
