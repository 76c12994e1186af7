"""open_clip, imported only when a tower is built: it takes seconds, which reading specs must not cost."""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

LOCK = threading.Lock()


def open_clip() -> ModuleType:
    """The package, without timm, and torchvision without torch's compiler.

    open_clip works without timm, whose towers we refuse.  Importing timm costs half a second and 40 MB in
    every process, and it compiles functions with TorchScript meanwhile, which Python before 3.11.8 cannot do
    in one thread while another parses ("AST constructor recursion depth mismatch").  torchvision imports the
    whole compiler, two seconds and 150 MB, for one check in roi_align, which no tower calls; `ASKED` imports
    it if the check is called after all.
    """
    unwanted = {"timm": None, "torch._dynamo": ModuleType("torch._dynamo"), ASKED.__name__: ASKED}
    with LOCK, standing_in(unwanted):
        return importlib.import_module("open_clip")


@contextmanager
def standing_in(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Inside, these modules stand for those of the same names not imported so far; None fails the import."""
    absent = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(absent)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def is_compile_supported(device_type: str) -> bool:
    """As `torch._dynamo.utils.is_compile_supported`, imported at the call."""
    return bool(importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type))


ASKED = ModuleType("torch._dynamo.utils")
ASKED.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
