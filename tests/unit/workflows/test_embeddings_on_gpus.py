"""The embeddings of a CLIP on a cluster with GPUs: Ray is told of one that is not there."""

import shutil
from pathlib import Path

from dd_core.stages.clip import ClipSpec
from tests.conftest import needs_ray, small_ray
from tests.prepared import write_prepared
from tests.unit.workflows.test_embeddings import (
    FILES,
    NET,
    ROWS,
    SIZE,
    WIDTH,
    digests,
    embeddings_of,
    telling,
)
from tests.unit.workflows.tiny_run import saved
from workflows.embeddings import reported_by_tasks, write_sidecar


@needs_ray
def test_tasks_that_ask_for_gpus_report_every_file_once(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "prepared", files=FILES, rows=ROWS, size=SIZE)
    clip = saved(tmp_path / "run", "clip", ClipSpec(net=NET), {})
    what = embeddings_of(tmp_path / "run", data, clip)
    with small_ray(num_gpus=1):
        reports = list(reported_by_tasks(what, [*range(FILES)], gpus=1, device="cpu"))
    assert [(one["damage"], one["error"], one["away"]) for one in reports] == [("", "", "")] * FILES
    mine = digests(what.home)
    assert len(mine) == FILES
    shutil.rmtree(what.home.here)
    for number in range(FILES):
        write_sidecar(what, number, WIDTH, telling(clip))
    assert digests(what.home) == mine
