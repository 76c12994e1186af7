"""A small fixed network, not trained but not trivial either, seen as a denoiser and by its bare output."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dd_core.denoiser import Conditioning, Denoised, Denoiser, NetworkDenoiser, Parameterization, Tell

SHAPE = (2, 3, 8, 8)


class FakeNetwork(nn.Module):
    """Two convolutions that are told a number; at home between -1 and 1."""

    def __init__(self, out_channels: int = 3) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(7)
        self.first = nn.Parameter(0.3 * torch.randn(8, 3, 3, 3, generator=stream))
        self.second = nn.Parameter(0.3 * torch.randn(out_channels, 8, 3, 3, generator=stream))
        self.pace = nn.Parameter(torch.randn(8, generator=stream))

    def forward(self, x: Tensor, told: Tensor, cond: Conditioning = Conditioning()) -> Tensor:  # noqa: B008
        phase = (told.to(x)[:, None] / 300 * self.pace).sin()[:, :, None, None]
        return F.conv2d(torch.tanh(F.conv2d(x, self.first, padding=1) + phase), self.second, padding=1)


def ours(network: FakeNetwork, predicts: Parameterization, tell: Tell, *, sigma_min: float = 0.0) -> Denoiser:
    """The network as the samplers see it; one with twice the channels learns its variance."""
    learns = len(network.second) == 2 * SHAPE[1]
    model = NetworkDenoiser(network, predicts, tell=tell, learns_variance=learns, sigma_min=sigma_min)

    def denoise(x: Tensor, sigma: Tensor) -> Denoised:
        return model(x, sigma, Conditioning())

    return denoise


def start(seed: int = 0) -> Tensor:
    """Standard normal noise."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


class Stream:
    """The draws that a diffusers scheduler makes of a generator with this seed."""

    def __init__(self, seed: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; printed, so that `pytest -rP` reports what was observed."""
    difference = (ours - theirs).abs().max().item()
    print(f"largest difference {difference:.2e} on values up to {theirs.abs().max():.3g}")  # noqa: T201
    return difference
