"""Samples per second of a training step: our UNet against diffusers' of equal width and blocks.

    python -m tests.benchmarks.train_step [--rounds 7] [--batch 16] [--compile] [--who ours,same]

A step is forward, backward and a fused AdamW step at 64 px with captions.  Two peers: `same`,
diffusers' UNet2DConditionModel with exactly our blocks and our weights, whose loss in float32 is
ours to 1e-5 (checked before anything is timed), and `default`, the same class with the blocks it
has unless told otherwise (a transformer block of self-attention, attention to the caption and a
gated layer, plain convolutions to halve and double), of equal width and number.  All contestants
alternate in one thread that is not the process's first, as in Ray's workers (glibc keeps more of
what it frees); medians of their rounds are compared, each with its best mode.  Needs neither Ray
nor pytest; on a GPU when there is one.  With --one-thread the CPU time of a single thread counts,
which other processes on a busy box disturb less than the wall clock.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dd_core.denoiser import Conditioning
from dd_core.nets.unet import UNet, UNetSpec
from dd_core.precision import has_bf16
from tests.parity.diffusers_unet import as_ours, peer

SPEC = UNetSpec(
    width=48,
    channel_mult=(1, 1, 2, 2),
    blocks_per_level=2,
    attention_at=(4, 8),
    head_width=32,
    groups=16,
    level_scale=1.0,
    text_width=128,
    text_at_level=False,
)
SIDE, LENGTH = 64, 16
WHO = ("ours", "same", "default")
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """Inputs of one step."""

    x: Tensor
    level: Tensor
    text: Tensor
    target: Tensor


class Contestant(NamedTuple):
    """One network in one mode."""

    who: str
    mode: str
    step: Callable[[], float]
    gflop: float
    """Of one sample, forward and backward."""


def now() -> float:
    """CPU seconds of this thread if torch has only one, else seconds of the wall clock."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def batch_of(size: int, device: str) -> Batch:
    """Noise, the same every time."""
    torch.manual_seed(0)
    x, text = torch.randn(size, 3, SIDE, SIDE), torch.randn(size, LENGTH, SPEC.text_width)
    parts = (x, 1000 * torch.rand(size), text, torch.randn_like(x))
    return Batch(*(part.to(device) for part in parts))


def default_peer() -> UNet2DConditionModel:
    """diffusers' UNet of the same width and number of blocks, the blocks being its default ones."""
    attends = [factor in SPEC.attention_at for factor in SPEC.factors()]
    return UNet2DConditionModel(
        in_channels=3,
        out_channels=3,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        block_out_channels=SPEC.channels(),
        layers_per_block=SPEC.blocks_per_level,
        norm_num_groups=SPEC.groups,
        cross_attention_dim=SPEC.text_width,
        attention_head_dim=[wide // SPEC.head_width or 1 for wide in SPEC.channels()],  # number of heads
    )


def network_of(who: str) -> nn.Module:
    """Ours or one of the peers; `same` and ours with the same weights, every time."""
    torch.manual_seed(1)
    if who == "default":
        return default_peer()
    same = peer(SPEC, in_channels=3, out_channels=3)
    if who == "same":
        return same
    ours = UNet(SPEC, in_channels=3, out_channels=3)
    ours.load_state_dict(as_ours(same.state_dict()))
    return ours


def call_of(network: nn.Module) -> Call:
    """The same call for every network: (x, level, text) -> output."""
    if isinstance(network, UNet2DConditionModel):
        return lambda x, level, text: network(x, level, encoder_hidden_states=text).sample
    return lambda x, level, text: network(x, level, Conditioning(text=text))


def gflop_of(network: nn.Module) -> float:
    """Multiply-adds times two of one sample, forward and backward, in 1e9."""
    batch = batch_of(1, "meta")  # there no loop of ours, which is not counted, takes a layer's place
    with FlopCounterMode(display=False) as counter:
        call_of(network.to("meta"))(batch.x, batch.level, batch.text).sum().backward()
    return counter.get_total_flops() / 1e9


def same_loss(batch: Batch) -> float:
    """Difference of the float32 losses of ours and of the peer with the same weights."""
    x, level, text, target = (part[:4] for part in batch)
    losses = []
    for who in ("ours", "same"):
        with torch.no_grad():
            answer = call_of(network_of(who).to(x.device))(x, level, text)
        losses.append(F.mse_loss(answer, target).item())
    if abs(losses[0] - losses[1]) > 1e-5:
        raise SystemExit(f"losses {losses}: not the same network, so there is nothing to compare")
    return abs(losses[0] - losses[1])


def contestant(who: str, mode: str, network: nn.Module, batch: Batch, gflop: float) -> Contestant:
    """A network in a mode, ready to step; `mode` names what differs from eager float32."""
    device = batch.x.device
    if "channels_last" in mode:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    call = call_of(network)
    if "compiled" in mode:
        call = torch.compile(call)

    def step() -> float:
        begin = now()
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in mode):
            loss = F.mse_loss(call(batch.x, batch.level, batch.text).float(), batch.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return now() - begin

    return Contestant(who, mode, step, gflop)


def ceiling(device: str) -> float:
    """GFLOP/s of a 3x3 convolution, 128 channels at 32 px, with its backward, in the faster precision."""
    half = has_bf16(torch.device(device))
    like = {"device": device, "dtype": torch.bfloat16 if half else torch.float32}
    x = torch.randn(16, 128, 32, 32, **like).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(128, 128, 3, 3, **like).requires_grad_()
    seconds = []
    for _ in range(12):
        begin = now()
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), y.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(now() - begin)
    return 3 * 2 * y.numel() * 128 * 9 / statistics.median(seconds[2:]) / 1e9


