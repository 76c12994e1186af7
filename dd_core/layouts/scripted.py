"""TorchScript archives, as OpenAI's CLIP was published: their tensors are read, their code is not.

The zip holds `data.pkl`, modules as pickled objects whose attributes are submodules and tensors, a file
of bytes for each storage (`data/0`), and programs (`code/`), which are never opened here.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

PICKLE, SCRIPTED = "/data.pkl", "/constants.pkl"
"""The file that is unpickled, and one that only archives of TorchScript have."""
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Module:
    """Stands for any module: holds the attributes that the file gives it, and can do nothing."""


def strided(storage: Tensor, offset: int, size: Iterable[int], stride: Iterable[int], *_: object) -> Tensor:
    """A tensor of a storage; torch refuses one that exceeds the storage."""
    return storage.as_strided(tuple(size), tuple(stride), offset)


class Tensors(pickle.Unpickler):
    """Builds modules, tensors and plain containers; any other name in the file is an error."""

    def __init__(self, archive: ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(root + PICKLE)))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        match module, name:
            case "torch._utils", "_rebuild_tensor_v2":
                return strided
            case "collections", "OrderedDict":
                return OrderedDict
            case _:
                raise pickle.UnpicklingError(f"it names {module}.{name}, which is no weight")

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage of a tensor, on the CPU wherever it was."""
        _, dtype, key, _, count = pid
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        if len(content) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key} has {len(content)} bytes for {count} {dtype}")
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def is_scripted(path: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any(name.endswith(SCRIPTED) for name in archive.namelist())


def scripted_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their names, as `state_dict` of the module has them.

    Raises:
        pickle.UnpicklingError: It holds something other than modules, tensors and plain values.
        BadZipFile: It is damaged: the bytes of a part do not fit its checksum.
    """
    with ZipFile(path) as archive:
        root = next(name.removesuffix(PICKLE) for name in archive.namelist() if name.endswith(PICKLE))
        return dict(held(Tensors(archive, root).load()))


def held(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested modules, under their names joined by dots."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Module):
        for key, inner in vars(value).items():
            yield from held(inner, f"{name}.{key}" if name else key)
