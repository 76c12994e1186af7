"""The loops in C, compiled for another processor than the one of this machine."""

import ctypes
import platform
import shutil
from pathlib import Path

import pytest
import torch

from dd_core import compiled

BFLOAT16 = "cooperlake"
"""Has the products of bfloat16 in AVX-512, and no AMX."""


def runs_bfloat16() -> bool:
    """Whether this processor can run what is compiled for BFLOAT16, and compiles it out of its own loops."""
    has = torch.cpu.get_capabilities()
    return bool(shutil.which("gcc") and has.get("avx512_bf16") and has.get("amx_bf16"))


def needs_x86() -> str:
    """The compiler; skips where it compiles for no x86."""
    gcc = shutil.which("gcc")
    if gcc is None or platform.machine() != "x86_64":
        pytest.skip("no gcc for x86 here")
    return gcc


def built_for(processor: str, source: Path, *defined: str) -> ctypes.CDLL:
    """The library of a C file as that processor would have it, which runs here or not."""
    with pytest.MonkeyPatch.context() as patch:
        flags = [flag.replace("native", processor) for flag in compiled.FLAGS]
        patch.setattr(compiled, "FLAGS", flags)
        return ctypes.CDLL(str(compiled.library(needs_x86(), source, defined)))
