"""Hardware of the recipes: how many workers a stage has and what each is given, with nothing left unsaid.

Recipes of published size have GPUs of 80 GB, whatever the paper used.  For others:

--set stages.base.resources.labels={}       for GPUs of other types
--set stages.base.resources.gpu_memory_gib=141 --set stages.base.micro_batch_size=256    for 141 GB
"""

from typing import TypedDict

from workflows.train_spec import ResourcesSpec

PAPER_WORKERS = 8


class Hardware(TypedDict):
    """The fields of a TrainSpec that say it: `TrainSpec(..., **any_node(memory_gib=3))`."""

    num_workers: int
    use_gpu: bool | None
    resources: ResourcesSpec


def any_node(*, memory_gib: float) -> Hardware:
    """One worker, wherever it has room; with a GPU if there is one.

    Args:
        memory_gib: Of the worker.
    """
    resources = ResourcesSpec(memory_gib=memory_gib, labels={})
    return {"num_workers": 1, "use_gpu": None, "resources": resources}


def gpus_80gb(workers: int) -> Hardware:
    """As many workers, each with 8 CPUs, 64 GiB and a GPU of 80 GB."""
    resources = ResourcesSpec(
        cpus=8,
        memory_gib=64,
        gpu_memory_gib=80,
        labels={"ray.io/accelerator-type": "in(H100, H200, B200, A100)"},
    )
    return {"num_workers": workers, "use_gpu": True, "resources": resources}
