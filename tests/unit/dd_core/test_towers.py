"""open_clip is imported without timm and torch's compiler, and whoever wants these has them afterwards."""

import subprocess
import sys

PROGRAM = """
import sys
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.towers import open_clip
assert "open_clip" not in sys.modules
open_clip().model.CLIP
assert not {"timm", "torch._dynamo", "torch._dynamo.utils"} & sys.modules.keys()
import importlib.util
assert importlib.util.find_spec("timm") is not None

import torch
from torchvision.ops import roi_align
boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
assert roi_align(torch.ones(1, 3, 8, 8), boxes, 2).eq(1).all()  # asks the compiler, ours or theirs
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)) == 1
"""


def test_open_clip_comes_without_timm_and_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
