"""Seconds of a training step while other processes want the cores, by how long OpenMP spins at barriers.

    python -m tests.benchmarks.waiting [--steps 6] [--beside 2] [--json FILE]

A small UNet is trained in a process of its own, once for each policy, alone and beside processes that compute
without end, with as many threads as the machine has cores.  What `ddiff` sets is GOMP_SPINCOUNT=1000.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

POLICIES: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def stepped(steps: int) -> float:
    """Seconds of a step of forward, backward and AdamW."""
    import torch  # noqa: PLC0415 the policy is read when it is loaded

    from dd_core.denoiser import Conditioning  # noqa: PLC0415
    from dd_core.nets.unet import UNet, UNetSpec  # noqa: PLC0415

    torch.manual_seed(0)
    spec = UNetSpec(
        width=64, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=32, groups=8
    )
    network = UNet(spec, in_channels=3, out_channels=3).to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    began = 0.0
    for number in range(steps + 1):
        began = time.perf_counter() if number == 1 else began  # the first one warms up
        optimizer.zero_grad()
        network(x, torch.ones(8), Conditioning()).square().mean().backward()
        optimizer.step()
    return (time.perf_counter() - began) / steps


def spin() -> None:
    """Another process that keeps a core busy."""
    while True:
        pass


def measured(policy: str, beside: int, steps: int) -> float:
    """Seconds of a step under a policy beside this many busy processes."""
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(beside)]
    for other in others:
        other.start()
    ours = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    environ = {name: value for name, value in os.environ.items() if name not in ours} | POLICIES[policy]
    words = [sys.executable, "-m", "tests.benchmarks.waiting", "--alone", "--steps", str(steps)]
    try:
        return float(subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout)
    finally:
        for other in others:
            other.kill()


def main() -> None:
    """Medians of three rounds, and how many times as fast as the default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--beside", type=int, default=os.cpu_count() or 1, help="other processes")
    parser.add_argument("--alone", action="store_true", help="step in this process and print the seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.alone:
        sys.stdout.write(f"{stepped(options.steps)}\n")
        return
    table = {}
    for beside in (0, options.beside):
        rounds = [[measured(policy, beside, options.steps) for policy in POLICIES] for _ in range(3)]
        seconds = [sorted(each)[1] for each in zip(*rounds, strict=True)]
        table[beside] = dict(zip(POLICIES, seconds, strict=True))
        words = (
            f"{policy} {took:.3f} s, {seconds[0] / took:.2f} x" for policy, took in table[beside].items()
        )
        sys.stdout.write(f"beside {beside} others: {'; '.join(words)}\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg(), "seconds": table}, indent=2))


if __name__ == "__main__":
    main()
