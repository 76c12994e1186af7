"""open_clip, imported where a tower is built: for seconds that nobody waits who only reads specs."""

import importlib
import sys
import threading
from types import ModuleType

LOCK = threading.Lock()


def open_clip() -> ModuleType:
    """The package, without timm.

    open_clip does without timm, whose towers we refuse.  Importing it costs half a second and 40 MB in every
    process, and it compiles functions with TorchScript meanwhile, which Python before 3.11.8 cannot do in one
    thread while another parses ("AST constructor recursion depth mismatch").
    """
    with LOCK:
        absent = "timm" not in sys.modules
        if absent:
            sys.modules["timm"] = None  # type: ignore[assignment]
        try:
            return importlib.import_module("open_clip")
        finally:
            if absent:
                del sys.modules["timm"]
