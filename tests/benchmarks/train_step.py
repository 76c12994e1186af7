"""Samples per second of a training step: our UNet against diffusers' of equal width and blocks.

    python -m tests.benchmarks.train_step [--rounds 7] [--batch 16] [--compile] [--json FILE]

A step is forward, backward and a fused AdamW step at 64 px with captions.  Two peers: `same`,
diffusers' UNet2DConditionModel with exactly our blocks and our weights, whose loss in float32 is
ours to 1e-5 (checked before anything is timed), and `default`, the same class with the blocks it
has unless told otherwise (a transformer block of self-attention, attention to the caption and a
gated layer, plain convolutions to halve and double), of equal width and number.  All contestants
alternate in one process; medians of their rounds are compared, each with its best mode.  Needs
neither Ray nor pytest; on a GPU when there is one.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dd_core.denoiser import Conditioning
from dd_core.nets.unet import UNet, UNetSpec
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


def networks() -> dict[str, nn.Module]:
    """Ours and the peers; `same` and ours with the same weights."""
    torch.manual_seed(1)
    same, ours = peer(SPEC, in_channels=3, out_channels=3), UNet(SPEC, in_channels=3, out_channels=3)
    ours.load_state_dict(as_ours(same.state_dict()))
    return {"ours": ours, "same": same, "default": default_peer()}


def call_of(network: nn.Module) -> Call:
    """One way of calling for all."""
    if isinstance(network, UNet2DConditionModel):
        return lambda x, level, text: network(x, level, encoder_hidden_states=text).sample
    return lambda x, level, text: network(x, level, Conditioning(text=text))


def gflop_of(network: nn.Module) -> float:
    """Multiply-adds times two of one sample, forward and backward, in 1e9."""
    batch = batch_of(1, "cpu")
    with FlopCounterMode(display=False) as counter:
        call_of(network)(batch.x, batch.level, batch.text).sum().backward()
    network.zero_grad()
    return counter.get_total_flops() / 1e9


def same_loss(found: dict[str, nn.Module], batch: Batch) -> float:
    """Difference of the float32 losses of ours and of the peer with the same weights."""
    few = Batch(*(part[:4] for part in batch))
    with torch.no_grad():
        ours, same = (
            F.mse_loss(call_of(found[name])(few.x, few.level, few.text), few.target).item()
            for name in ("ours", "same")
        )
    if abs(ours - same) > 1e-5:
        raise SystemExit(f"loss {ours} against {same}: not the same network, so nothing to compare")
    return abs(ours - same)


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
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in mode):
            loss = F.mse_loss(call(batch.x, batch.level, batch.text).float(), batch.target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return Contestant(who, mode, step, gflop)


def ceiling(device: str) -> float:
    """GFLOP/s of a 3x3 convolution in bfloat16, 128 channels at 32 px, with its backward."""
    like = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(16, 128, 32, 32, **like).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(128, 128, 3, 3, **like).requires_grad_()
    seconds = []
    for _ in range(12):
        begin = time.perf_counter()
        y = F.conv2d(x, weight, padding=1)
        torch.autograd.grad(y, (x, weight), y.detach())
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
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


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The whole comparison, as what is written to the file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, found = batch_of(options.batch, device), networks()
    gflop = {name: gflop_of(network) for name, network in found.items()}
    found = {name: network.to(device) for name, network in found.items()}
    difference = same_loss(found, batch)
    modes = ["fp32", "fp32 channels_last", "bf16", "bf16 channels_last"]
    names = [(who, mode) for who in found for mode in modes]
    if options.compile:
        names = [(who, mode + " compiled") for who in found for mode in ("bf16", "bf16 channels_last")]
    if options.modes:
        names = [(who, mode) for who, mode in names if mode in options.modes.split(",")]
    fresh = {name: networks()[name[0]].to(device) for name in names}
    contestants = [contestant(*name, fresh[name], batch, gflop[name[0]]) for name in names]
    rows = []
    for one, seconds in zip(contestants, race(contestants, options.rounds), strict=True):
        rate = options.batch / statistics.median(seconds)
        rows.append(
            {"who": one.who, "mode": one.mode, "samples_per_s": rate, "gflops": rate * one.gflop}
            | {"seconds": [round(value, 4) for value in seconds]}
        )
    best = {who: max(row["samples_per_s"] for row in rows if row["who"] == who) for who in found}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "load": os.getloadavg(),
        "loss_difference": difference,
        "parameters": {name: sum(p.numel() for p in network.parameters()) for name, network in found.items()},
        "gflop_per_sample": gflop,
        "ceiling_gflops": ceiling(device),
        "rows": rows,
        "ratios": {f"ours / {who}": best["ours"] / best[who] for who in ("same", "default")},
    }


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="compare the compiled networks instead")
    parser.add_argument("--modes", help="only these, joined by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    for row in found["rows"]:
        sys.stdout.write(
            f"{row['who']:8} {row['mode']:28} {row['samples_per_s']:8.1f} samples/s"
            f" {row['gflops']:8.0f} GFLOP/s\n"
        )
    sys.stdout.write(f"3x3 convolution, bf16, with backward {found['ceiling_gflops']:28.0f} GFLOP/s\n")
    for name, ratio in found["ratios"].items():
        sys.stdout.write(f"{name}, best mode of each {ratio:6.2f} x\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
