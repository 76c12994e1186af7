"""Images per second of sampling: 20 guided DDIM steps, ours against a diffusers loop.

    python -m tests.benchmarks.sampling [--rounds 5] [--compile] [--one-thread] [--json FILE]

Both sides have the same network with the same weights (tests/benchmarks/train_step.py), start from
the same noise and take the same steps with the same guidance; in float32 they paint the same image, to
1e-5 of its standard deviation, which is checked before anything is timed.  Ours is
dd_core.samplers.ddim driven by `sample` through classifier_free; theirs is the loop of the diffusers
manuals over DDIMScheduler.
All contestants alternate in one process; medians of their rounds are compared, each with its best mode.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from dd_core.denoiser import Conditioning, NetworkDenoiser
from dd_core.guidance import Rows, classifier_free
from dd_core.nets.unet import UNet
from dd_core.noise import SeededNoise
from dd_core.samplers import ddim, sample
from tests.benchmarks.train_step import LENGTH, SIDE, SPEC, modes_on, network_of, now

STEPS, SCALE = 20, 3.0
Paint = Callable[[], Tensor]


def scheduler() -> DDIMScheduler:
    """The schedule of DDPM, with every 50th of its timesteps; the last step goes to the clean image."""
    found = DDIMScheduler(clip_sample=False)
    found.set_timesteps(STEPS)
    return found


class ToldTimesteps(nn.Module):
    """A network of `network_of`, which takes timesteps, called with log sigma."""

    def __init__(self, network: nn.Module, sigmas: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("log_sigmas", sigmas.log())

    def forward(self, x: Tensor, log_sigma: Tensor, cond: Conditioning) -> Tensor:
        timestep = (self.log_sigmas - log_sigma[:, None]).abs().argmin(1)
        return self.network(x, timestep.to(x), cond)


def all_sigmas() -> Tensor:
    """Noise level of each of the thousand timesteps, in the frame x0 + sigma eps."""
    kept = scheduler().alphas_cumprod
    return ((1 - kept) / kept).sqrt()


def in_mode(network: nn.Module, mode: str, device: str) -> nn.Module:
    """The network on the device, in the mode's precision and memory layout, eager or compiled."""
    network = network.to(device).eval().requires_grad_(False)
    if "bf16" in mode:
        network = network.bfloat16()
    network = network.to(memory_format=torch.channels_last) if "channels_last" in mode else network
    if "compiled" in mode:
        network.compile()
    return network


def ours(mode: str, noise: Tensor, text: Tensor) -> Paint:
    """The way of this library; `text` is the caption's states, then the empty caption's."""
    sigmas = all_sigmas()
    network = in_mode(network_of("ours"), mode, str(noise.device))
    assert isinstance(network, UNet)
    model = NetworkDenoiser(ToldTimesteps(network, sigmas.to(noise.device)), "eps").eval()
    levels = torch.cat([sigmas[scheduler().timesteps], torch.zeros(1)])
    cond, null = text.chunk(2)
    scale = torch.full((len(noise),), SCALE)
    start = noise * (1 + levels[0] ** 2).sqrt()
    unused = SeededNoise(range(len(noise)))

    @torch.no_grad()
    def paint() -> Tensor:
        rows = Rows(network.prepared(Conditioning(cond)), network.prepared(Conditioning(null)), scale=scale)
        return sample(ddim(start, levels, unused), classifier_free(model, rows))

    return paint


def theirs(mode: str, noise: Tensor, text: Tensor) -> Paint:
    """The way of the diffusers manuals."""
    network = in_mode(network_of("same"), mode, str(noise.device))
    dtype = next(network.parameters()).dtype
    text = text.to(dtype)

    @torch.no_grad()
    def paint() -> Tensor:
        steps, x = scheduler(), noise.to(dtype)
        for timestep in steps.timesteps:
            eps = network(torch.cat([x] * 2), timestep, encoder_hidden_states=text).sample
            cond, null = eps.chunk(2)
            x = steps.step(null + SCALE * (cond - null), timestep, x).prev_sample
        return x.float()

    return paint


def timed(paint: Paint) -> float:
    """Seconds of one batch of images."""
    begin = now()
    paint()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now() - begin


def compare(size: int, rounds: int, modes: tuple[str, ...]) -> dict[str, object]:
    """Seconds of both in each mode at one batch size, and the ratio of the best."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    noise = torch.randn(size, 3, SIDE, SIDE).to(device)
    text = torch.randn(2 * size, LENGTH, SPEC.text_width).to(device)
    image = theirs("fp32", noise, text)()
    apart = ((ours("fp32", noise, text)() - image).abs().max() / image.std()).item()
    if apart > 1e-5:
        raise SystemExit(f"images differ by {apart}: not the same sampling, so there is nothing to compare")
    paints = {(who.__name__, mode): who(mode, noise, text) for mode in modes for who in (ours, theirs)}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in paints}
    for paint in paints.values():
        paint()
    for _ in range(rounds):
        for name, paint in paints.items():
            seconds[name].append(timed(paint))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = {
        who: min(value for name, value in medians.items() if name[0] == who) for who in ("ours", "theirs")
    }
    rows = [
        {"who": who, "mode": mode, "images_per_s": size / value} for (who, mode), value in medians.items()
    ]
    return {"batch": size, "rows": rows, "difference": apart, "ours / theirs": best["theirs"] / best["ours"]}


def main() -> None:
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--compile", action="store_true", help="compare the compiled networks instead")
    parser.add_argument("--modes", help="only these, joined by commas")
    parser.add_argument("--one-thread", action="store_true", help="CPU time of one thread, for a busy box")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one_thread:
        torch.set_num_threads(1)
    modes = modes_on("cuda" if torch.cuda.is_available() else "cpu")
    if options.compile:  # the faster precision, in both layouts
        modes = tuple(f"{mode} compiled" for mode in modes[-2:])
    if options.modes:
        modes = tuple(options.modes.split(","))
    found = [compare(int(size), options.rounds, modes) for size in options.batches.split(",")]
    for batch in found:
        for row in batch["rows"]:
            sys.stdout.write(
                f"batch {batch['batch']}  {row['who']:8} {row['mode']:28}"
                f" {row['images_per_s']:8.2f} images/s\n"
            )
        sys.stdout.write(f"batch {batch['batch']}  best mode of each {batch['ours / theirs']:25.2f} x\n")
        sys.stdout.write(f"batch {batch['batch']}  images differ by {batch['difference']:26.1e}\n")
    if options.json:
        facts = {"steps": STEPS, "scale": SCALE, "load": os.getloadavg(), "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps(facts | {"batches": found}, indent=2))


if __name__ == "__main__":
    main()