def race(contestants: Sequence[Contestant], rounds: int) -> list[list[float]]:
    """Seconds of each step: two to warm up, then all of them in turn, `rounds` times."""
    for one in contestants:
        for _ in range(2):
            one.step()
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for one, found in zip(contestants, seconds, strict=True):
            found.append(one.step())
    return seconds


def modes_on(device: str) -> tuple[str, ...]:
    """Precisions and memory layouts; bfloat16 where the device multiplies it, else it would run for hours."""
    numbers = ("fp32", "bf16") if has_bf16(torch.device(device)) else ("fp32",)
    return tuple(f"{number}{layout}" for number in numbers for layout in ("", " channels_last"))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The whole comparison, as it is written to the file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = batch_of(options.batch, device)
    difference = same_loss(batch)
    whom = options.who.split(",")
    gflop = {who: gflop_of(network_of(who)) for who in whom}
    modes = modes_on(device)
    if options.compile:  # the faster precision, in both layouts
        modes = tuple(f"{mode} compiled" for mode in modes[-2:])
    if options.modes:
        modes = tuple(options.modes.split(","))
    contestants = [
        contestant(who, mode, network_of(who).to(device), batch, gflop[who]) for mode in modes for who in whom
    ]
    rows = []
    for one, seconds in zip(contestants, race(contestants, options.rounds), strict=True):
        rate = options.batch / statistics.median(seconds)
        rows.append(
            {"who": one.who, "mode": one.mode, "samples_per_s": rate, "gflops": rate * one.gflop}
            | {"seconds": [round(value, 4) for value in seconds]}
        )
    best = {who: max(row["samples_per_s"] for row in rows if row["who"] == who) for who in whom}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "load": os.getloadavg(),
        "loss_difference": difference,
        "parameters": {who: sum(p.numel() for p in network_of(who).parameters()) for who in whom},
        "gflop_per_sample": gflop,
        "ceiling_gflops": ceiling(device),
        "rows": rows,
        "ratios": {f"ours / {who}": best["ours"] / best[who] for who in whom[1:]},
    }


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compare the compiled networks instead")
    parser.add_argument("--modes", help="only these, joined by commas")
    parser.add_argument("--who", default=",".join(WHO), help="ours first, and some of the others")
    parser.add_argument("--one-thread", action="store_true", help="see above, on a busy box")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one_thread:
        torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(measure, options).result()
    for row in found["rows"]:
        sys.stdout.write(
            f"{row['who']:8} {row['mode']:28} {row['samples_per_s']:8.1f} samples/s"
            f" {row['gflops']:8.0f} GFLOP/s\n"
        )
    sys.stdout.write(f"3x3 convolution with backward       {found['ceiling_gflops']:28.0f} GFLOP/s\n")
    for name, ratio in found["ratios"].items():
        sys.stdout.write(f"{name}, best mode of each {ratio:6.2f} x\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
