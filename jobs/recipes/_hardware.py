"""Hardware of the recipes of published size: every worker has a GPU of 80 GB, whatever the paper used.

--set stages.base.resources.labels={}       for GPUs of other types
--set stages.base.resources.gpu_memory_gib=141 --set stages.base.micro_batch_size=256    for 141 GB
"""

from workflows.train_spec import ResourcesSpec

PAPER_WORKERS = 8
PAPER_WORKER = ResourcesSpec(
    cpus=8,
    memory_gib=64,
    gpu_memory_gib=80,
    labels={"ray.io/accelerator-type": "in(H100, H200, B200, A100)"},
)
