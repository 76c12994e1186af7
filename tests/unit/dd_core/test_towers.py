"""open_clip is imported without timm, and timm can be imported afterwards by whoever wants it."""

import subprocess
import sys

PROGRAM = """
import sys
from dd_core.nets.clip import Clip, ClipNetSpec
from dd_core.towers import open_clip
assert "open_clip" not in sys.modules
open_clip().model.CLIP
assert "timm" not in sys.modules
import importlib.util
assert importlib.util.find_spec("timm") is not None
"""


def test_open_clip_comes_without_timm() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
