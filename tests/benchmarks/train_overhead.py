"""What Ray Train costs a step: the same stage, data and budget, bare and wrapped, in one process each.

    python -m tests.benchmarks.train_overhead --steps 300 --rounds 3 --out overhead.json

The bare loop reads the same batches from memory and keeps no checkpoint and no journal; the wrapped one is
train_stage as it is used, timed by its own journal between the first report and the last, so without
start-up.  Prints milliseconds a step (median of the rounds, alternating), their ratio, and the seconds from
the call of train_stage to the first step.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch

from dd_core.nets.unet import UNetSpec
from dd_core.stage import Budget, OptimizerSpec, PairBatch
from dd_core.stages import build_stage
from dd_core.stages.upsampler import UpsamplerSpec
from dd_core.training import TrainState, train
from tests.prepared import write_prepared
from workflows.journal import entries
from workflows.train_spec import TrainSpec
from workflows.training import train_stage

SIZE, REPORT = 64, 20


def spec_of(steps: int, name: str) -> TrainSpec:
    """An upsampler of about the demo's step time."""
    net = UNetSpec(
        width=32,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_at=(),
        attention_in_middle=False,
        groups=8,
        stem="unshuffle",
        stem_factor=4,
        image_channels=3,
    )
    return TrainSpec(
        name=name,
        stage=UpsamplerSpec(net=net, image_size=SIZE, crop=SIZE),
        optimizer=OptimizerSpec(learning_rate=1e-3, precision="fp32"),
        budget=Budget(steps=steps, checkpoint_every=10 * steps, report_every=REPORT),
        batch_size=8,
    )


def bare(steps: int) -> float:
    """Seconds a step without Ray, journal and data."""
    spec = spec_of(steps, "bare")
    torch.manual_seed(0)
    state = TrainState(build_stage(spec.stage, {}), spec.optimizer)
    batch = PairBatch(
        torch.randint(0, 256, (spec.batch_size, 3, SIZE, SIZE), dtype=torch.uint8),
        torch.ones(spec.batch_size, 8, dtype=torch.long),
    )
    reports = train(state, itertools.repeat(batch), optimizer=spec.optimizer, budget=spec.budget)
    times = [time.perf_counter() for report in reports if report.step % REPORT == 0]
    return (times[-1] - times[0]) / (REPORT * (len(times) - 1))


def wrapped(steps: int, root: Path, data: Path, number: int) -> tuple[float, float]:
    """Seconds a step as train_stage makes them, and seconds from its call to the end of the first step."""
    began = time.time()
    train_stage(spec_of(steps, f"wrapped-{number}"), run=root, data=data)
    found = [e for e in entries(root / f"wrapped-{number}" / "metrics.jsonl") if e.name == "train/loss"]
    step = (found[-1].at_ms - found[0].at_ms) / 1000 / (found[-1].step - found[0].step)
    return step, found[0].at_ms / 1000 - began - (REPORT - 1) * step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as place:
        root = Path(place)
        data = write_prepared(root / "data", files=4, rows=512, size=SIZE)
        ray.init(
            num_cpus=max(2, cores), include_dashboard=False, _temp_dir=f"{place}/ray", log_to_driver=False
        )
        rounds = [
            (bare(options.steps), *wrapped(options.steps, root, data, n)) for n in range(options.rounds)
        ]
        ray.shutdown()
    alone, together, start = (statistics.median(column) for column in zip(*rounds, strict=True))
    result = {
        "bare_ms": 1000 * alone,
        "wrapped_ms": 1000 * together,
        "ratio": statistics.median(w / b for b, w, _ in rounds),
        "start_s": start,
        "rounds": rounds,
        "load": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=2))  # noqa: T201
    if options.out:
        options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
