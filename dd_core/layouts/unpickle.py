"""Reads a pickled file of weights in a process of its own: `python -m dd_core.layouts.unpickle FILE OUT`.

PyTorch's restricted unpickler, or that of `scripted` for TorchScript archives, builds tensors and plain
containers only, so nothing in the file can run code; the process has a limit of memory and of time besides,
and brings back safetensors.
"""

import resource
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dd_core.layouts.scripted import is_scripted, scripted_tensors

ADDRESS_BYTES = 16 * 2**30
"""Address space beside the file itself; PyTorch takes several GiB of it before it does anything."""
CPU_SECONDS = 900
FOREIGN = "pytorch_lightning."
"""Training frameworks leave the names of their callbacks in the file; they mean nothing to us."""


class Nothing:
    """Stands for a class of somebody else's; it takes whatever it is given and does nothing."""

    def __init__(self, *_: object) -> None:
        """Forget all of it."""


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
    """Read the one, write the other."""
    limit = ADDRESS_BYTES + 4 * source.stat().st_size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    found = scripted_tensors(source) if is_scripted(source) else dict(tensors(pickled(source)))
    save_file({name: tensor.clone().contiguous() for name, tensor in found.items()}, target)


def pickled(source: Path) -> Any:
    """What torch.save wrote; of a training's checkpoint the weights."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(source))
    safe: list[Any] = [(Nothing, known) for known in foreign if known.startswith(FOREIGN)]
    with torch.serialization.safe_globals(safe):
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=False)
    return content.get("state_dict", content) if isinstance(content, Mapping) else content


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
