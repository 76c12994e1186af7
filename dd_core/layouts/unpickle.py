"""Reads a pickled file of weights in a process of its own: `python -m dd_core.layouts.unpickle FILE OUT`.

PyTorch's restricted unpickler, or that of `scripted` for TorchScript archives, builds tensors and plain
containers only, so nothing in the file can run code; the process also has limits of memory and of time,
and writes safetensors.
"""

import errno
import pickle
import re
import resource
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dd_core.layouts.scripted import is_scripted, scripted_tensors

ADDRESS_BYTES = 16 * 2**30
"""Address space beside four times the file's size; PyTorch takes several GiB before it does anything."""
CPU_SECONDS = 900
FOREIGN = "pytorch_lightning."
"""Classes of this package, such as callbacks, are named in checkpoints; `Nothing` stands for each."""
TORN = "PytorchStreamReader"
"""How torch's RuntimeError of a cut file begins."""


class UnsafeError(ValueError):
    """It is no file that is read; the message says why."""


class Nothing:
    """Stands for a foreign class; accepts any arguments and does nothing."""

    def __init__(self, *_: object) -> None:
        """Ignore the arguments."""


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, under its keys joined by dots."""
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from tensors(inner, f"{name}.{index}" if name else str(index))


def main(source: Path, target: Path) -> None:
    """Read `source`, write its tensors to `target` as safetensors."""
    limit = ADDRESS_BYTES + 4 * source.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    found = scripted_tensors(source) if is_scripted(source) else dict(tensors(pickled(source)))
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, target)


def pickled(source: Path) -> Any:
    """The content of a file of torch.save; of a training checkpoint only its `state_dict`.

    Raises:
        UnsafeError: It holds what is no weight, or was not written by torch.save, or not to its end.
    """
    try:
        content = restricted(source)
    except pickle.UnpicklingError as error:  # which advises to read it without care
        named = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {named[1]}, which is no weight" if named else "torch.save has not written it"
        raise UnsafeError(why) from None
    except (KeyError, EOFError, OSError, RuntimeError) as error:
        if not torn(error):
            raise
        raise UnsafeError("it is cut or damaged, or torch.save has not written it") from None
    return content.get("state_dict", content) if isinstance(content, Mapping) else content


def torn(error: Exception) -> bool:
    """Whether torch raises this of a file that is cut or none of its own, and not of memory or a disk."""
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL  # it looks before the beginning
    return isinstance(error, KeyError | EOFError) or str(error).startswith(TORN)


def restricted(source: Path) -> Any:
    """What PyTorch's restricted unpickler makes of a file."""
    listed = zipfile.is_zipfile(source)  # files of torch before 1.6 are not, and what they name is not listed
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(source)) if listed else []
    safe: list[Any] = [(Nothing, known) for known in foreign if known.startswith(FOREIGN)]
    with torch.serialization.safe_globals(safe):
        return torch.load(source, map_location="cpu", weights_only=True, mmap=False)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UnsafeError as unsafe:
        sys.exit(f"Error: {unsafe}")
