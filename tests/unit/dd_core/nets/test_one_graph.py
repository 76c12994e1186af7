"""torch.compile makes one graph of a UNet, which calls the same loops and computes the same."""

import subprocess
import sys

import pytest

COMPILED = """
import sys

import torch

from dd_core.denoiser import Conditioning
from dd_core.nets import winograd
from dd_core.nets.unet import UNet, UNetSpec

torch.manual_seed(0)
torch.set_num_threads(1)
spec = UNetSpec(width=16, channel_mult=(1, 2), blocks_per_level=1, attention_at=(2,), head_width=16, groups=4)
learns = sys.argv[1] == "learns"
network = UNet(spec.but(text_width=16), in_channels=3, out_channels=3).requires_grad_(learns)
for weight in network.parameters():
    torch.nn.init.normal_(weight, std=0.1)
half = torch.bfloat16
x, level, text = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 16)
if not learns:
    network, x, level, text = network.to(half), x.to(half), level.to(half), text.to(half)
# where oneDNN convolves in bfloat16, it adds in the same call outside of graphs, and rounds once less
torch.backends.mkldnn.set_flags(learns or winograd.runs(half))
compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
found = []
for call in (network, compiled):
    with torch.set_grad_enabled(learns), torch.autocast("cpu", half, enabled=learns):
        out = call(x, level, Conditioning(text=text))
    loss = out.float().square().mean()
    found.append([out, *(torch.autograd.grad(loss, network.parameters()) if learns else [])])
eager, graph = found
for one, other in zip(eager, graph, strict=True):
    torch.testing.assert_close(one, other)
"""


@pytest.mark.parametrize("how", ["learns", "paints"])
def test_a_compiled_unet_is_one_graph_that_computes_the_same(how: str) -> None:
    """In a process of its own: the checks of types that tests add cannot be compiled."""
    done = subprocess.run([sys.executable, "-c", COMPILED, how], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
