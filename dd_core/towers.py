"""open_clip, imported where a tower is built: for seconds that nobody waits who only reads specs."""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

LOCK = threading.Lock()


def open_clip() -> ModuleType:
    """The package, without timm, and torchvision without torch's compiler.

    open_clip does without timm, whose towers we refuse.  Importing it costs half a second and 40 MB in every
    process, and it compiles functions with TorchScript meanwhile, which Python before 3.11.8 cannot do in one
    thread while another parses ("AST constructor recursion depth mismatch").  torchvision imports the whole
    compiler, two seconds and 150 MB, for one question of its roi_align, which no tower asks; it imports it
    where it is asked after all.
    """
    unwanted = {"timm": None, "torch._dynamo": ModuleType("torch._dynamo"), ASKED.__name__: ASKED}
    with LOCK, standing_in(unwanted):
        return importlib.import_module("open_clip")


@contextmanager
def standing_in(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Modules in place of those of these names, where they are not there yet, while others are imported."""
    absent = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(absent)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def is_compile_supported(device_type: str) -> bool:
    """What `torch._dynamo.utils.is_compile_supported` says."""
    return bool(importlib.import_module("torch._dynamo.utils").is_compile_supported(device_type))


ASKED = ModuleType("torch._dynamo.utils")
ASKED.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
