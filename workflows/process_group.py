"""PyTorch's process group of a training, set up as Ray does it, but without torch in Ray's controller.

Ray's TorchConfig makes the controller, a process beside every group of workers that computes nothing, import
torch: half a GiB and three seconds for each stage.  The functions of this config import it when they run, in
the workers, which have it anyway.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

import ray
import ray.exceptions
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

log = logging.getLogger(__name__)
LEAVING_S = 5
"""How long to wait for workers to leave the group, as long as Ray waits before it kills them: leaving takes a
moment, and a worker found hanging would hold up the others for Ray's default of 30 s."""


class ProcessGroup(BackendConfig):
    """In place of ray.train.torch.TorchConfig."""

    backend: Literal["gloo", "nccl"] | None = None
    """Set by Ray's TorchTrainer, by the devices of the workers."""
    timeout_s = 1800
    """Timeout of a collective; Ray's default."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Joining

    @property
    def train_func_context(self) -> Callable[[], Any]:
        from ray.train.torch import config  # noqa: PLC0415 the driver, which asks, has torch

        return config.TorchConfigContextManager

    @property
    def framework(self) -> object:
        from ray.train.v2._internal.util import TrainingFramework  # noqa: PLC0415 as private as it is

        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "init_method": "env", "timeout_s": self.timeout_s}


class Joining(Backend):
    """What Ray's controller makes the workers do."""

    share_cuda_visible_devices = True
    """NCCL needs every worker to see all GPUs of its node."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: ProcessGroup) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        where = {"MASTER_ADDR": str(address), "MASTER_PORT": str(port)}
        how = {
            "backend": backend_config.backend,
            "init_method": "env://",
            "timeout_s": backend_config.timeout_s,
            "world_size": len(worker_group),
        }
        ranks = range(len(worker_group))
        joining = [
            worker_group.execute_single_async(rank, join, where, how | {"world_rank": rank}) for rank in ranks
        ]
        ray.get(joining)

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: ProcessGroup) -> None:
        try:
            ray.get(worker_group.execute_async(leave, len(worker_group) > 1), timeout=LEAVING_S)
        except ray.exceptions.GetTimeoutError:
            log.warning("workers did not leave their process group within %d s", LEAVING_S)


def join(where: dict[str, str], how: dict[str, Any]) -> None:
    """In a worker: set the variables that torch's own launcher sets, then join the process group."""
    from ray.train.torch import config  # noqa: PLC0415 see above

    os.environ.update(where)
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(**how)


def leave(destroy: bool) -> None:
    """In a worker, at the end: leave the process group."""
    from ray.train.torch import config  # noqa: PLC0415 see above

    config._shutdown_torch(destroy_process_group=destroy)
