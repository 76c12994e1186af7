"""What the published sizes are trained on; each worker has a GPU of 80 GB, whatever its paper had.

--set stages.base.resources.labels={}       on other GPUs
--set stages.base.resources.gpu_memory_gib=141 --set stages.base.micro_batch_size=256
"""

from workflows.train_spec import ResourcesSpec

PAPER_WORKERS = 8
PAPER_WORKER = ResourcesSpec(
    cpus=8,
    memory_gib=64,
    gpu_memory_gib=80,
    labels={"ray.io/accelerator-type": "in(H100, H200, B200, A100)"},
)
