"""Loops in C, compiled on the machine that runs them, for its own processor: once, in a second.

PyTorch's operations work on whole tensors; where a CPU would pass over memory ten times for what one loop
does, the loop is written in C.  Callers have the same in PyTorch's operations, for machines without gcc.
"""

import ctypes
import hashlib
import logging
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from dd_core.scratch import scratch_directory

log = logging.getLogger(__name__)
Asked = TypeVar("Asked", bound=Callable[..., bool])
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")


@cache
def compiled(source: Path, *defined: str) -> ctypes.CDLL | None:
    """The library compiled from a C file; None, logged once, if there is no gcc on Linux or it fails.

    `defined` are names for the preprocessor, of files that hold a loop for several dtypes.  OpenMP's threads
    are PyTorch's own: on Linux both ask for libgomp.so.1, which PyTorch has loaded.
    """
    gcc = shutil.which("gcc")
    if gcc is None or sys.platform != "linux":
        log.warning(
            "%s needs gcc on Linux (Debian: apt-get install gcc libc6-dev); slower without", source.name
        )
        return None
    try:
        return ctypes.CDLL(str(library(gcc, source, defined)))
    except subprocess.CalledProcessError as error:
        log.warning("%s did not compile, slower without: %s", source.name, error.stderr.decode().strip())
    except OSError as error:
        log.warning("%s could not be loaded, slower without: %s", source.name, error)
    return None


def constant(asked: Asked) -> Asked:
    """Mark a function whose result never changes, so that torch.compile asks it once.

    As torch.compiler.assume_constant_result does, which imports the whole compiler: two seconds, 150 MB.
    """
    asked._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return asked


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """The address of each tensor's data, as a loop is told it; a null pointer for None."""
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def library(gcc: str, source: Path, defined: tuple[str, ...] = ()) -> Path:
    """The compiled file for this source, these flags and names, and this processor, made unless it exists.

    Raises:
        subprocess.CalledProcessError: gcc fails.
        OSError: The directory it is kept in cannot be used.
    """
    processor = repr(sorted(torch.cpu.get_capabilities().items()))
    flags = (*FLAGS, *(f"-D{name}" for name in defined))
    key = hashlib.sha256("\0".join([source.read_text(), *flags, processor]).encode()).hexdigest()[:16]
    made = scratch_directory("compiled") / f"{source.stem}-{key}.so"
    if not made.exists():
        draft = made.with_suffix(f".{uuid.uuid4().hex}")  # several processes may compile; the last one wins
        subprocess.run(  # noqa: S603 our own source
            [gcc, *flags, source, "-o", draft, "-lm"], check=True, capture_output=True
        )
        draft.rename(made)
    return made
